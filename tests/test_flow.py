"""The flow: streaming against one-shot, batch against single, training, odd input, CosyVoice 1."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flow
from flow import Flow, FlowConfig, attend, load_cosyvoice1, noise
from model import BadCheckpoint, Token2Wav, check, paper
from vocoder import VocoderConfig

CAUSAL = FlowConfig(codes=12, mel=4, spk_dim=6, dim=8, enc_heads=2, enc_ffn=16, look_ahead=1,
                    channels=(16,), mid=1, heads=2, head_dim=8, time_dim=16, chunk=8, left_chunks=2)
FULL = FlowConfig(codes=50, spk_dim=12, dim=32, enc_heads=2, enc_ffn=48, look_ahead=0,
                  channels=(16, 16), mid=2, heads=2, head_dim=8, time_dim=64, causal=False, chunk=0,
                  left_chunks=0, frames_per_code=22050 / 256 / 25, mel_mean=0.0, mel_std=1.0,
                  spread=0.0)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(cfg: FlowConfig) -> Flow:
    """A flow whose last layer, born zero, says something."""
    model = Flow(cfg).eval()
    torch.nn.init.normal_(model.estimator.final.weight, std=0.2)
    return model


def inputs(cfg: FlowConfig, codes: int, prompt: int = 0):
    """codes, spk, prompt_codes, prompt_mel"""
    c = torch.randint(0, cfg.codes, (1, codes + prompt))
    mel = torch.randn(1, cfg.frames(prompt), cfg.mel) + cfg.mel_mean
    return c[:, prompt:], torch.randn(1, cfg.spk_dim), c[:, :prompt], mel


def streamed(model: Flow, codes, state, sizes):
    pieces, start = [], 0
    for i, n in enumerate(sizes):
        mel, state = model.stream(codes[:, start:start + n], state, i == len(sizes) - 1)
        pieces.append(mel)
        start += n
    assert start == codes.shape[1]
    return torch.cat(pieces, 1), [p.shape[1] for p in pieces]


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [0, 1, 7])
@pytest.mark.parametrize("cfg", [CAUSAL, replace(CAUSAL, look_ahead=0), replace(CAUSAL, chunk=16)])
def test_streaming_is_one_shot(cfg, prompt):
    model = build(cfg)
    codes, spk, *voice = inputs(cfg, 21, prompt)
    whole = model.generate(codes, spk, *voice, steps=2)
    assert whole.shape == (1, 84, cfg.mel)
    for sizes in ([21], [1] * 21, [2, 0, 9, 3, 7], [18, 3], [21, 0]):
        state = model.start(spk, *voice, steps=2)
        mel, _ = streamed(model, codes, state, sizes)
        torch.testing.assert_close(mel, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cfg", [CAUSAL, FULL])
def test_a_u_net_in_bf16_loses_what_its_layers_round_away(cfg):
    model = build(cfg)
    codes, spk, *voice = inputs(cfg, 20, 7)
    want = model.generate(codes, spk, *voice)
    model.estimator.bfloat16()
    got = model.generate(codes, spk, *voice)
    assert got.dtype == torch.float32 and 0 < (got - want).std() < 0.03 * want.std()
    pieces, _ = streamed(model, codes, model.start(spk, *voice), [13, 7])
    assert pieces.shape == got.shape and (not cfg.causal or torch.dist(pieces, got) < 0.03
                                          * torch.dist(got, got.mean()))


@pytest.mark.parametrize("frames", [1, 90, 1030])  # the last by torch's own
def test_attention_in_bf16_follows_float32(frames):
    q, k, v = torch.randn(3, 2, 3, frames, 16)
    want = attend(q, k, v, None)
    torch.testing.assert_close(want, (q @ k.mT / 4).softmax(-1) @ v, atol=1e-5, rtol=1e-4)
    got = attend(*(x.bfloat16() for x in (q, k, v)), None)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)


def test_one_shot_is_what_training_sees():
    """The masks of training and the tapes of streaming are two ways to say the same."""
    model = build(CAUSAL)
    codes, spk, *_ = inputs(CAUSAL, 37)
    with torch.no_grad():
        mu = model.mean(codes, torch.tensor([37]), torch.tensor([148]))
        state = model.start(spk, steps=3)
        z = noise(0, 0, 148, CAUSAL.mel)
        whole = model.denormalise(model.solve(z, mu, state, 0, 0, [None] * 3))
    torch.testing.assert_close(model.generate(codes, spk, steps=3), whole, atol=1e-4, rtol=0)


def test_mel_leaves_as_soon_as_it_is_certain():
    model = build(CAUSAL)  # 2 codes a chunk, 1 ahead
    codes, spk, *_ = inputs(CAUSAL, 6)
    assert streamed(model, codes, model.start(spk, steps=1), [1] * 6)[1] == [0, 0, 8, 0, 8, 8]
    mini = FlowConfig()
    assert mini.chunk_codes + mini.look_ahead <= 18


def test_a_later_code_does_not_change_earlier_mel():
    model = build(CAUSAL)
    codes, spk, *_ = inputs(CAUSAL, 12)
    other = codes.clone()
    other[0, 7:] = (codes[0, 7:] + 1) % 12
    a, b = (model.generate(c, spk, steps=2) for c in (codes, other))
    assert torch.equal(a[:, :24], b[:, :24]) and not torch.allclose(a[:, 24:32], b[:, 24:32])


def test_memory_does_not_grow_and_states_are_not_used_up():
    model = build(CAUSAL)
    codes, spk, *voice = inputs(CAUSAL, 80, 4)
    begin = state = model.start(spk, *voice, steps=2)
    sizes = []
    for i in range(0, 80, 2):
        _, state = model.stream(codes[:, i:i + 2], state, False)
        sizes.append(sum(t.untyped_storage().nbytes() for tape in [state.encoder, *state.solver]
                         for t in tape) + state.codes.numel())
    assert len(set(sizes[5:])) == 1
    a, b = (model.stream(codes[:, :9], begin, True)[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("prompt", [0, 7, 150])  # the last is longer than the reply
@pytest.mark.parametrize("rate", [25, 50])
def test_full_context_streams_by_windows(prompt, rate):
    """In windows set by what was said, not by how it came; in sum as long as at once and near it:
    within 0.4 of the mel's deviation on average, where with other noise it is 1."""
    cfg = replace(FULL, frames_per_code=22050 / 256 / rate)
    model = build(cfg)
    codes, spk, *voice = inputs(cfg, 131, prompt)
    whole, other = (model.generate(codes, spk, *voice, steps=2, seed=s) for s in (0, 1))
    state = model.start(spk, *voice, steps=2)
    mel, lengths = streamed(model, codes, state, [1] * 131)
    left = [i for i, n in enumerate(lengths) if n]
    # 12 codes and 6 ahead, 12 and 6, 24 and 12, 48 and 20, the rest
    assert left == [17, 29, 59, 115, 130] and mel.shape == whole.shape
    assert [lengths[i] for i in left[:4]] == [
        cfg.frames(b) - cfg.frames(a) for a, b in ((0, 12), (12, 24), (24, 48), (48, 96))]
    for sizes in ([18] * 7 + [5], [131, 0], [40, 91]):
        assert torch.equal(streamed(model, codes, state, sizes)[0], mel)
    near, far = ((x - whole).abs().mean() / whole.std() for x in (mel, other))
    assert near < 0.4 and far > 0.9


