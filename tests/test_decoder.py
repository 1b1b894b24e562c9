"""The decoder: Qwen2's own answers, cache and masks, sizes, virtual ids, foreign weights."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decoder import (OSUM, Decoder, DecoderConfig, KVCache, Packed, StaticCache, load_osum,
                     load_qwen2, pack)
from model import check

CFG = DecoderConfig(vocab=50, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, ffn=32,
                    codes=20)
GOLDEN = Path(__file__).parent / "golden" / "qwen2_tiny.safetensors"


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def model():
    model = Decoder(CFG).eval().requires_grad_(False)
    for p in model.parameters():  # not the gentle start of training: every part must matter
        torch.nn.init.normal_(p, std=0.4)
    return model


def qwen2_folder(folder: Path, name: str, shards: int = 1) -> Path:
    """A Hugging Face folder of the golden model `name`, in one file or several."""
    with safe_open(GOLDEN, "pt") as f:
        (folder / "config.json").write_text(f.metadata()[name])
    state = {k.removeprefix(name + "."): v for k, v in load_file(GOLDEN).items()
             if k.startswith((name + ".model.", name + ".lm_head."))}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    home = {k: f"model-{i % shards}.safetensors" for i, k in enumerate(sorted(state))}
    for shard in set(home.values()):
        save_file({k: v for k, v in state.items() if home[k] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return folder


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove weights of a one-file folder; `__` in a name is a dot."""
    state = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        state[name.replace("__", ".")] = value
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name, shards", [("tied", 1), ("tied", 3), ("untied", 3)])
def test_equals_hugging_face_qwen2(tmp_path, name, shards):
    fields, state = load_qwen2(qwen2_folder(tmp_path, name, shards))
    model = Decoder(DecoderConfig(**fields, codes=4)).eval()
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(k.startswith("speech_") for k in left.missing_keys)
    gold = load_file(GOLDEN)
    ids, want = gold[name + ".ids"], gold[name + ".greedy"][0].tolist()
    with torch.inference_mode():
        logits = model.logits(model(model.embed(ids)))
        torch.testing.assert_close(logits, gold[name + ".logits"], atol=1e-4, rtol=0)
        cache, token, said = KVCache(model.cfg, 1, 5 + len(want)), ids[:1, :5], []
        for step in range(len(want)):
            grow = model.decode if step else model.prefill
            token = model.logits(grow(model.embed(token), cache)).argmax(-1)
            said.append(int(token))
    assert said == want


def test_cache_equals_no_cache_wherever_the_prefill_is_cut(model):
    x = torch.randn(2, 9, CFG.dim)
    want = model(x)
    for cut in range(1, 9):
        cache = KVCache(CFG, 2, 9)
        [tensor.fill_(torch.nan) for tensor in cache.k + cache.v]  # what is not filled is not read
        first = model.prefill(x[:, :cut], cache)
        second = model.prefill(x[:, cut:], cache)
        torch.testing.assert_close(first, want[:, cut - 1:cut], atol=1e-5, rtol=0)
        torch.testing.assert_close(second, want[:, -1:], atol=1e-5, rtol=0)
        cache.length = cut  # forget the second stretch, and hear it one by one
        steps = [model.decode(x[:, i:i + 1], cache) for i in range(cut, 9)]
        torch.testing.assert_close(torch.cat(steps, 1), want[:, cut:], atol=1e-5, rtol=0)


def test_rows_that_end_together_are_what_they_are_alone(model):
    sizes, length = [5, 2, 4], 5
    rows = [torch.randn(1, n + 3, CFG.dim) for n in sizes]
    cache = KVCache(CFG, 3, length + 3, pads=torch.tensor([length - n for n in sizes]))
    [tensor.fill_(torch.nan) for tensor in cache.k + cache.v]
    first = torch.cat([F.pad(x[:, :n], (0, 0, length - n, 0)) for x, n in zip(rows, sizes)])
    got = [model.prefill(first, cache)]
    got.append(model.decode(torch.cat([x[:, n:n + 1] for x, n in zip(rows, sizes)]), cache))
    cache.keep([1, 2])
    for i in (1, 2):
        new = torch.cat([x[:, n + i:n + i + 1] for x, n in zip(rows[1:], sizes[1:])])
        got.append(model.decode(new, cache))
    for i, (x, n) in enumerate(zip(rows, sizes)):
        want = model(x)[:, n - 1:]
        own = [step[i - (len(step) == 2)] for step in got[:4 if i else 2]]
        torch.testing.assert_close(torch.stack(own, 1), want[:, :len(own)], atol=1e-5, rtol=0)


