"""Makes the golden files: what the reference implementations answer on tiny random weights.

The tests read the files only; run this to make them again:
    python tests/golden/make.py                          # Qwen2, with transformers
    python tests/golden/make.py SOURCES hears speaks     # see originals.py
    python tests/golden/make.py QWEN qwen_tokens         # the folder of a Qwen2.5 model
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def qwen2_tiny():
    """Two random Qwen2 models (tied head, untied head), logits and greedy tokens of each.

    Needs transformers. Keys "tied.<HF name>", "tied.ids", "tied.logits", "tied.greedy", the same
    with "untied."; the metadata holds the config.json of each.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tensors, configs = {}, {}
    for name in ("tied", "untied"):
        cfg = Qwen2Config(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-6,
            max_position_embeddings=64, tie_word_embeddings=name == "tied")
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(cfg).eval()
        for p in model.parameters():  # HF starts biases at 0 and norms at 1: leave nothing trivial
            torch.nn.init.normal_(p, mean=float(p.dim() == 1) / 2, std=0.4)
        ids = torch.randint(48, (2, 11))
        with torch.no_grad():
            logits = model(ids).logits
            greedy = model.generate(ids[:1, :5], do_sample=False, max_new_tokens=20)
        state = model.state_dict()
        if cfg.tie_word_embeddings:
            del state["lm_head.weight"]
        state |= {"ids": ids, "logits": logits, "greedy": greedy[:, 5:]}
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
        configs[name] = json.dumps(cfg.to_dict())
    save_file(tensors, HERE / "qwen2_tiny.safetensors", configs)


def save(name: str, weights: dict, results: dict):
    """Weights keep the originals' names, and 8 bits, to which `rounded` brings them first."""
    weights = {k: v.to(torch.float8_e4m3fn) for k, v in weights.items() if "positional" not in k}
    tensors = {k: v.detach().clone().contiguous() for k, v in (weights | results).items()}
    save_file(tensors, HERE / f"{name}_tiny.safetensors")


def rounded(module: torch.nn.Module) -> torch.nn.Module:
    for name, w in [*module.named_parameters(), *module.named_buffers()]:
        if "positional" not in name:
            w.data = w.data.to(torch.float8_e4m3fn).float()
    return module


def hears():
    """S3 v1 and Whisper, which are given the same weights. Needs openai-whisper, einops, onnx."""
    import originals
    from whisper.model import AudioEncoder

    torch.manual_seed(0)
    mel, n = torch.randn(1, 8, 93), torch.tensor([93])
    tokenizers = {rate: rounded(originals.s3(rate, 8, 64, 1, 1, 32)) for rate in (25, 50)}
    results = {f"codes.{rate}": model.quantize(mel, n)[0][0] for rate, model in tokenizers.items()}
    weights = tokenizers[25].state_dict()  # the same at 50 Hz
    model = originals.lively(AudioEncoder(8, 46, 64, 1, 1))
    model.load_state_dict({k[8:]: v for k, v in weights.items() if k.startswith("encoder.")
                           and "positional" not in k}, strict=False)
    norms = {k: v for k, v in model.state_dict().items() if "ln_post" in k}
    for w in norms.values():
        w.copy_(w.to(torch.float8_e4m3fn))
    results |= {"mel": mel[0].T, "hidden": model(mel[:, :, :92])[0]}
    save("ears", weights | {f"encoder.{k}": v for k, v in norms.items()}, results)


