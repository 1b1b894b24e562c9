"""The vocoder: mel against numpy, lengths, streaming, weight norm, published shapes, learning."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vocoder import (VOCODERS, HiFT, Discriminator, Generator, SourceFilter, VocoderConfig,
                     discriminator_loss, feature_loss, fold_weights, generator_loss, hifigan, hift,
                     load_hifigan, load_hift, mel_loss, mel_spectrogram, stft_loss)

SMALL = dict(n_fft=64, win=64, n_mels=8, channels=8, kind="hifigan")
TINY = VocoderConfig(**SMALL, hop=30, rates=(5, 3, 2), kernels=(10, 6, 4))
SINGLE = VocoderConfig(**SMALL, hop=20, rates=(5, 4), kernels=(11, 9), resblock="2",
                       mrf_kernels=(3, 5), mrf_dilations=((1, 2), (2, 6)))
SOURCE = VocoderConfig(**SMALL | {"kind": "filter"}, hop=30, layers=2)
HIFT = VocoderConfig("hift", 22050, hop=256, n_mels=8, channels=8, rates=(8, 8), kernels=(16, 16))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def descend(module, loss, rate):
    """One step down the signs of the gradient: all the optimiser these tests need."""
    loss.backward()
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= rate * p.grad.sign()
            p.grad = None
    return loss.item()


def normed(state, spelling, plain=()):
    """Weights as a file saved with weight norm has them."""
    ends = {"old": (".weight_g", ".weight_v"),
            "new": (".parametrizations.weight.original0", ".parametrizations.weight.original1")}
    out = {}
    for name, w in state.items():
        if name.endswith(".weight") and w.dim() == 3 and not name.startswith(plain):
            g = w.flatten(1).norm(dim=1)[:, None, None]
            base = name.removesuffix(".weight")
            out[base + ends[spelling][0]], out[base + ends[spelling][1]] = g, w * 3  # any length
        else:
            out[name] = w
    return out


# mel


def naive_mel(wave, sample_rate, n_fft, hop, n_mels, fmin, fmax):
    """Frame by frame and filter by filter, from the definitions."""
    pad = (n_fft - hop) // 2
    wave = np.pad(wave.astype(np.float64), pad, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)

    def to_hz(m):
        return m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    def to_mel(f):
        return f * 3 / 200 if f < 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4)

    corners = [to_hz(m) for m in np.linspace(to_mel(fmin), to_mel(fmax), n_mels + 2)]
    freqs = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    frames = []
    for start in range(0, len(wave) - n_fft + 1, hop):
        magnitude = np.sqrt(np.abs(np.fft.rfft(wave[start : start + n_fft] * window)) ** 2 + 1e-9)
        row = []
        for low, mid, high in zip(corners, corners[1:], corners[2:]):
            weights = np.interp(freqs, [low, mid, high], [0, 1, 0]) * 2 / (high - low)
            row.append(np.log(max(weights @ magnitude, 1e-5)))
        frames.append(row)
    return np.array(frames)


@pytest.mark.parametrize("full_band", [False, True])
def test_mel_is_the_naive_one(full_band):
    cfg = VocoderConfig()
    t = np.arange(4000) / 24000
    wave = 0.4 * np.sin(2 * np.pi * 440 * t) + 0.01 * np.random.default_rng(0).normal(size=4000)
    mel = mel_spectrogram(torch.tensor(wave).float()[None], cfg, full_band)[0]
    expected = naive_mel(wave, 24000, 1024, 240, 80, 0.0, 12000.0 if full_band else 8000.0)
    assert np.abs(mel.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("n", [2400, 2401, 2639, 2640])
def test_mel_has_one_frame_a_hop(n):
    assert mel_spectrogram(torch.randn(2, n), VocoderConfig()).shape == (2, n // 240, 80)


def test_mel_of_a_batch_is_that_of_each():
    wave = torch.randn(3, 3000)
    batch = mel_spectrogram(wave, VocoderConfig())
    assert torch.allclose(batch[1:2], mel_spectrogram(wave[1:2], VocoderConfig()), atol=1e-5)


def test_mel_stays_exact_where_all_else_is_bfloat16():
    wave = torch.randn(1, 3000)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mel_spectrogram(wave, TINY)
    assert torch.equal(inside, mel_spectrogram(wave, TINY))


def test_silence_is_the_floor():
    mel = mel_spectrogram(torch.zeros(1, 2400), VocoderConfig())
    assert mel.min() >= np.log(1e-5) - 1e-4 and mel.max() < -6


# generator


@pytest.mark.parametrize("cfg", [TINY, SINGLE, SOURCE, VocoderConfig(), HIFT, hifigan(3),
                                 hifigan(2, 22050)])
@pytest.mark.parametrize("frames", [1, 4])
def test_length_is_exact(cfg, frames):
    wave = VOCODERS[cfg.kind](cfg)(torch.randn(2, frames, cfg.n_mels))
    assert wave.shape == (2, frames * cfg.hop) and wave.abs().max() < 1


def test_rates_must_make_the_hop():
    with pytest.raises(ValueError, match="hop 240"):
        Generator(VocoderConfig("hifigan", rates=(8, 8, 4)))


@pytest.mark.parametrize("cfg", [TINY, SINGLE, SOURCE])
@pytest.mark.parametrize("cuts", [(), (0, 1), (7, 30, 31), tuple(range(1, 60)), (59,)])
def test_stream_joins_to_the_offline_wave(cfg, cuts):
    model = VOCODERS[cfg.kind](cfg).eval()
    for p in model.parameters():  # loud enough for a wrong seam to show
        torch.nn.init.normal_(p, std=0.2)
    mel = torch.randn(1, 60, cfg.n_mels)
    edges, state, pieces = [0, *cuts, 60], None, []
    for start, end in zip(edges, edges[1:]):
        wave, state = model.stream(mel[:, start:end], state, final=end == 60)
        pieces.append(wave)
        assert state.mel.size(1) <= max(sum(model.context()), end - start + sum(model.context()))
    offline = model(mel).detach()
    assert offline.std() > 0.01
    assert torch.allclose(torch.cat(pieces, 1), offline, atol=1e-4)


def sung(hertz):
    """A filter that is wide open, and whose pitch moves around hertz (silent below 10)."""
    model = SourceFilter(SOURCE).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.nn.init.constant_(model.head.bias, -1.0)
    torch.nn.init.normal_(model.f0_predictor.classifier.weight, std=15.0)
    torch.nn.init.constant_(model.f0_predictor.classifier.bias, hertz)
    return model


def test_a_streamed_source_keeps_its_phase_and_its_noise():
    """Five frames to each side decide the pitch, all frames before it the phase."""
    model, mel, state, pieces = sung(200.0), torch.randn(1, 400, 8), None, []
    for start in range(0, 400, 7):
        wave, state = model.stream(mel[:, start:start + 7], state, final=start + 7 >= 400)
        pieces.append(wave)
        assert state.mel.size(1) <= sum(model.context()) + 7
    f0, wave = model.pitch(mel), model(mel)
    turned = f0.double().sum() * SOURCE.hop / SOURCE.sample_rate
    assert f0.std() > 1 and abs((state.phase[0, 0, 0] - turned + 0.5) % 1 - 0.5) < 1e-4
    assert 0.01 < wave.std() and wave.abs().max() <= 1
    torch.testing.assert_close(torch.cat(pieces, 1), wave, atol=1e-4, rtol=0)
    moved = model(mel[:, 100:])[:, 600:]  # without what was before it is another wave
    assert not torch.allclose(moved, wave[:, 3600:], atol=1e-2)


def test_the_source_is_all_harmonics_where_it_is_voiced():
    """240 Hz has 45 of them below 0.45 of the sample rate; they are as strong, and in step."""
    f0, begin = torch.tensor([[240.0] * 50 + [0.0] * 50]), torch.tensor([[[0.25]]])
    rng = torch.Generator().manual_seed(0)
    source, phase = SourceFilter(VocoderConfig()).excite(f0, begin, rng)  # (1, N, 2)
    at = torch.arange(1, 12001, dtype=torch.float64) / 24000
    want = sum((2 * torch.pi * n * (240 * at + 0.25)).cos() for n in range(1, 46)) / 240
    torch.testing.assert_close(source[0, :12000, 0].double(), want, atol=1e-4, rtol=0)
    assert not source[0, 12000:, 0].any() and torch.allclose(phase, begin.double())  # 120 turns
    assert abs(source[0, :, 1].square().sum() / 24000 * 360 - 1) < 0.05  # its spectra are near 1
    assert not torch.equal(source[0, :960, 1], source[0, 960:1920, 1])


def test_the_filter_shapes_tones_and_noise():
    """With an open tone branch the wave is the pulses, delayed by nothing; shut, noise alone."""
    model, mel = SourceFilter(VocoderConfig(layers=1)).eval(), torch.zeros(1, 40, 80)
    torch.nn.init.zeros_(model.head.weight)
    tone, turn, hiss = model.head.bias.data.view(3, -1)
    for up, down in ((tone, hiss), (hiss, tone)):
        up[:], turn[:], down[:] = 0.0, 0.0, -30.0
        rng, f0 = torch.Generator().manual_seed(0), torch.full((1, 40), 150.0)
        source, _ = model.excite(f0, model.begin(1, rng), rng)
        wave = model(mel, f0, seed=0)
        want = source[..., 0 if up is tone else 1]
        torch.testing.assert_close(wave[:, 480:-480], want[:, 480:-480], atol=1e-4, rtol=0)


def test_stream_emits_as_soon_as_the_right_context_is_there():
    model = Generator(TINY).eval()
    right = model.context()[1]
    wave, state = model.stream(torch.randn(1, right, 8), None, final=False)
    assert wave.size(1) == 0
    wave, state = model.stream(torch.randn(1, 3, 8), state, final=False)
    assert wave.size(1) == 3 * TINY.hop
    wave, _ = model.stream(torch.randn(1, 0, 8), state, final=True)
    assert wave.size(1) == right * TINY.hop


def test_stream_state_is_bounded_and_not_changed():
    model = Generator(TINY).eval()
    _, state = model.stream(torch.randn(1, 5, 8), None, final=False)
    before = state.mel.clone()
    for _ in range(8):
        _, new = model.stream(torch.randn(1, 10, 8), state, final=False)
        assert torch.equal(state.mel, before)
        state, before = new, new.mel.clone()
    assert state.mel.size(1) == sum(model.context())


# weight norm


def test_fold_and_unfold_keep_the_function():
    model, mel = Generator(TINY), torch.randn(1, 5, 8)
    plain, names = model(mel), set(model.state_dict())
    assert torch.allclose(model.unfold()(mel), plain, atol=1e-5)
    assert set(model.state_dict()) != names
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    moved, again = model(mel), Generator(TINY)
    assert not torch.allclose(moved, plain, atol=1e-4)
    again.load_state_dict(fold_weights(model.state_dict()))
    assert torch.allclose(again(mel), moved, atol=1e-5) and set(again.state_dict()) == names


def test_a_folded_checkpoint_goes_on_training():
    model, mel = Generator(TINY).unfold(), torch.randn(1, 5, 8)
    again = Generator(TINY)
    again.load_state_dict(fold_weights(model.state_dict()))
    again.unfold()
    assert torch.allclose(again(mel), model(mel), atol=1e-5)
    again(mel).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())


# published models


def lengths(module):
    """How many numbers weight norm would add: one a row of every weight that has it."""
    return sum(w.size(0) for name, w in module.named_parameters()
               if w.dim() == 3 and not name.startswith("source_downs"))


@pytest.mark.parametrize("version, folded, trained", [
    (1, 13_926_017, 13_936_130), (2, 925_985, 928_514), (3, 1_462_273, 1_464_322)])
def test_hifigan_parameter_counts(version, folded, trained):
    with torch.device("meta"):
        model = Generator(hifigan(version, 22050))
    assert parameters(model) == folded and folded + lengths(model) == trained


def test_hift_parameter_count():
    with torch.device("meta"):
        model = HiFT(hift())
    assert parameters(model) + lengths(model) == 20_460_591


def test_discriminator_parameter_counts():
    critic = Discriminator(hifigan(1))
    assert parameters(critic.mpd) == 41_105_770 and parameters(critic.msd) == 29_618_821


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("version", [2, 3])
def test_original_hifigan_files_load(spelling, version):
    source = Generator(hifigan(version, 22050)).eval()
    model, mel = load_hifigan(normed(source.state_dict(), spelling)), torch.randn(1, 3, 80)
    assert model.cfg.hop == 256 and model.cfg.sample_rate == 22050
    assert torch.allclose(model(mel), source(mel), atol=1e-5)


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_released_hift_files_load(spelling):
    source, mel = HiFT(HIFT).eval(), torch.randn(1, 3, 8)
    state = normed(source.state_dict(), spelling, plain="source_downs")
    if spelling == "old":  # older files also have these
        state = {"generator." + k: v[:, None] if k.endswith("alpha") else v
                 for k, v in state.items()}
    model = HiFT(HIFT)
    model.load_state_dict(load_hift(state))
    assert torch.allclose(model(mel), source(mel), atol=1e-5)


def test_hift_is_exact_in_length_and_a_function_of_its_seed():
    model, mel = HiFT(HIFT).eval(), torch.randn(2, 3, 8)
    before = torch.get_rng_state()
    wave = model(mel, seed=1)
    assert wave.shape == (2, 3 * 256) and wave.abs().max() <= 0.99
    assert torch.equal(model(mel, seed=1), wave) and not torch.equal(model(mel, seed=2), wave)
    assert torch.equal(torch.get_rng_state(), before)


def loud_hift():
    """Voiced at about 150 Hz, and loud enough for a wrong seam to show, but not clipped."""
    model = HiFT(HIFT).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    model.conv_post.weight.data *= 0.3
    model.f0_predictor.classifier.bias.data += 150
    return model


@pytest.mark.parametrize("make", [lambda: loud_hift(), lambda: Generator(hifigan(3)).eval()])
def test_bf16_stays_in_the_residual_blocks(make):
    model = make()
    mel = torch.randn(1, 12, model.cfg.n_mels)
    want = model(mel)
    low = {name for name, p in model.bfloat16().named_parameters() if p.dtype == torch.bfloat16}
    assert low == {name for name, _ in model.named_parameters()
                   if "resblocks." in name and ".alpha" not in name}
    got = model(mel)
    assert got.dtype == torch.float32 and 0 < (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("cuts", [(0, 1), (30, 31, 80), tuple(range(1, 90)), (89,)])
def test_hift_stream_joins_to_the_offline_wave(cuts):
    """Phase and noise go on where the last piece stopped; neither they nor a state are used up."""
    model, mel = loud_hift(), torch.randn(1, 90, 8)
    edges, state, pieces = [0, *cuts, 90], None, []
    for start, end in zip(edges, edges[1:]):
        piece = mel[:, start:end], state, end == 90
        wave, state = model.stream(*piece)
        pieces.append(wave)
        assert state.mel.size(1) <= 40 + end - start
        assert torch.equal(model.stream(*piece)[0], wave)
    offline = model(mel)
    assert 0.05 < offline.std() < 0.5
    torch.testing.assert_close(torch.cat(pieces, 1), offline, atol=1e-5, rtol=0)


def test_hift_emits_as_soon_as_the_right_context_is_there():
    model, mel = loud_hift(), torch.randn(1, 43, 8)
    wave, state = model.stream(mel[:, :20], None, False)
    assert wave.shape == (1, 0)
    wave, state = model.stream(mel[:, 20:], state, False)
    assert wave.shape == (1, 23 * 256)
    assert model.stream(mel[:, :0], state, True)[0].shape == (1, 20 * 256)
    assert model.stream(mel[:, :0], None, True)[0].shape == (1, 0)


def test_hift_sings_where_it_should():
    f0, begin = torch.tensor([[220.5] * 40 + [0.0] * 40]), torch.zeros(1, 1, 9)
    model, mix = HiFT(HIFT), torch.eye(9)
    for n in range(9):  # listen to one harmonic at a time
        torch.nn.init.zeros_(model.m_source["l_linear"].bias)
        model.m_source["l_linear"].weight.data[:] = mix[n]
        with torch.no_grad():
            source = model.excite(f0, begin, torch.Generator().manual_seed(0))[0][0, :, 0]
        voiced, silent = source[:10000], source[40 * 256:]  # 100 periods, exactly
        peak = torch.fft.rfft(voiced).abs().argmax() * HIFT.sample_rate / 10000
        assert peak == 220.5 * (n + 1) and 0.02 < silent.std() < 0.05 < voiced.std()


def golden(name):
    """Weights under the originals' names, inputs and results (tests/golden/make.py)."""
    held = load_file(Path(__file__).parent / "golden" / f"{name}_tiny.safetensors")
    return {k: w.float() for k, w in held.items()}