def test_compiled_steps_are_the_plain_ones(model):
    """Whole graphs for torch's compiler, one for all positions; a second answer starts anew."""
    model.static = StaticCache(model, 12, "aot_eager")
    torch._dynamo.utils.counters.clear()
    for cut in (3, 6):
        x, cache = torch.randn(1, 9, CFG.dim), model.cache(1, 9)
        assert cache is model.static and cache.length == 0
        got = [model.prefill(x[:, :cut], cache)]
        got += [model.decode(x[:, i:i + 1], cache) for i in range(cut, 9)]
        torch.testing.assert_close(torch.cat(got, 1), model(x)[:, cut - 1:], atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert type(model.cache(2, 9)) is type(model.cache(1, 13)) is KVCache


@pytest.mark.parametrize("make", [lambda model: KVCache(CFG, 1, 4),
                                  lambda model: StaticCache(model, 4, "eager")])
def test_a_full_cache_says_so(model, make):
    cache = make(model)
    model.prefill(torch.randn(1, 4, CFG.dim), cache)
    with pytest.raises(ValueError, match=r"4 \+ 1 positions .* cache of 4"):
        model.decode(torch.randn(1, 1, CFG.dim), cache)
    assert cache.length == 4


def test_a_masked_key_is_as_good_as_removed(model):
    x = torch.randn(2, 10, CFG.dim)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, [0, 4, 5]] = mask[1, [3, 4, 9]] = False  # the same number in each row
    got = model(x, mask=mask)
    want = model(x[mask].view(2, 7, -1))
    torch.testing.assert_close(got[mask].view(2, 7, -1), want, atol=1e-5, rtol=0)
    assert got.isfinite().all()  # also where a position sees no key at all
    ranks = (mask.long().cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(got, model(x, ranks, mask))
    assert (model(x) - got).abs().max() > 1e-2
    every = torch.ones_like(mask)
    torch.testing.assert_close(model(x, mask=every), model(x), atol=1e-5, rtol=0)


def test_gradients_are_finite_where_nothing_is_seen(model):
    mask = torch.tensor([[False, False, True, True]])
    x = torch.randn(1, 4, CFG.dim, requires_grad=True)
    model(x, mask=mask)[mask].square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[~mask].any() and x.grad[mask].any()


def test_right_pads_change_nothing(model):
    x = torch.randn(2, 12, CFG.dim)
    torch.testing.assert_close(model(x)[:, :7], model(x[:, :7]), atol=1e-5, rtol=0)
    loud = torch.cat([x[:, :7], torch.full((2, 5, CFG.dim), 1e3)], 1)
    torch.testing.assert_close(model(loud)[:, :7], model(x[:, :7]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_packed_is_the_same_model(model, dtype, far):
    plain = copy.deepcopy(model).to(dtype)
    state = copy.deepcopy(plain.state_dict())
    packed = pack(copy.deepcopy(plain))
    assert type(packed.layers[0].mlp.gate_up) is type(packed.speech_head) is Packed
    found = packed.state_dict()
    assert torch.equal(found.pop("lm_head.weight"), state["embed_tokens.weight"])
    assert found.keys() == state.keys() and all(torch.equal(w, found[k]) for k, w in state.items())
    ids, cache = torch.arange(9)[None], KVCache(CFG, 1, 9, dtype)
    want, got = (n.logits(n(n.embed(ids)), "joint") for n in (plain, packed))
    torch.testing.assert_close(got, want, atol=far, rtol=far)
    steps = [packed.logits(packed.decode(packed.embed(ids[:, i:i + 1]), cache), "joint")
             for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), want, atol=far, rtol=far)


@pytest.mark.parametrize("tied", [True, False])
def test_8_bits_are_nearly_the_same_model(tied):
    cfg = replace(CFG, dim=64, ffn=70, head_dim=16, tied=tied)
    model = Decoder(cfg).eval().requires_grad_(False)
    other = copy.deepcopy(model)
    other.to_int8()
    pack(other)
    linear, layer = model.layers[0].mlp.gate_up, other.layers[0].mlp.gate_up
    assert layer.weight.dtype == torch.int8 and other.lm_head.weight.dtype == torch.int8
    step = linear.weight.abs().amax(1, keepdim=True) / 127  # rounded to the nearest, row by row
    assert ((layer.weight * layer.scale[:, None] - linear.weight).abs() <= 0.501 * step).all()
    x = torch.randn(2, 3, cfg.dim)
    torch.testing.assert_close(layer(x), linear(x), atol=0.03 * float(linear(x).std()), rtol=0.01)
    assert isinstance(other.layers[0].mlp.down_proj, torch.nn.Linear)  # 70 wide: the kernel can't
    ids, cache = torch.arange(9)[None], KVCache(cfg, 1, 9)
    want, got = (n.logits(n(n.embed(ids)), "joint") for n in (model, other))
    assert 0 < (want - got).std() < 0.03 * want.std()
    steps = [other.logits(other.decode(other.embed(ids[:, i:i + 1]), cache), "joint")
             for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), got, atol=0.02, rtol=0.02)  # x is bf16 inside


def test_only_distances_count(model):
    x = torch.randn(1, 6, CFG.dim)
    far = model(x, torch.arange(100, 106))
    torch.testing.assert_close(far, model(x), atol=1e-4, rtol=0)
    assert (model(x, 2 * torch.arange(6)[None]) - model(x)).abs().max() > 1e-2


def test_virtual_ids(model):
    ids = torch.tensor([[3, 50, 50 + 22, -1, 49]])
    rows = model.embed(ids)[0]
    text, speech = model.embed_tokens.weight, model.speech_embed.weight
    want = torch.stack([text[3], speech[0], speech[22], torch.zeros(CFG.dim), text[49]])
    assert torch.equal(rows, want)
    with pytest.raises(IndexError):
        model.embed(torch.tensor([[50 + 23]]))


def test_heads(model):
    hidden = torch.randn(2, 3, CFG.dim)
    text, speech, joint = (model.logits(hidden, head) for head in ("text", "speech", "joint"))
    assert joint.shape == (2, 3, 50 + 21) and torch.equal(joint, torch.cat([text, speech], -1))
    assert torch.equal(text, hidden @ model.embed_tokens.weight.T)  # tied
    assert torch.equal(speech, model.speech_head(hidden))


def test_sizes():
    size = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device("meta"):
        big = Decoder(DecoderConfig(151936, 2048, 36, 16, 2, 128, 11008, codes=4096))
        half = Decoder(DecoderConfig(151936, 896, 24, 14, 2, 64, 4864, codes=4096))
    speech = size(big.speech_embed), size(big.speech_head)
    assert speech == (4099 * 2048, 4097 * 2049)  # 8.39 M each
    assert size(big) - sum(speech) == 3_085_938_688
    assert size(half) - size(half.speech_embed) - size(half.speech_head) == 494_032_768
    assert size(Decoder(DecoderConfig())) == 9_516_097


def test_state_dict_has_hugging_face_names(model, tmp_path):
    state = model.state_dict()
    assert state["layers.1.self_attn.k_proj.weight"].shape == (12, 24)
    assert "layers.0.mlp.up_proj.weight" in state and "lm_head.weight" not in state
    assert not any("qkv" in k or "gate_up" in k for k in state)
    save_file(state, tmp_path / "w.safetensors")  # parts of a fused weight are written apart
    other = copy.deepcopy(Decoder(CFG))
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    x = torch.randn(1, 5, CFG.dim)
    assert torch.equal(other.eval()(x), model(x))
    del state["layers.0.self_attn.v_proj.bias"]
    with pytest.raises(RuntimeError, match="qkv.bias"):
        other.load_state_dict(state)


def test_bfloat16_follows_float32(model):
    x = torch.randn(1, 6, CFG.dim)
    want, low = model(x), copy.deepcopy(model).bfloat16()
    cache = KVCache(CFG, 1, 6, torch.bfloat16)
    low.prefill(x[:, :5].bfloat16(), cache)
    got = low.decode(x[:, 5:].bfloat16(), cache)
    assert got.dtype == torch.bfloat16 and F.cosine_similarity(got.float(), want[:, -1:], -1) > .99


def test_overfits_one_batch():
    model = Decoder(CFG)
    ids = torch.randint(50 + 21, (4, 16))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        logits = model.logits(model(model.embed(ids[:, :-1])), "joint")
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3


def test_a_tied_folder_may_repeat_the_table(tmp_path):
    folder = qwen2_folder(tmp_path, "tied")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=table.clone())
    assert "lm_head.weight" not in load_qwen2(folder)[1]
    rewrite(folder, lm_head__weight=table + 1)
    with pytest.raises(ValueError, match="differs .* embed_tokens.weight"):
        load_qwen2(folder)