def test_a_window_fades_into_the_next(monkeypatch):
    """Windows that make of every frame the number of the window: no step where they meet."""
    model, count = build(FULL), iter(range(9))
    monkeypatch.setattr(model, "solve", lambda z, *_: torch.full_like(z, next(count)))
    codes, spk, *voice = inputs(FULL, 96 + 20, 3)
    state = model.start(spk, *voice)
    mel, state = model.stream(codes, state, False)  # windows 0, 1, 2, 3
    mel, steps = mel[0, :, 0], mel[0, :, 0].diff()
    assert mel[0] == 0 and mel[-1] == 3 and 0 <= steps.min() <= steps.max() < 0.06
    assert state.tail.shape[1] == FULL.frames(116) - FULL.frames(96) and len(mel) == 330


def test_a_frame_has_the_same_noise_in_every_window(monkeypatch):
    model = build(FULL)
    monkeypatch.setattr(model, "solve", lambda z, *_: z)
    codes, spk, *voice = inputs(FULL, 200, 30)
    state = model.start(spk, *voice, seed=5)
    mel, _ = streamed(model, codes, state, [18] * 11 + [2])
    known, total = voice[1].shape[1], FULL.frames(200)
    torch.testing.assert_close(mel, noise(5, known, known + total, 80), atol=1e-6, rtol=0)


