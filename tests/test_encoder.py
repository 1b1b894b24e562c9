"""The encoder: log-mel against numpy, padding, sizes, the quantiser, CTC, foreign weights."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from encoder import (Codebook, Encoder, EncoderConfig, SpeechTokenizer, TokenizerConfig, fbank,
                     load_whisper, log_mel, mel_filters, read_onnx, released_s3, sinusoids)
from model import BadCheckpoint, fit

CFG = EncoderConfig(n_mels=8, d_model=16, n_heads=2, n_layers=2)
S3 = TokenizerConfig(n_mels=8, d_model=16, n_heads=2, n_layers=1, codes=12, tail_layers=1, vocab=6)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def padded(lengths: list[int], n_mels: int = 8):
    """Mels of these lengths, alone and in one batch whose padding is loud."""
    mels = [torch.randn(n, n_mels) for n in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True, padding_value=7.0)
    return mels, batch, torch.tensor(lengths)


# ---- log-mel -----------------------------------------------------------------------------------

def slaney(sr: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> np.ndarray:
    """The filters one triangle at a time. One mel is 200/3 Hz up to 1 kHz, above it a 27th part
    of log 6.4."""
    def mel(hz):
        return hz * .015 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    mels = np.linspace(mel(fmin), mel(fmax), n_mels + 2)
    edges = [m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    bins = np.arange(n_fft // 2 + 1) * sr / n_fft
    return np.stack([np.interp(bins, edges[i:i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0])
                     for i in range(n_mels)])


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_whispers(n_mels):
    wave = np.random.default_rng(0).standard_normal(16037) * np.linspace(0, .5, 16037)
    reflected = np.pad(wave, 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(reflected, 400)[::160]
    window = scipy.signal.get_window("hann", 400)  # periodic, as for a filter bank
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    logs = np.log10(np.maximum(power[:-1] @ slaney(16000, 400, n_mels, 0, 8000).T, 1e-10))
    expected = (np.maximum(logs, logs.max() - 8) + 4) / 4
    got = log_mel(torch.from_numpy(wave).float(), n_mels)
    assert got.shape == (16037 // 160, n_mels)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_mel_filters_of_other_bands():
    for args in ((24000, 1024, 80, 0.0, 8000.0), (22050, 512, 20, 80.0, 7600.0)):
        np.testing.assert_allclose(mel_filters(*args), slaney(*args), atol=1e-6)


def test_log_mel_of_silence_and_of_nearly_nothing():
    assert torch.allclose(log_mel(torch.zeros(800)), torch.full((5, 80), -1.5))
    assert log_mel(torch.randn(201)).shape == (1, 80)
    with pytest.raises(ValueError, match="over 200 samples"):
        log_mel(torch.zeros(200))


def test_fbank_is_kaldis():
    """From its definition, in float64, a frame at a time."""
    wave = np.random.default_rng(0).standard_normal(2000) * np.linspace(.01, .5, 2000) + .1
    hz = np.arange(257) * 16000 / 512
    mels = 1127 * np.log(1 + hz / 700)
    edges = np.linspace(*(1127 * np.log(1 + np.array([20, 8000]) / 700)), 82)
    window = (.5 - .5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** .85
    rows = []
    for start in range(0, 2000 - 399, 160):
        x = wave[start:start + 400] - wave[start:start + 400].mean()
        x = (x - .97 * np.concatenate([x[:1], x[:-1]])) * window
        power = np.abs(np.fft.rfft(x, 512)) ** 2
        rows.append([np.log(np.interp(mels, edges[i:i + 3], [0, 1, 0]) @ power)
                     for i in range(80)])
    expected = np.array(rows) - np.mean(rows, 0)
    np.testing.assert_allclose(fbank(torch.from_numpy(wave).float()), expected, atol=1e-3)
    with pytest.raises(ValueError, match="400 samples"):
        fbank(torch.zeros(399))


# ---- the encoder -------------------------------------------------------------------------------

def test_a_batch_gives_every_sample_what_it_gets_alone():
    model = Encoder(CFG).eval()
    mels, batch, lengths = padded([31, 44, 7, 1, 30])
    hidden, out_lengths = model(batch, lengths)
    assert out_lengths.tolist() == [16, 22, 4, 1, 15] and hidden.shape == (5, 22, 16)
    for mel, row, n in zip(mels, hidden, out_lengths):
        alone, _ = model(mel[None], torch.tensor([len(mel)]))
        assert alone.shape == (1, n, 16)
        assert torch.allclose(alone[0], row[:n], atol=1e-5)
        assert not row[n:].any()


def test_whisper_medium_has_its_size_and_stores_no_positions():
    with torch.device("meta"):
        model = Encoder(EncoderConfig(80, 1024, 16, 24))
    assert sum(p.numel() for p in model.parameters()) == 305_680_384
    assert len(model.state_dict()) == 4 + 24 * 15 + 2 == len(list(model.parameters()))


def test_positions_are_whispers():
    table = sinusoids(50, 8)
    rate = np.exp(-np.log(10000) * np.arange(4) / 3)
    angle = np.arange(50)[:, None] * rate
    np.testing.assert_allclose(table, np.hstack([np.sin(angle), np.cos(angle)]), atol=1e-5)


# ---- the speech tokenizer ----------------------------------------------------------------------

def fitted(cfg: TokenizerConfig = S3) -> SpeechTokenizer:
    model = SpeechTokenizer(cfg)
    with torch.no_grad():
        features, _ = model.features(torch.randn(4, 80, cfg.n_mels), torch.full((4,), 80))
    model.codebook.fit(features.flatten(0, 1))
    return model


@pytest.mark.parametrize("stride, pool", [(1, 2), (2, 1)])
def test_codes_of_a_batch_are_the_codes_alone(stride, pool):
    model = fitted(TokenizerConfig(8, 16, 2, 1, stride, pool, codes=12)).eval()
    mels, batch, lengths = padded([33, 46, 7, 40, 35, 38, 1])
    codes, out_lengths = model.encode(batch, lengths)
    assert out_lengths.tolist() == [-(-n // 4) for n in lengths.tolist()]
    assert codes.shape == (7, 12) and codes.dtype == torch.long and len(codes.unique()) > 3
    for mel, row, n in zip(mels, codes, out_lengths):
        alone, _ = model.encode(mel[None], torch.tensor([len(mel)]))
        assert alone[0].tolist() == row[:n].tolist() and not row[n:].any()


def test_nearest_is_nearest_and_survives_saving():
    model = fitted()
    x = F.normalize(torch.randn(50, 16), dim=-1)
    assert torch.equal(model.codebook.nearest(x), torch.cdist(x, model.codebook.embed).argmin(-1))
    again = SpeechTokenizer(S3)
    again.load_state_dict(model.state_dict())
    mel, lengths = torch.randn(2, 40, 8), torch.tensor([40, 33])
    assert torch.equal(model.eval().encode(mel, lengths)[0], again.eval().encode(mel, lengths)[0])


def test_without_positions_a_later_sound_keeps_its_code():
    """A mel repeated without end has the same code at every repetition."""
    mel = torch.randn(1, 4, 8).repeat(1, 12, 1)
    for positions in (True, False):
        model = fitted(TokenizerConfig(8, 16, 2, 1, codes=12, positions=positions)).eval()
        x, _ = model.features(mel, torch.tensor([48]))
        same = torch.allclose(x[:, 3:-3], x[:, 3:4].expand(-1, 6, -1), atol=1e-5)
        assert same is not positions


def test_quantiser_is_straight_through_and_blind_to_padding():
    model = fitted().eval()
    x = F.normalize(torch.randn(2, 5, 16), dim=-1).requires_grad_()
    lengths = torch.tensor([5, 3])
    y, commit, codes = model.quantise(x, lengths)
    assert torch.allclose(y[0], model.codebook.embed[codes[:5]], atol=1e-6) and len(codes) == 8
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
    assert torch.equal(grad, weight)
    (grad,) = torch.autograd.grad(commit, x)
    assert not grad[1, 3:].any() and grad[1, :3].any()


def test_dead_codes_come_back_and_live_ones_follow():
    book = Codebook(4, 2, decay=0.5)
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    book.embed.copy_(torch.stack([east, north, -east, -north]))
    x = F.normalize(torch.stack([east, north]).repeat(20, 1) + 0.03 * torch.randn(40, 2), dim=-1)
    for _ in range(8):
        book.update(x, book.nearest(x))
    used = torch.bincount(book.nearest(x), minlength=4)
    assert (used > 0).all(), "a code that nobody uses moves to where the features are"
    assert torch.cdist(x, book.embed).min(-1).values.max() < 0.2


def test_k_means_finds_the_clusters():
    centres = F.normalize(torch.randn(6, 16), dim=-1)
    x = F.normalize(centres.repeat(30, 1) + 0.01 * torch.randn(180, 16), dim=-1)
    book = Codebook(12, 16)
    book.fit(x)
    assert torch.cdist(centres, book.embed).min(-1).values.max() < 0.05
    assert torch.isfinite(book.embed).all() and (book.counts > 0).all() and book.fitted
    with pytest.raises(ValueError, match="12 codes got only 5"):
        book.fit(x[:5])


def test_ctc_overfits_one_batch_through_the_codes():
    model = SpeechTokenizer(S3)
    _, mel, lengths = padded([60, 47, 52])
    targets = torch.tensor([[1, 4, 4, 2], [0, 5, 3, 0], [2, 3, 0, 0]])
    sizes = torch.tensor([4, 3, 2])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        if step == 50:  # the recogniser works; now through the codes
            assert not model.codebook.fitted and stats["used"] == 0
            x, n = model.features(mel, lengths)
            model.codebook.fit(torch.cat([row[:k] for row, k in zip(x.detach(), n)]))
        logits, loss, stats = model(mel, lengths, targets, sizes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert stats["ctc"] < 0.3 and 2 <= stats["used"] <= 12 and 1 < stats["perplexity"] <= 12
    assert logits.shape == (3, 30, 7)
    best = logits[0].argmax(-1).unique_consecutive()
    assert best[best != 6].tolist() == [1, 4, 4, 2]


def test_text_longer_than_its_codes_does_no_harm():
    _, loss, _ = fitted()(torch.randn(1, 8, 8), torch.tensor([8]), torch.ones(1, 9).long(),
                          torch.tensor([9]))
    loss.backward()
    assert torch.isfinite(loss)


def test_starting_from_an_encoder():
    encoder = Encoder(EncoderConfig(8, 16, 2, 2))
    model = SpeechTokenizer(S3)
    with pytest.raises(ValueError, match="nothing of Whisper"):
        model.init_from_encoder({"lm_head.weight": torch.ones(2)})
    model.init_from_encoder(encoder.state_dict())
    assert torch.equal(model.blocks[0].mlp[2].weight, encoder.blocks[0].mlp[2].weight)
    assert torch.equal(model.tail[0].attn.key.weight, encoder.blocks[1].attn.key.weight)
    assert torch.equal(model.conv1.weight, encoder.conv1.weight)


# ---- foreign weights ---------------------------------------------------------------------------

FOREIGN = {  # ours -> theirs, written out independently of the loader's table
    "hf": {"blocks.": "layers.", "attn_ln": "self_attn_layer_norm", "mlp.0": "fc1",
           "attn.query": "self_attn.q_proj", "attn.key": "self_attn.k_proj", "mlp.2": "fc2",
           "attn.value": "self_attn.v_proj", "attn.out": "self_attn.out_proj",
           "mlp_ln": "final_layer_norm", "ln_post": "layer_norm"},
    "wenet": {"blocks.": "encoders.", "attn_ln": "norm1", "attn.query": "self_attn.linear_q",
              "attn.key": "self_attn.linear_k", "attn.value": "self_attn.linear_v",
              "mlp.0": "feed_forward.w_1", "attn.out": "self_attn.linear_out",
              "mlp.2": "feed_forward.w_2", "mlp_ln": "norm2", "ln_post": "after_norm",
              "conv1": "embed.conv.0", "conv2": "embed.conv.2"},
    "openai": {},
}
EXTRA = {  # what such files hold besides
    "hf": {"model.encoder.embed_positions.weight": sinusoids(1500, 16).half(),
           "model.decoder.layers.0.fc1.weight": torch.ones(1), "proj_out.weight": torch.ones(1)},
    "wenet": {"encoder.embed.pos_enc.pe": sinusoids(2000, 16)[None].bfloat16()},
    "openai": {"encoder.positional_embedding": sinusoids(1500, 16),
               "decoder.blocks.0.mlp.0.weight": torch.ones(1)},
}


def foreign(kind: str, state: dict) -> dict:
    out = {}
    for name, value in state.items():
        for ours, theirs in FOREIGN[kind].items():
            name = name.replace(ours, theirs)
        out[("model.encoder." if kind == "hf" else "encoder.") + name] = value
    return out | EXTRA[kind]


@pytest.mark.parametrize("kind", FOREIGN)
def test_whisper_under_every_spelling(kind):
    own = Encoder(CFG).state_dict()
    loaded = load_whisper(foreign(kind, own))
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_a_bad_key_is_named():
    good = foreign("wenet", Encoder(CFG).state_dict())
    last = "encoder.encoders.1.norm1.bias"
    bad = [({**good, "encoder.encoders.1.conv_module.bias": torch.ones(1)}, "conv_module"),
           ({k: v for k, v in good.items() if k != last}, "blocks.1.attn_ln.bias missing"),
           ({**good, last: torch.ones(3)}, r"blocks.1.attn_ln.bias is \(3,\), expected"),
           ({**good, "encoder.blocks.1.attn_ln.bias": good[last]}, "twice in this file"),
           ({**good, "encoder.embed.pos_enc.pe": torch.zeros(1, 9, 16)}, "pos_enc.pe: not Whisper"),
           ({}, "missing")]
    for state, message in bad:
        with pytest.raises((ValueError, BadCheckpoint), match=message):
            fit(Encoder(CFG), load_whisper(state), "file.pt")


def test_s3_weights():
    own = fitted(TokenizerConfig(8, 16, 2, 3, 2, 1, codes=12)).state_dict()
    released = {f"encoder.{k}": v for k, v in own.items() if not k.startswith("codebook")}
    released["quantizer._codebook.embed"] = own["codebook.embed"]
    released["encoder.positional_embedding"] = sinusoids(1500, 16)
    model = released_s3(released)
    assert torch.equal(model.codebook.embed, own["codebook.embed"]) and model.codebook.fitted
    del released["quantizer._codebook.embed"]
    with pytest.raises(ValueError, match="[Mm]issing|codebook.embed"):
        released_s3(released)


def test_s3_v1_has_its_size():
    with torch.device("meta"):
        model = SpeechTokenizer(TokenizerConfig(128, 1280, 20, 6, 2, 1, 4096))
    assert sum(p.numel() for p in model.parameters()) == 123_466_240


# ---- what the originals answer (tests/golden/make.py) ------------------------------------------

def ears() -> tuple[dict, dict]:
    """Weights under S3Tokenizer's names, results."""
    held = load_file(Path(__file__).parent / "golden" / "ears_tiny.safetensors")
    weights = {k: v.float() for k, v in held.items() if k.startswith(("encoder.", "quantizer."))}
    return weights, {k: v for k, v in held.items() if k not in weights}