@pytest.mark.parametrize("change, names", [
    ({"model__layers__1__mlp__up_proj__weight": None}, "layers.1.mlp.up_proj.weight missing"),
    ({"lm_head__weight": None}, "lm_head.weight missing"),
    ({"model__norm__weight": torch.ones(17)}, r"norm.weight is \(17,\), expected \(16,\)"),
    ({"model__layers__2__mlp__up_proj__weight": torch.ones(3)}, "layers.2.mlp.up_proj.weight"),
    ({"visual__proj": torch.ones(3)}, "visual.proj: no such weight"),
    ({"model__norm__weight": torch.ones(16, dtype=torch.int8)}, "norm.weight is torch.int8, exp"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, names):
    folder = qwen2_folder(tmp_path, "untied")
    rewrite(folder, **change)
    with pytest.raises(ValueError, match=names):
        fields, state = load_qwen2(folder)
        own = Decoder(DecoderConfig(**fields))
        speech = {k: v for k, v in own.state_dict().items() if k.startswith("speech_")}
        check(own, state | speech, "a folder")


@pytest.mark.parametrize("change, told", [
    ({"model_type": "llama"}, "expected model_type 'qwen2', found 'llama'"),
    ({"hidden_act": "gelu"}, "expected hidden_act 'silu', found 'gelu'"),
    ({"use_sliding_window": True}, "expected use_sliding_window False, found True"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type 'default', found"),
])
def test_other_architectures_are_refused(tmp_path, change, told):
    config = qwen2_folder(tmp_path, "tied") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        load_qwen2(tmp_path)


HTML = b"<!DOCTYPE html><html>not found</html>"


@pytest.mark.parametrize("name, content, told", [
    ("config.json", None, "config of a Hugging Face Qwen2 model, found none"),
    ("config.json", HTML, r"found 37 bytes that begin with b'<!DOCTYPE html>"),
    ("config.json", b'{"model_type": "qwen2"}', "expected 'vocab_size', found none"),
    ("model.safetensors.index.json", HTML, "index of a sharded model, found 37 bytes"),
    ("model.safetensors.index.json", b"{}", "index of a sharded model, found 2 bytes"),
    ("model-1.safetensors", None, "expected a whole safetensors file, found none"),
    ("model-1.safetensors", HTML, r"safetensors file, found 37 bytes .* b'<!DOCTYPE html>"),
    ("model-1.safetensors", 0, "expected a whole safetensors file, found 0 bytes"),
    ("model-1.safetensors", 900, "expected a whole safetensors file, found 900 bytes"),
    ("model-1.safetensors", -1, r"expected a whole safetensors file, found [\d,]+ bytes"),
])
def test_files_that_are_not_what_they_are_called(tmp_path, name, content, told):
    path = qwen2_folder(tmp_path, "tied", 3) / name
    if content is None:
        path.unlink()
    else:  # a number: cut there
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=told) as error:
        load_qwen2(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_config_of_transformers_4(tmp_path):
    config = qwen2_folder(tmp_path, "tied") / "config.json"
    old = json.loads(config.read_text()) | {"rope_theta": 5e5, "rope_scaling": None}
    del old["rope_parameters"]
    config.write_text(json.dumps(old))
    assert load_qwen2(tmp_path)[0]["rope_theta"] == 5e5


def test_released_names(model):
    own, state = model.state_dict(), {}
    for name, value in own.items():
        whole = not name.startswith("speech_")
        state[{"speech_embed.weight": "speech_token_emded.weight"}.get(
            name, "llama_model.model." * whole + name)] = value
    table = own["embed_tokens.weight"]
    aliases = {"embed_tokens.weight": table, "lm_head.weight": table,
               "llama_model.lm_head.weight": table,
               "llama_model.speech_head.bias": own["speech_head.bias"].clone()}
    got = load_osum(state | aliases)
    assert got.keys() == own.keys() and all(torch.equal(got[k], own[k]) for k in own)
    assert all(k.startswith(tuple(OSUM)) for k in state | aliases)
    with pytest.raises(ValueError, match="^lm_head.weight: differs"):
        load_osum(state | {"lm_head.weight": table + 1})