def test_the_wave_of_windows_has_no_clicks():
    """Window by window the wave is what HiFT makes of the whole mel, so no seam can be told from
    its neighbourhood; the first audio comes after 18 codes."""
    cfg = paper()
    cfg.flow = FULL
    cfg.vocoder = VocoderConfig("hift", 22050, hop=256, channels=8, rates=(8, 8), kernels=(16, 16))
    codes, spk, prompt, mel = inputs(FULL, 130, 9)
    voice = Token2Wav(cfg, {"spk": spk, "prompt_codes": prompt, "prompt_mel": mel}).eval()
    voice.flow, said = build(FULL), codes[0].tolist()
    voice.vocoder.f0_predictor.classifier.bias.data += 150
    begin = state = voice.start(steps=1)
    pieces = []
    for i in range(0, 130, 18):
        wave, state = voice.stream(said[i:i + 18], state, i + 18 >= 130)
        pieces.append(wave)
    assert len(pieces[0]) == (FULL.frames(12) - 20) * 256
    wave, whole = torch.cat(pieces), voice.stream(said, begin, True)[0]
    assert wave.shape == whole.shape == (FULL.frames(130) * 256,) and wave.std() > 1e-3
    mel, _ = streamed(voice.flow, codes, begin[0], [130, 0])
    torch.testing.assert_close(wave, voice.vocoder(mel)[0], atol=1e-5, rtol=0)
    steps, seams = wave.diff().abs(), torch.tensor([len(p) for p in pieces[:-1] if len(p)])
    assert steps[seams.cumsum(0) - 1].max() < 3 * steps.mean()


def test_windows_take_no_more_memory_and_are_all_there_is():
    """1,000 codes; and a reply that ends before its first window is as at once."""
    model = build(replace(FULL, mid=1))
    codes, spk, *voice = inputs(FULL, 1000, 5)
    begin = state = model.start(spk, *voice, steps=1)
    held, frames = [], 0
    for i in range(0, 1000, 50):
        mel, state = model.stream(codes[:, i:i + 50], state, False)
        frames += mel.shape[1]
        held.append(sum(t.untyped_storage().nbytes() for t in vars(state).values()
                        if isinstance(t, torch.Tensor)))
    assert max(held[10:]) <= max(held[:10]) < 100_000
    assert frames + model.stream(codes[:, :0], state, True)[0].shape[1] == FULL.frames(1000)
    for sizes in ([0], [1], [2], [17], [9, 0, 8]):
        mel, _ = streamed(model, codes[:, :sum(sizes)], begin, sizes)
        assert torch.equal(mel, model.generate(codes[:, :sum(sizes)], spk, *voice, steps=1))


# ---- batches, training ---------------------------------------------------------------------------


def test_padded_batch_is_single():
    model, lengths = build(CAUSAL), [20, 3, 9]
    codes = torch.randint(0, CAUSAL.codes, (3, 20))
    frames = [CAUSAL.frames(n) for n in lengths]
    x, cond = torch.randn(2, 3, frames[0], CAUSAL.mel)
    spk, t = torch.randn(3, CAUSAL.mel), torch.rand(3)
    with torch.no_grad():
        total = torch.tensor(frames)
        mu = model.mean(codes, torch.tensor(lengths), total)
        v = model.estimator(x, mu, spk, cond, t, flow.real_frames(total, frames[0]))
        for i, (n, f) in enumerate(zip(lengths, frames)):
            one = slice(i, i + 1)
            alone = model.mean(codes[one, :n], torch.tensor([n]), torch.tensor([f]))
            torch.testing.assert_close(mu[one, :f], alone, atol=1e-5, rtol=0)
            alone = model.estimator(x[one, :f], alone, spk[one], cond[one, :f], t[one])
            torch.testing.assert_close(v[one, :f], alone, atol=1e-4, rtol=0)


