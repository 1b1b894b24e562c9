"""The original implementations, as make.py and equality.py run them: their code, random weights.

`sources(DIR)` first: DIR holds checkouts of CosyVoice, Matcha-TTS, hifi-gan and S3Tokenizer under
these names. Packages they import without using them here are replaced by stand-ins.
"""

import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch

STAND_INS = ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi", "omegaconf",
             "torchaudio.transforms", "conformer", "matcha.utils", "matcha.utils.pylogger",
             "matplotlib", "matplotlib.pylab", "numba")


def sources(folder: str) -> None:
    root = Path(folder).resolve()
    sys.path[:0] = [str(root / name) for name in ("CosyVoice", "Matcha-TTS", "S3Tokenizer",
                                                  "hifi-gan")]
    for name in STAND_INS:
        spec = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = MagicMock(name=name, __spec__=spec)
    sys.modules["conformer"].ConformerBlock = torch.nn.Module
    # the package's __init__ fetches weights and reads sound files: take its modules only
    package = types.ModuleType("s3tokenizer")
    package.__path__ = [str(root / "S3Tokenizer" / "s3tokenizer")]
    sys.modules["s3tokenizer"] = package


def lively(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that keep signals near unit size, and none of them trivial, in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() > 1 and not name.endswith(("weight_g", "original0")):
            p.data = torch.randn(p.shape, generator=rng) / p[0].numel() ** 0.5
        elif p.dim() > 1:  # lengths of weight norm: of a row of such a weight
            p.data = 0.7 + 0.6 * torch.rand(p.shape, generator=rng)
        else:
            one = name.endswith(("weight", "alpha"))
            p.data = 0.2 * torch.randn(p.shape, generator=rng) + float(one)
            p.data = p.data.abs() if one else p.data
    return module.eval()


def flow(rate: int = 25, codes: int = 4096, spk: int = 192, dim: int = 512, layers: int = 6,
         heads: int = 8, ffn: int = 2048, channels: int = 256, mid: int = 12, blocks: int = 4,
         unet_heads: int = 8, head_dim: int = 64):
    """CosyVoice 1's MaskedDiffWithXvec, as its yaml builds it."""
    from cosyvoice.flow.decoder import ConditionalDecoder
    from cosyvoice.flow.flow import MaskedDiffWithXvec
    from cosyvoice.flow.flow_matching import ConditionalCFM
    from cosyvoice.flow.length_regulator import InterpolateRegulator
    from cosyvoice.transformer.encoder import ConformerEncoder
    cfm = types.SimpleNamespace(sigma_min=1e-6, solver="euler", t_scheduler="cosine",
                                training_cfg_rate=0.2, inference_cfg_rate=0.7)
    return lively(MaskedDiffWithXvec(
        dim, 80, spk, "mel", codes, rate,
        encoder=ConformerEncoder(
            dim, output_size=dim, attention_heads=heads, linear_units=ffn, num_blocks=layers,
            dropout_rate=0.1, positional_dropout_rate=0.1, attention_dropout_rate=0.1,
            normalize_before=True, input_layer="linear", pos_enc_layer_type="rel_pos_espnet",
            selfattention_layer_type="rel_selfattn", use_cnn_module=False, macaron_style=False),
        length_regulator=InterpolateRegulator(80, (1, 1, 1, 1)),
        decoder=ConditionalCFM(240, cfm, 1, 80, ConditionalDecoder(
            320, 80, (channels, channels), 0.0, head_dim, blocks, mid, unet_heads, "gelu"))))


@torch.inference_mode()
def flow_mel(model, codes, spk, prompt_codes, prompt_mel, noise):
    """Its inference; `noise` (1, T, 80) is what it draws for prompt and reply."""
    draw, torch.randn_like = torch.randn_like, lambda x, **_: noise.mT[:, :, :x.shape[2]].clone()
    try:
        mel, _ = model.inference(
            codes, torch.tensor([codes.shape[1]]), prompt_codes,
            torch.tensor([prompt_codes.shape[1]]), prompt_mel,
            torch.tensor([prompt_mel.shape[1]]), spk, torch.zeros(1, 80, 0, 2))
    finally:
        torch.randn_like = draw
    return mel.mT


def hift(channels: int = 512, mels: int = 80):
    from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
    from cosyvoice.hifigan.generator import HiFTGenerator
    model = lively(HiFTGenerator(mels, channels, f0_predictor=ConvRNNF0Predictor(
        1, mels, channels)))
    for p in model.conv_post.parameters():  # else the wave is clipped nearly everywhere
        p.data *= 0.3
    return model


def hifigan(config: dict):
    """A generator with weight norm, by its config_v*.json."""
    from models import Generator  # hifi-gan's top-level module
    model = Generator(types.SimpleNamespace(**config))
    return lively(model)


def s3(rate: int = 25, mels: int = 128, dim: int = 1280, heads: int = 20, layers: int = 6,
       codes: int = 4096):
    from s3tokenizer.model import ModelConfig, S3Tokenizer
    name = "speech_tokenizer_v1" + ("_25hz" if rate == 25 else "")
    model = lively(S3Tokenizer(name, ModelConfig(mels, 1500, dim, heads, layers, codes)))
    rng = torch.Generator().manual_seed(1)
    embed = model.quantizer._codebook.embed
    embed.copy_(torch.nn.functional.normalize(torch.randn(embed.shape, generator=rng), dim=-1))
    return model
