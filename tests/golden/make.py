"""Makes the golden files: what the reference implementations answer on tiny random weights.

The tests read the files only; run this to make them again:
    python tests/golden/make.py              # Qwen2, with transformers
    python tests/golden/make.py SOURCES hears speaks     # see originals.py
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


if __name__ == "__main__":
    if len(sys.argv) > 1:
        import originals
        originals.sources(sys.argv[1])
    for make in sys.argv[2:] or ["qwen2_tiny"]:
        {"qwen2_tiny": qwen2_tiny, "hears": hears, "speaks": speaks}[make]()
