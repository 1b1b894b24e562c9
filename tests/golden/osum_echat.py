"""Makes osum_echat.safetensors: what the released OSUM-EChat code answers on tiny random weights.

    git clone https://github.com/ASLP-lab/OSUM
    OSUM=OSUM/OSUM-EChat python tests/golden/osum_echat.py

Needs transformers 4.44.0, which its patches are for. Its modules run as they are but for constants
of the full size, bfloat16 (here float32), sampling (here greedy) and torch.compile; what it imports
for logging, LoRA and audio files only is replaced by nothing. Keys: "hear" and, of every task T,
"T.hidden", "T.targets", "T.loss" of training and "T.tokens" of generation.
"""

import importlib.abc
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent), os.environ["OSUM"]]

from golden_osum import CONFIG, QUESTION, TASKS, TEXT, USER, codes, mels, weights

import data

CODES, VOCAB = CONFIG.decoder.codes, CONFIG.decoder.vocab


class Tokenizer:
    """The calls of theirs, answered by a tokenizer of ours."""

    padding_side, eos_token = "right", "<|im_end|>"

    def __init__(self, folder):
        self.own = data.Tokenizer(folder)
        self.eos_token_id = self.own.im_end

    def add_special_tokens(self, _):
        pass

    def __call__(self, texts, **_):
        texts = [texts] if isinstance(texts, str) else texts
        return Ids(input_ids=torch.tensor([self.own.fixed(t) for t in texts]))

    def batch_decode(self, rows, **_):
        return [self.own.decode(r.tolist()) for r in rows]


class Ids(dict):
    input_ids = property(lambda self: self["input_ids"])

    def to(self, _):
        return self


class Smaller(importlib.abc.SourceLoader):
    """Loads a module of theirs with its constants changed."""

    def __init__(self, path, changes):
        self.path, self.changes = path, changes

    def get_filename(self, _):
        return self.path

    def get_data(self, path):
        text = Path(self.path).read_text(encoding="utf-8")
        for old, new in self.changes.items():
            assert old in text, (self.path, old)
            text = text.replace(old, new)
        return text.encode()

    def path_stats(self, _):
        raise OSError  # never from a cache


