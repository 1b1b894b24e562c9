"""What tests/golden/osum_echat.py gives the released code, and test_model.py ours: the same."""

import random

import torch
from conftest import tiny_config
from test_model import released

import data
from adapter import AdapterConfig
from decoder import DecoderConfig
from encoder import EncoderConfig

CONFIG = tiny_config(  # what the released code fixes: widths of heads, the adapter's four layers
    encoder=EncoderConfig(80, 64, 1, 2),
    adapter=AdapterConfig(d_in=64, d_out=256, n_heads=4, n_layers=4, ffn=2560),
    decoder=DecoderConfig(vocab=303, dim=256, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=128,
                          ffn=64, codes=40))
TEXT = "how are you today, hello"
QUESTION = "how are you?"
USER = "Transcribe the speech, then tell the age."
THINK = "<think>the user said hello, age: <&&>, gender: <OLD><think end>hello"
TASKS = {  # their output type -> our prompt, the answer's text
    "text": ("understand", "hello<OLD>"), "s2t_chat": ("s2t", TEXT),
    "s2t_chat_think": ("s2t_think", THINK), "text2text": ("t2t", TEXT),
    "text2token": ("tts", TEXT), "text2token_streaming": ("tts_stream", TEXT),
    "speech2text_token": ("s2s", TEXT), "speech2text_token_think": ("s2s_think", THINK),
    "speech2text_token_streaming": ("s2s_stream", TEXT)}


def codes() -> list[int]:
    rng = random.Random(0)
    return [rng.randrange(40) for _ in range(90)]


def mels() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(n, 80, generator=rng) for n in (100, 61)]


def weights() -> dict[str, torch.Tensor]:
    """The released names; scaled so that greedy replies do not stand still."""
    return released(CONFIG)[1]


def tokenizer_folder(folder: str) -> str:
    texts = ["the user said hello", "the age of the user", "&& && &&", "think end of the think",
             "a><b ><c", "how are you today"]  # conftest's
    data.train_tokenizer(texts * 20, 303, folder)
    return folder