def test_hift_is_cosyvoices():
    held = golden("hift")
    mel, source, f0, wave = (held.pop(k) for k in ("mel", "source", "f0", "wave"))
    model = HiFT(HIFT)
    model.load_state_dict(load_hift(held))
    torch.testing.assert_close(model.pitch(mel), f0, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.filter(mel, source[..., None]), wave, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, dilations", [("1", ((1, 3, 5),) * 2), ("2", ((1, 2), (2, 6)))])
def test_hifigan_is_the_original(kind, dilations):
    held = golden("hifigan")
    model = Generator(VocoderConfig("hifigan", hop=8, channels=8, rates=(4, 2), kernels=(8, 4),
                                    resblock=kind, mrf_kernels=(3, 5), mrf_dilations=dilations))
    model.load_state_dict(fold_weights({k[2:]: w for k, w in held.items()
                                        if k.startswith(kind)}))
    torch.testing.assert_close(model(held["mel"]), held[f"wave.{kind}"], atol=1e-5, rtol=0)


def test_weights_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="conv_pre.bias of 512, 128 or 256, found 8"):
        load_hifigan(Generator(TINY).state_dict())
    with pytest.raises(ValueError, match="weight_g: missing"):
        fold_weights({"conv_pre.weight_v": torch.ones(2, 3, 1)})