@pytest.mark.parametrize("rate", [25, 50])
def test_codes_are_s3tokenizers(rate):
    weights, want = ears()
    model = released_s3({k: v for k, v in weights.items() if "ln_post" not in k}, rate)
    codes, _ = model.encode(want["mel"][None], torch.tensor([93]))
    assert codes[0].tolist() == want[f"codes.{rate}"].tolist()
    assert codes.shape[1] == {25: 24, 50: 47}[rate]


def test_hidden_is_whispers():
    weights, want = ears()
    weights.pop("quantizer._codebook.embed")
    model = Encoder(EncoderConfig(8, 64, 1, 1))
    model.load_state_dict(load_whisper(weights))
    hidden, _ = model(want["mel"][None, :92], torch.tensor([92]))
    torch.testing.assert_close(hidden[0], want["hidden"], atol=1e-5, rtol=0)


# ---- onnx, which need not be installed: a stand-in with what is asked of it --------------------

def graph_of(weights: dict, stride: int) -> SimpleNamespace:
    """A graph as torch's exporter writes it: weights of MatMul turned and nameless."""
    nodes, initializers = [], []

    def node(op_type, name, *arrays, attribute=()):
        first = len(initializers)
        inputs = ["input"] + [f"onnx::{op_type}_{first + i}" for i in range(len(arrays))]
        initializers.extend(SimpleNamespace(name=n, array=np.asarray(a))
                            for n, a in zip(inputs[1:], arrays))
        nodes.append(SimpleNamespace(op_type=op_type, name=name, input=inputs, attribute=attribute))

    for i in (1, 2):
        w, b = (weights[f"encoder.conv{i}.{end}"] for end in ("weight", "bias"))
        strides = SimpleNamespace(name="strides", ints=[stride if i == 1 else 2])
        node("Conv", f"/conv{i}/Conv", w, b, attribute=[strides])
        node("Mul", f"/Mul_{i}", np.float32(0.5))  # of GELU: a number is no weight
    for name, w in weights.items():
        if not name.startswith("encoder.blocks."):
            continue
        *module, end = name.removeprefix("encoder.").split(".")
        path = "/" + ".".join(module[:2]) + "/" + "/".join(module[2:])
        path = path.replace("/mlp/", "/mlp/mlp.")
        if path.endswith("_ln"):
            node(*{"weight": ("Mul", f"{path}/Mul"), "bias": ("Add", f"{path}/Add_1")}[end], w)
        else:
            node(*{"weight": ("MatMul", f"{path}/MatMul"), "bias": ("Add", f"{path}/Add")}[end],
                 w.T.contiguous() if end == "weight" else w)
    book, embed = "/quantizer/rq/model/layers.0/_codebook/", weights["quantizer._codebook.embed"]
    node("Pow", book + "Pow_1", embed.T.contiguous(), np.float32(2))
    node("MatMul", book + "MatMul", embed.T.contiguous())
    node("Reshape", "/Reshape", np.array([1, -1]))
    return SimpleNamespace(graph=SimpleNamespace(node=nodes, initializer=initializers))