def test_padding_leaves_loss_and_gradients_alone():
    model, lengths = build(CAUSAL), torch.tensor([30, 1])  # chunks of pads only
    codes = torch.randint(0, CAUSAL.codes, (2, 30))
    mel = torch.randn(2, CAUSAL.frames(30), CAUSAL.mel)
    losses = []
    for fill in (0, 100):
        codes[1, 1:], mel[1, CAUSAL.frames(1):] = fill, fill  # 100 is no code: pads are not read
        torch.manual_seed(1)
        guess, loss = model(codes, lengths, mel, torch.randn(2, CAUSAL.spk_dim))
        losses.append(loss)
    loss.backward()
    assert losses[0] == losses[1] and guess.shape == mel.shape
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_full_context_trains_on_clips_of_one_length():
    model = build(FULL)
    codes, mel = torch.randint(0, FULL.codes, (2, 9)), torch.randn(2, FULL.frames(9), FULL.mel)
    _, loss = model(codes, torch.tensor([9, 9]), mel, torch.randn(2, FULL.spk_dim))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="of one length"):
        model(codes, torch.tensor([9, 8]), mel, torch.randn(2, FULL.spk_dim))


def test_conditions_are_dropped_and_prompts_shown(monkeypatch):
    model, seen = build(CAUSAL), {}
    monkeypatch.setattr(model.estimator, "forward", lambda x, mu, spk, cond, t, valid: (
        seen.update(mu=mu, spk=spk, cond=cond, t=t) or x))
    b, mel = 1000, torch.randn(1000, 40, 4)
    model(torch.randint(0, 12, (b, 10)), torch.full((b,), 10), mel, torch.randn(b, 6))
    dropped = (seen["mu"] == 0).all(-1).all(-1)
    assert 0.15 < dropped.float().mean() < 0.25
    assert torch.equal(dropped, (seen["spk"] == 0).all(-1)) and not seen["cond"][dropped].any()
    shown = (seen["cond"] != 0).all(-1)[~dropped]  # (B, T)
    known = shown.sum(1)
    assert torch.equal(shown, torch.arange(40) < known[:, None]), "a prompt is the beginning"
    assert torch.equal(seen["cond"][~dropped][shown], model.normalise(mel)[~dropped][shown])
    assert 10 <= known.max() <= 12 and 0.45 < (known == 0).float().mean() < 0.65
    assert 0.45 < seen["t"].mean() < 0.55