# discriminators and training


def test_period_discriminators_are_the_original_2d_ones():
    cfg = VocoderConfig(mpd=(4, 8, 8))
    critic, wave = Discriminator(cfg), torch.randn(2, 301)
    scores, features = critic(wave)
    assert len(scores) == 5 + 3 and len(features) == 5 * 4 + 3 * 6
    for period, stack, score in zip(cfg.periods, critic.mpd, scores):
        x = F.pad(wave[:, None], (0, -301 % period), mode="reflect").unflatten(2, (-1, period))
        for c in stack.convs:
            x = F.conv2d(x, c.weight[..., None], c.bias, (c.stride[0], 1), (2, 0))
            x = F.leaky_relu(x, 0.1)
        x = F.conv2d(x, stack.post.weight[..., None], stack.post.bias, padding=(1, 0))
        assert torch.allclose(score.flatten(), x.transpose(2, 3).flatten(), atol=1e-5)


def test_losses_know_the_perfect_score():
    one, zero, features = [torch.ones(2, 5)], [torch.zeros(2, 5)], [torch.randn(2, 3, 5)]
    assert discriminator_loss(one, zero) == 0 and discriminator_loss(zero, one) == 2
    assert generator_loss(one) == 0 and generator_loss(zero) == 1
    assert feature_loss(features, features) == 0
    assert mel_loss(torch.ones(1, 600), torch.ones(1, 600), TINY) == 0
    wave = torch.randn(2, 4000)
    assert stft_loss(wave, wave) == 0 and stft_loss(wave, 0.9 * wave).isclose(
        torch.tensor(0.1 - np.log(0.9)).float(), atol=1e-3)