def speaks():
    """CosyVoice 1's flow and HiFT, HiFi-GAN with both kinds of blocks. Needs einops, diffusers
    0.29."""
    import originals

    torch.manual_seed(1)
    results = {"codes": torch.randint(50, (1, 45)), "prompt_codes": torch.randint(50, (1, 7)),
               "spk": torch.randn(1, 12), "prompt_mel": torch.randn(1, 25, 80),
               "noise": torch.randn(1, 180, 80).half()}
    for rate in (25, 50):
        model = rounded(originals.flow(rate, 50, 12, 32, 1, 2, 48, 8, 1, 1, 2, 8))
        results[f"mel.{rate}"] = originals.flow_mel(
            model, results["codes"], results["spk"], results["prompt_codes"],
            results["prompt_mel"], results["noise"].float())
    save("flow", model.state_dict(), results)

    model, mel = rounded(originals.hift(8, 8)), torch.randn(1, 6, 8)
    source = torch.rand(1, 6 * 256) - 0.5
    save("hift", model.state_dict(), {"mel": mel, "source": source, "f0": model.f0_predictor(
        mel.mT), "wave": model.decode(mel.mT, source[:, None])})

    weights, results = {}, {"mel": torch.randn(1, 5, 80)}
    for kind, dilations in (("1", ((1, 3, 5), (1, 3, 5))), ("2", ((1, 2), (2, 6)))):
        model = rounded(originals.hifigan(dict(
            resblock=kind, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4),
            upsample_initial_channel=8, resblock_kernel_sizes=(3, 5),
            resblock_dilation_sizes=dilations)))
        weights |= {f"{kind}.{k}": v for k, v in model.state_dict().items()}
        results[f"wave.{kind}"] = model(results["mel"].mT)[:, 0]
    save("hifigan", weights, results)


LINES = [
    "", " ", "Hello, world! I'm sure THEY'LL say it's  fine.\n\n  Isn't it?\t\tYes.\r\n",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)  # O(2**n)\n",
    "for (int i = 0; i != 1024; ++i) { a[i] <<= 3; }  /* 3.14159e-10 */",
    '<div class="x">&amp;&amp; {"key": [1, 2, null]}</div>',
    "2024-11-05 12:34:56 1,000,000 \u0663\u00bd\u2167",
    "你好,世界。今天天气怎么样?请用中文解释一下。", "東京は日本の首都です。カタカナとひらがな。",
    "안녕하세요 세계", "Привет, как дела? Съешь ещё этих мягких булок.", "Γειά σου Κόσμε",
    "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Chào thế giới",
    "naïve café ¿Qué tal? Straße ŒUVRE İstanbul",
    "cafe\u0301 A\u030a \u1100\u1161\u11a8 \u212b \ufb01",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd "
    "\U0001f1e9\U0001f1ea\u2764\ufe0f ok",
    "\x00\x07\x1c\x85\xa0\u2003\u2028\u3000\ufeff\u200b'\u017f x", "∑ √ ≤ ≠ → █ ░ ♫",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\u0338<|endoftext|><|im_end<tool_call>{}</tool_call><|fim_pad|>",
    "<think><SAD>&&<&&> a && b<think end>", "aaaaaaaaaaaaaaaa thethethe ........ ======= \n \n\n "]


def qwen_tokens(folder: str):
    """Part of the vocabulary of a real Qwen2.5 folder, and the ids `tokenizers` gives some lines.

    A token stays if the lines use it or it is among the first 1,500, with all that it is merged
    from; ids are counted again in the old order, so the merges stay in theirs.
    """
    import tokenizers

    spec = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    made, vocab = {"".join(pair): pair for pair in pairs}, spec["model"]["vocab"]
    whole = tokenizers.Tokenizer.from_str(json.dumps(spec))
    wanted = {token for line in LINES for token in whole.encode(line).tokens if token in vocab}
    wanted |= {token for token, i in vocab.items() if i < 1500}
    todo = list(wanted)
    while todo:
        parts = [part for part in made.get(todo.pop(), ()) if part not in wanted]
        wanted.update(parts)
        todo += parts
    kept = sorted(wanted, key=vocab.get)
    spec["model"] |= {"vocab": {token: i for i, token in enumerate(kept)},
                      "merges": [pair for pair in pairs if "".join(pair) in wanted]}
    for i, token in enumerate(spec["added_tokens"], len(kept)):
        token["id"] = i
    part = tokenizers.Tokenizer.from_str(json.dumps(spec))
    rows = [[line, part.encode(line).ids] for line in LINES]
    (HERE / "qwen_tokens.json").write_text(json.dumps({"tokenizer": spec, "lines": rows}))


if __name__ == "__main__":
    folder, *names = sys.argv[1:] or ["", "qwen2_tiny"]
    if {"hears", "speaks"} & set(names):
        import originals
        originals.sources(folder)
    for name in names:
        qwen_tokens(folder) if name == "qwen_tokens" else globals()[name]()
