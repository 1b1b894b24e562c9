"""The adapter: lengths, padding, causality of the convolutions, sizes, released weights."""

import re

import pytest
import torch

from adapter import Adapter, AdapterConfig, load_osum, out_length, positions
from model import BadCheckpoint, fit

CFG = AdapterConfig(d_in=16, d_out=12, n_heads=2, n_layers=2, ffn=24)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_lengths():
    assert [out_length(n) for n in (0, 1, 4, 5, 50, 51, 1500)] == [0, 1, 1, 2, 13, 13, 375]
    assert out_length(torch.tensor([7, 8, 9])).tolist() == [2, 2, 3]


def test_a_batch_gives_every_sample_what_it_gets_alone():
    model = Adapter(CFG).eval()
    lengths = [23, 40, 1, 38, 5]
    rows = [torch.randn(n, 16) for n in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7.0)
    y, out = model(batch, torch.tensor(lengths))
    assert y.shape == (5, 10, 12) and out.tolist() == [6, 10, 1, 10, 2]
    for row, z, n in zip(rows, y, out):
        alone, _ = model(row[None], torch.tensor([len(row)]))
        assert alone.shape == (1, n, 12) and torch.allclose(alone[0], z[:n], atol=1e-5)


def test_convolutions_see_only_the_past():
    model = Adapter(AdapterConfig(d_in=16, d_out=12, n_heads=2, n_layers=0, ffn=24)).eval()
    x = torch.randn(1, 40, 16)
    later = torch.cat([x[:, :21], torch.randn(1, 19, 16)], dim=1)
    a, b = (model(v, torch.tensor([40]))[0] for v in (x, later))
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


def test_positions_alternate():
    table = positions(10, 6, torch.device("cpu"))
    assert torch.allclose(table[3, 2], torch.tensor(3 / 10000 ** (2 / 6)).sin())
    assert torch.allclose(table[3, 5], torch.tensor(3 / 10000 ** (4 / 6)).cos())


def test_dropout_is_for_training_only():
    model, x, n = Adapter(CFG), torch.randn(1, 20, 16), torch.tensor([20])
    assert not torch.equal(model(x, n)[0], model(x, n)[0])
    model.eval()
    assert torch.equal(model(x, n)[0], model(x, n)[0])


def test_the_papers_adapter_has_its_size():
    with torch.device("meta"):
        model = Adapter(AdapterConfig(1024, 2048, 4, 4, 2560))
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert size["convs"] == 9_440_256 and size["proj"] == 2_099_200
    assert sum(size.values()) - size["convs"] - size["proj"] == 38_849_536


RELEASED = {  # ours -> theirs, written out independently of the loader's table
    "convs.0": "down_sample_2.conv.1", "convs.1": "down_sample_2.conv.4",
    "convs.2": "down_sample_2.conv.7", "embed_ln": "speech_transformer.embed.out.1",
    "embed.": "speech_transformer.embed.out.0.", "blocks": "speech_transformer.encoders",
    "after_norm": "speech_transformer.after_norm", "proj": "speech_llama_proj",
    "attn.query": "self_attn.linear_q", "attn.key": "self_attn.linear_k", "attn_ln": "norm1",
    "attn.value": "self_attn.linear_v", "attn.out": "self_attn.linear_out", "mlp_ln": "norm2",
    "mlp.0": "feed_forward.w_1", "mlp.3": "feed_forward.w_2",
}


def released() -> tuple[dict, dict]:
    """Our weights, and the same as the released file holds them."""
    own = Adapter(CFG).state_dict()
    part = r"(?<!\w)(" + "|".join(map(re.escape, RELEASED)) + ")"
    theirs = {re.sub(part, lambda m: RELEASED[m[1]], name): v for name, v in own.items()}
    theirs |= {"ln_speech.weight": torch.ones(16), "ln_speech.bias": torch.ones(16),
               "speech_transformer.embed.pos_enc.pe": torch.zeros(1, 5000, 16)}
    return own, theirs


def test_released_weights():
    own, theirs = released()
    assert "speech_transformer.encoders.1.self_attn.linear_k.bias" in theirs
    loaded = load_osum(theirs)
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_a_bad_key_is_named():
    _, theirs = released()
    key = "speech_transformer.encoders.0.norm2.bias"
    for bad, message in (
            ({**theirs, "speech_transformer.extra.bias": torch.ones(1)}, "extra.bias unexpected"),
            ({**theirs, key: torch.ones(3)}, r"blocks.0.mlp_ln.bias is \(3,\), expected \(16,\)"),
            ({k: v for k, v in theirs.items() if k != key}, "blocks.0.mlp_ln.bias missing"),
            ({}, "missing")):
        with pytest.raises(BadCheckpoint, match=message):
            fit(Adapter(CFG), load_osum(bad), "file.pt")


def test_heads_begin_by_looking_at_their_neighbours():
    """Frames with nothing in them but where they are: each head sees the frame it should."""
    cfg = AdapterConfig(d_in=64, d_out=16, n_heads=4, n_layers=2, ffn=24)
    adapter, where = Adapter(cfg), positions(24, 64, torch.device("cpu"))
    for depth, block in enumerate(adapter.blocks):
        q, k = (f(where).view(24, 4, 16).transpose(0, 1) for f in (block.attn.query, block.attn.key))
        looks = (q @ k.transpose(1, 2)).argmax(-1) - torch.arange(24)  # (H, L)
        for head, shift in enumerate((-1, 1, -depth - 2, depth + 2)):
            assert (looks[head, 6:18] == shift).all()