@pytest.mark.parametrize("make, rate", [(lambda: Generator(TINY).unfold(), 2e-3),
                                        (lambda: SourceFilter(SOURCE), 2e-2)])
def test_mel_loss_shrinks_on_one_batch(make, rate):
    model = make()
    t = torch.arange(900) / 24000
    wave = 0.5 * torch.sin(2 * torch.pi * torch.tensor([[300.0], [700.0]]) * t)  # (2, N)
    mel = mel_spectrogram(wave, TINY)
    losses = [descend(model, mel_loss(wave, model(mel), TINY), rate) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


def test_critic_learns_and_teaches():
    cfg = VocoderConfig(mpd=(4, 8), msd=((4, 15, 1, 1), (8, 17, 4, 2)))
    critic, fake = Discriminator(cfg), 0.1 * torch.randn(2, 600)
    real = 0.5 * torch.sin(torch.arange(600) / 10).expand(2, 600)
    losses = []
    for _ in range(20):
        scores, _ = critic(torch.cat([real, fake]))
        of_real, of_fake = zip(*(score.chunk(2) for score in scores))
        losses.append(descend(critic, discriminator_loss(of_real, of_fake), 2e-3))
    assert losses[-1] < 0.7 * losses[0]
    fake.requires_grad_()
    (_, real_maps), (scores, maps) = critic(real), critic(fake)
    (generator_loss(scores) + feature_loss(real_maps, maps)).backward()
    assert fake.grad.norm() > 0
