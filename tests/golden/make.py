"""Makes the golden files: what the reference implementations answer on tiny random weights.

The tests read the files only; run this (`python tests/golden/make.py`) to make them again.
"""

import json
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


if __name__ == "__main__":
    qwen2_tiny()
