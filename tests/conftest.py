"""What the tests of model, data, train and infer share: a tiny config, a tiny tokenizer trained on
the spot, made-up wavs, and a checkpoint folder with all its files (random weights, seconds)."""

import json
import math
import random
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
import soundfile as sf
import torch

import data
import model as echat
from adapter import AdapterConfig
from decoder import DecoderConfig
from encoder import EncoderConfig, SpeechTokenizer, TokenizerConfig
from flow import FlowConfig
from vocoder import VocoderConfig

CODES = 40


def tiny_config(**changes) -> echat.Config:
    """Every part of the system, none wider than 16."""
    return echat.Config(**{"name": "tiny", **dict(
        encoder=EncoderConfig(80, 16, 2, 1),
        adapter=AdapterConfig(d_in=16, d_out=16, n_heads=2, n_layers=1, ffn=24),
        decoder=DecoderConfig(vocab=303, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8,
                              ffn=24, codes=CODES),
        s3=TokenizerConfig(80, 16, 2, 1, codes=CODES, tail_layers=1),
        flow=FlowConfig(codes=CODES, spk_dim=8, dim=16, enc_layers=1, enc_heads=2, enc_ffn=24,
                        channels=(16,), mid=1, heads=2, head_dim=8, time_dim=16),
        vocoder=VocoderConfig(channels=16, layers=1, periods=(2,),
                              mpd=(4, 4), msd=((4, 5, 1, 1), (4, 5, 4, 1)))), **changes})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """300 tokens (44 merges and the bytes), 3 control tokens; `&&` is one, as in Qwen2's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["the user said hello", "the age of the user", "&& && &&", "think end of the think",
             "a><b ><c", "how are you today"]
    data.train_tokenizer(texts * 20, 303, str(folder))
    assert data.Tokenizer(str(folder)).n_vocab == 303
    return folder


@pytest.fixture(scope="session")
def tok(tokenizer_folder):
    return data.Tokenizer(str(tokenizer_folder))


def tone(seconds: float, rate: int = 16000, pitch: float = 220.0) -> np.ndarray:
    """A sine in a little noise, float64 (N,)."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(size=len(t))
    return 0.3 * np.sin(2 * math.pi * pitch * t) + 0.01 * noise


@pytest.fixture(scope="session")
def wav(tmp_path_factory):
    """wav(seconds, pitch=220, rate=16000) -> path of a file with such a tone."""
    folder = tmp_path_factory.mktemp("wavs")

    def make(seconds: float, pitch: float = 220.0, rate: int = 16000) -> str:
        path = folder / f"{seconds}-{pitch}-{rate}.wav"
        if not path.exists():
            sf.write(path, tone(seconds, rate, pitch), rate)
        return str(path)
    return make


def lively(module: torch.nn.Module, std: float = 0.4) -> torch.nn.Module:
    """Random weights large enough for every part to matter, the same every time."""
    rng = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        p.data = torch.randn(p.shape, generator=rng) * std
        if p.dim() == 1 and name.endswith("weight"):  # of a norm
            p.data += 1
    return module.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer_folder):
    """A checkpoint folder with all six files. Do not write into it: `copy_of` makes another."""
    folder, cfg = tmp_path_factory.mktemp("checkpoint"), tiny_config()
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    echat.save_config(str(folder), cfg)
    torch.manual_seed(0)
    echat.save_weights(str(folder / "model.safetensors"), lively(echat.EChat(cfg)))
    echat.save_weights(str(folder / "token2wav.safetensors"), echat.Token2Wav(cfg, {}))
    s3 = SpeechTokenizer(cfg.s3)
    s3.codebook.fit(torch.nn.functional.normalize(torch.randn(200, 16), dim=-1))
    echat.save_weights(str(folder / "tokenizer_s3.safetensors"), s3)
    echat.save_weights(str(folder / "voice.safetensors"), {
        "spk": torch.randn(1, 8), "prompt_codes": torch.arange(6)[None],
        "prompt_mel": torch.randn(1, 24, 80) - 5})
    return folder


def copy_of(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder, dirs_exist_ok=True))


def write_list(path: Path, records: list[dict]) -> str:
    """A JSONL list; task and txt given, the rest as it may be."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(path)


def some_codes(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(CODES) for _ in range(n)]


@pytest.fixture
def server():
    """A chat endpoint that answers from a script: an int is a status, a str the answer."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            web.seen.append((self.path, self.headers.get("Authorization"), body))
            say = web.script.pop(0)
            self.send_response(say if isinstance(say, int) else 200)
            if say == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            if isinstance(say, str):
                reply = {"choices": [{"message": {"content": say}}]}
                self.wfile.write(say.encode() if say == "<html>" else json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    web.seen, web.script = [], []
    web.url = f"http://127.0.0.1:{web.server_port}/v1"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.shutdown()
    web.server_close()