@pytest.mark.parametrize("stride", [1, 2])
def test_onnx_holds_the_same_weights(monkeypatch, stride):
    weights = {k: v for k, v in ears()[0].items() if "ln_post" not in k}
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(
        load=lambda path: graph_of(weights, stride),
        numpy_helper=SimpleNamespace(to_array=lambda w: w.array)))
    found, rate = read_onnx("speech_tokenizer_v1.onnx")
    assert rate == 50 // stride and found.keys() == weights.keys()
    assert all(torch.equal(found[k], weights[k]) for k in weights)
    del weights["encoder.blocks.0.attn.out.bias"]
    with pytest.raises(ValueError, match="Missing key.*blocks.0.attn.out.bias"):
        released_s3(read_onnx("x.onnx")[0])


def test_onnx_missing_or_another_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="^x.onnx: to read this, install onnx"):
        read_onnx("x.onnx")

    def load(path):
        raise RuntimeError("Error parsing message\nat byte 0")
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(load=load))
    with pytest.raises(ValueError, match=r"^x.onnx: expected an ONNX graph \(Error parsing mess"):
        read_onnx("x.onnx")
    empty = SimpleNamespace(graph=SimpleNamespace(node=[], initializer=[]))
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(load=lambda path: empty))
    with pytest.raises(ValueError, match="expected S3 v1, found an ONNX graph without"):
        read_onnx("x.onnx")