def load(name, changes):
    path = os.path.join(os.environ["OSUM"], *name.split(".")) + ".py"
    spec = importlib.util.spec_from_loader(name, Smaller(path, changes), origin=path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original(folder: str, tokenizer: Tokenizer):
    """Their LLMASR_Model of our CONFIG's size, with the weights."""
    from transformers import LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM  # before the rest
    assert LogitsProcessorList and Qwen2ForCausalLM
    from transformers.models.qwen2 import modeling_qwen2
    layer = modeling_qwen2.Qwen2DecoderLayer
    for name in ("torchaudio", "peft", "gxl_ai_utils", "gxl_ai_utils.utils", "whisper",
                 "whisper.tokenizer"):
        sys.modules.setdefault(name, MagicMock())
    end = str(tokenizer.eos_token_id)
    unknown = str(*set(tokenizer.own.encode("<&&>")) & tokenizer.own.unknown)
    qwen = load("patches.modelling_qwen2_infer_gpu",
                {"_GPU_QWEN_TORCH_COMPILE = True": "_GPU_QWEN_TORCH_COMPILE = False",
                 "151645": end})
    module = load("wenet.osum_echat.llmasr_model_instruct_version",
                  {"151645": end, "7672": unknown, "[4098]": f"[{CODES + 2}]",
                   "torch.bfloat16": "torch.float32", "do_sample=True": "do_sample=False",
                   "do_sample=self.do_sample": "do_sample=False"})
    from wenet.transformer.encoder import TransformerEncoder
    d, e = CONFIG.decoder, CONFIG.encoder
    Qwen2Config(vocab_size=VOCAB, hidden_size=d.dim, intermediate_size=d.ffn,
                num_hidden_layers=d.n_layers, num_attention_heads=d.n_heads,
                num_key_value_heads=d.n_kv_heads, rope_theta=d.rope_theta, rms_norm_eps=d.eps,
                max_position_embeddings=2048, tie_word_embeddings=True).save_pretrained(folder)
    module.AutoTokenizer = MagicMock(from_pretrained=lambda *_, **__: tokenizer)

    class Language:
        @staticmethod
        def from_config(config, **_):
            config._attn_implementation = "eager"
            return qwen.InferQwen2ForCausalLM(config)
    training = module.AutoModelForCausalLM
    module.AutoModelForCausalLM = Language
    encoder = TransformerEncoder(
        80, e.d_model, e.n_heads, 4 * e.d_model, e.n_layers, input_layer="conv1d2",
        pos_enc_layer_type="abs_pos_whisper", static_chunk_size=-1, key_bias=False,
        activation_type="gelu")
    model = module.LLMASR_Model(encoder, e.d_model, folder, lora=False, downsample_rate=4,
                                adapter_type="osum_echat", speech_token_num=CODES + 1)
    model.llama_model.text_phase = True
    found = model.load_state_dict(
        {k: v for k, v in weights().items() if not k.endswith(".pe")}, strict=False)
    assert not found.unexpected_keys and all(k.endswith(".pe") for k in found.missing_keys), found
    modeling_qwen2.Qwen2DecoderLayer = layer  # which the patch replaces, for generation only
    return model.eval(), training


def batch(task: str, tokenizer: Tokenizer) -> dict:
    ids = [*tokenizer.own.encode(TASKS[task][1]), tokenizer.eos_token_id]
    speech = torch.tensor([[CODES, *codes(), CODES]])
    user = tokenizer.own.encode(QUESTION if task == "text2text" else USER)
    mel = mels()[0][None]
    return {"output_type": task, "task": task, "feats": mel,
            "feats_lengths": torch.tensor([mel.shape[1]]), "target": torch.tensor([ids]),
            "target_lengths": torch.tensor([len(ids)]), "speech_tokens": speech,
            "speech_tokens_length": torch.tensor([speech.shape[1]]),
            "prompt": torch.tensor([user]), "prompt_lengths": torch.tensor([len(user)])}


class Training(torch.nn.Module):
    """Plain Qwen2, as in their training; keeps the hidden states and targets of the last call."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.seen = plain, {}

    def forward(self, **inputs):
        out = self.plain(**inputs)
        self.seen = {"hidden": out.hidden_states[-1], "targets": inputs.get("labels")}
        return out


@torch.no_grad()
def osum_echat():
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        from golden_osum import tokenizer_folder
        tokenizer = Tokenizer(tokenizer_folder(folder))
        model, training = original(folder, tokenizer)
        lengths = torch.tensor([len(m) for m in mels()])
        for i, mel in enumerate(mels()):  # one by one: in a batch the released code differs (odd T)
            heard, _ = model._get_embedding_from_wav(mel[None], torch.tensor([len(mel)]))
            out[f"hear.{i}"] = heard[0]

        generating = model.llama_model
        plain = training.from_config(model.config, attn_implementation="eager").float().eval()
        plain.load_state_dict(generating.state_dict(), strict=False)
        model.llama_model = Training(plain)
        aims = []
        del model.loss_fct  # a module
        model.loss_fct = lambda logits, aim: (aims.append(aim), torch.nn.functional.cross_entropy(
            logits, aim))[1]
        for task in TASKS:
            print(task, flush=True)
            loss = model(batch(task, tokenizer), "cpu")["loss"]
            seen = model.llama_model.seen
            aim = seen["targets"][0, 1:] if seen["targets"] is not None else aims[-1]
            out |= {f"{task}.hidden": seen["hidden"][0, -4:], f"{task}.targets": aim,
                    f"{task}.loss": loss.detach()}

        module = sys.modules["wenet.osum_echat.llmasr_model_instruct_version"]
        model.llama_model, model.add_embed_head, model.max_length = generating, False, 1200
        generating.speech_token_emded, generating.speech_head = (model.speech_token_emded,
                                                                 model.speech_head)
        wave = mels()[0][None], torch.tensor([len(mels()[0])])
        tokens, generate = [], generating.generate

        def keep(**how):
            how["do_compile"] = False
            how.pop("length_penalty", None)
            stops = model.s2s_stop_criteria.__class__([module.MaxTokenStopper(80)])
            how["stopping_criteria"] = stops.__class__(
                [*stops, *(how.get("stopping_criteria") or [])])
            tokens[:] = [generate(**how)[0]]
            return tokens[0][None]
        generating.generate = keep
        for name, call in {
                "s2t": lambda: model.generate4chat(*wave, do_sample=False),
                "understand": lambda: model.generate(*wave, USER),
                "s2s": lambda: model.generate_s2s_no_stream_with_repetition_penalty(*wave),
                "s2s_think":
                    lambda: model.generate_s2s_no_stream_think_with_repetition_penalty(*wave),
                "tts": lambda: model.generate_tts("cpu", TEXT),
                "t2t": lambda: (model.set_task_type("ASR"),  # which they forget after speech
                                model.generate_text2text("cpu", QUESTION))}.items():
            try:
                call()
            except IndexError:  # theirs, where the text did not end
                pass
            out[f"{name}.tokens"] = tokens[0]
            print(name, tokens[0].tolist())
    out = {k: v.contiguous() for k, v in out.items()}
    save_file(out, HERE / "osum_echat.safetensors")
    print({k: tuple(v.shape) for k, v in out.items()})


if __name__ == "__main__":
    osum_echat()