def test_one_batch_is_learned():
    model = Flow(replace(CAUSAL, channels=(96,), dim=32, head_dim=32, time_dim=64))
    codes, spk = torch.tensor([[3, 1, 4, 7, 5, 9]]), torch.randn(1, 6)
    mel = torch.randn(1, 6, 4).repeat_interleave(4, 1) * 2 - 5  # each code has its own sound
    batch = codes.repeat(16, 1), torch.full((16,), 6), mel.repeat(16, 1, 1), spk.repeat(16, 1)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        _, loss = model(*batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    error = (model.generate(codes, spk, cfg=0.0) - mel).square().mean()
    assert error < 0.7 * mel.var()


# ---- generation ----------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_frame():
    whole = noise(3, 0, 200, 4)
    assert whole.shape == (1, 200, 4) and abs(whole.std() - 1) < 0.1
    for a, b in ((0, 1), (63, 65), (64, 128), (100, 200)):
        assert torch.equal(noise(3, a, b, 4), whole[:, a:b])
    assert not torch.equal(noise(4, 0, 200, 4), whole)


@pytest.mark.parametrize("cfg", [CAUSAL, FULL])
def test_seed_decides(cfg):
    model = build(cfg)
    codes, spk, *voice = inputs(cfg, 5, 3)
    a, b, c = (model.generate(codes, spk, *voice, steps=2, seed=s) for s in (7, 7, 2**62))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(a, model.generate(codes, spk, *voice, steps=2, seed=7))


def test_guidance_extrapolates(monkeypatch):
    """One Euler step: x1 = noise + (1 + w) v_cond - w v_free is linear in w."""
    model = build(CAUSAL)
    codes, spk, *_ = inputs(CAUSAL, 4)
    a, b, c = (model.generate(codes, spk, steps=1, cfg=w) for w in (0.0, 0.5, 1.0))
    assert not torch.allclose(a, c)
    torch.testing.assert_close(b - a, c - b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cfg", [CAUSAL, FULL])
def test_odd_inputs(cfg):
    model = build(cfg)
    for prompt in (0, 3):
        for n in (0, 1, 2):
            codes, spk, *voice = inputs(cfg, n, prompt)
            mel = model.generate(codes, spk, *voice, steps=1)
            assert mel.shape == (1, cfg.frames(n), cfg.mel) and mel.isfinite().all()
    for bad in (-1, cfg.codes):
        with pytest.raises(ValueError, match=str(bad)):
            model.generate(torch.tensor([[0, bad]]), spk)
        with pytest.raises(ValueError, match=str(bad)):
            model(torch.tensor([[bad]]), torch.tensor([1]), torch.randn(1, 4, cfg.mel), spk)
    with pytest.raises(ValueError, match="prompt"):
        model.start(spk, torch.zeros(1, 9, dtype=torch.long), torch.randn(1, 20, cfg.mel))
    with pytest.raises(ValueError, match="prompt"):
        model.start(spk, prompt_mel=torch.randn(1, 20, cfg.mel))
    with pytest.raises(ValueError, match="frames"):
        model(torch.tensor([[0, 1]]), torch.tensor([2]), torch.randn(1, 5, cfg.mel), spk)


# ---- CosyVoice 1 ---------------------------------------------------------------------------------


def released() -> dict[str, torch.Tensor]:
    """Names and shapes of a released flow.pt, without its numbers."""
    shapes = {}

    def add(name, *shape, bias=True):
        shapes[name + ".weight"] = shape
        if bias:
            shapes[name + ".bias"] = shape[:1]

    def stage(name, d_in):
        add(name + ".0.mlp.1", 256, 1024)
        for block, d in (("block1", d_in), ("block2", 256)):
            add(f"{name}.0.{block}.block.0", 256, d, 3)
            add(f"{name}.0.{block}.block.1", 256)
        add(name + ".0.res_conv", 256, d_in, 1)
        for layer in (f"{name}.1.{i}." for i in range(4)):
            add(layer + "norm1", 256), add(layer + "norm3", 256)
            for part in "qkv":
                add(layer + "attn1.to_" + part, 512, 256, bias=False)
            add(layer + "attn1.to_out.0", 256, 512)
            add(layer + "ff.net.0.proj", 1024, 256), add(layer + "ff.net.2", 256, 1024)

    add("input_embedding", 4096, 512, bias=False)
    add("spk_embed_affine_layer", 80, 192), add("encoder_proj", 80, 512)
    add("encoder.embed.out.0", 512, 512), add("encoder.embed.out.1", 512)
    add("encoder.after_norm", 512)
    for layer in (f"encoder.encoders.{i}." for i in range(6)):
        for part in ("q", "k", "v", "out"):
            add(f"{layer}self_attn.linear_{part}", 512, 512)
        add(layer + "self_attn.linear_pos", 512, 512, bias=False)
        shapes |= {layer + "self_attn.pos_bias_" + part: (8, 64) for part in "uv"}
        add(layer + "feed_forward.w_1", 2048, 512), add(layer + "feed_forward.w_2", 512, 2048)
        add(layer + "norm_mha", 512), add(layer + "norm_ff", 512)
    for i in range(4):
        add(f"length_regulator.model.{3 * i}", 80, 80, 3)
        add(f"length_regulator.model.{3 * i + 1}", 80)
    add("length_regulator.model.12", 80, 80, 1)
    unet = "decoder.estimator."
    add(unet + "time_mlp.linear_1", 1024, 320), add(unet + "time_mlp.linear_2", 1024, 1024)
    for name, d_in in [("down_blocks.0", 320), ("down_blocks.1", 256), ("up_blocks.0", 512),
                       ("up_blocks.1", 512)] + [(f"mid_blocks.{i}", 256) for i in range(12)]:
        stage(unet + name, d_in)
    add(unet + "down_blocks.0.2.conv", 256, 256, 3), add(unet + "down_blocks.1.2", 256, 256, 3)
    add(unet + "up_blocks.0.2.conv", 256, 256, 4), add(unet + "up_blocks.1.2", 256, 256, 3)
    add(unet + "final_block.block.0", 256, 256, 3), add(unet + "final_block.block.1", 256)
    add(unet + "final_proj", 80, 256, 1)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_released_names():
    weights = released()
    assert len(weights) == 1185 and sum(w.numel() for w in weights.values()) == 104_874_752
    with torch.device("meta"):
        model = Flow(FlowConfig.cosyvoice1())
    model.load_state_dict(load_cosyvoice1(weights), assign=True)
    key = "decoder.estimator.mid_blocks.11.0.mlp.1.weight"
    with pytest.raises(BadCheckpoint, match="estimator.mid.11.time.weight is"):
        check(model, load_cosyvoice1(weights | {key: weights[key][:, :1]}), "flow.pt")
    with pytest.raises(ValueError, match="embed.weight: twice in this file"):
        load_cosyvoice1(weights | {"embed.weight": weights[key]})
    del weights[key]
    with pytest.raises(BadCheckpoint, match="estimator.mid.11.time.weight missing"):
        check(model, load_cosyvoice1(weights), "flow.pt")


def test_base_velocity_is_exact_for_a_gaussian_mel():
    """Euler along base() alone, in many steps, turns noise into N(mu, spread^2)."""
    estimator, steps = Flow(CAUSAL).estimator, 400
    mu, x = torch.full((1, 500, 4), 1.5), noise(3, 0, 500, 4)
    for i in range(steps):
        x = x + estimator.base(x, mu, torch.full((1, 1, 1), i / steps)) / steps
    assert abs(float(x.mean()) - 1.5) < 0.02
    assert abs(float(x.std()) - CAUSAL.spread) < 0.02


def test_against_the_released_code():
    """The mel the released implementation (CosyVoice, MaskedDiffWithXvec) makes at this size from
    these weights, this noise, a prompt, and a reply long enough to be stretched in three parts."""
    model = Flow(FULL).eval()
    weights = {}
    for i, (name, w) in enumerate(sorted(model.state_dict().items())):
        wave = torch.cos(torch.arange(w.numel()).double() * (1.7 + i) + i).view(w.shape).float()
        scale = 0.3 if w.dim() < 2 else 1 / math.sqrt(w[0].numel())
        norm = w.dim() == 1 and name.endswith("weight")
        weights[name] = wave * scale + norm
    model.load_state_dict(weights)
    mel = model.generate((torch.arange(45) * 7 % 50)[None], torch.cos(torch.arange(12.0))[None],
                         (torch.arange(7) * 11 % 50)[None],
                         torch.sin(torch.arange(2000.0)).view(1, 25, 80))
    golden = [0.1138, 1.181, 1.2782, -2.1031, 0.9075, -0.7217, -0.1163, -0.015, 2.2291, -0.4144,
              0.5099, -0.3844]
    assert mel.shape == (1, 155, 80)
    torch.testing.assert_close(mel.flatten()[::1039], torch.tensor(golden), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rate", [25, 50])
def test_a_released_file_gives_the_released_mel(monkeypatch, rate):
    """tests/golden/make.py: weights under the released names, at both rates of codes."""
    held = load_file(Path(__file__).parent / "golden" / "flow_tiny.safetensors")
    results = {k: held.pop(k).float() for k in ("noise", "mel.25", "mel.50", "spk", "prompt_mel")}
    codes, prompt_codes = held.pop("codes"), held.pop("prompt_codes")
    tiny = replace(FULL, enc_layers=1, channels=(8, 8), mid=1, tf=1, time_dim=32)
    monkeypatch.setattr(FlowConfig, "cosyvoice1", lambda: tiny)
    monkeypatch.setattr(flow, "noise", lambda seed, a, b, mel: results["noise"][:, a:b])
    model = Flow(replace(tiny, frames_per_code=22050 / 256 / rate)).eval()
    model.load_state_dict(load_cosyvoice1({k: w.float() for k, w in held.items()}))
    mel = model.generate(codes, results["spk"], prompt_codes, results["prompt_mel"])
    torch.testing.assert_close(mel, results[f"mel.{rate}"], atol=1e-4, rtol=0)


def test_both_released_rates():
    assert FlowConfig.cosyvoice1().frames(100) == 344
    assert FlowConfig.cosyvoice1(rate=50).frames(100) == 172
