"""
The vocoder: mel frames -> 24 kHz waveform (last half of the paper's Token2wav module).

Three generators. HiFi-GAN, the paper's, is a stack of transposed convolutions, each followed by the
mean of a few residual blocks of different width ("multi receptive field fusion"). It must learn to
keep harmonics in phase from frame to frame, for which its authors took 2.5 million steps. HiFT, the
released weights', is given sines at the multiples of a predicted pitch. Our own weights' goes one
step on: pulses at that pitch, and noise, whose short spectra a network multiplies by what it reads
off the mel, frame by frame. It is in tune from the start, learns in minutes on a CPU, and does an
eighth of the multiplications of HiFi-GAN V2.

Losses on spectra are enough for it. All can be trained as HiFi-GAN is, against two families of
discriminators: one looks at the wave folded by a prime period, the other at three time scales.

Legend: B batch, N samples, T mel frames (T = N // hop), M mel bins, C channels, P period.
Mels are time-major (B, T, M) at the border of this file, waves are (B, N). Inside, HiFi-GAN, HiFT
and discriminators have (B, C, 1, time) in channels-last memory: 2-d convolutions of height 1 need
no reordering on a CPU and run 1.5 times as fast as 1-d ones. Weights keep the 1-d shapes of every
published checkpoint.

References: HiFi-GAN (Kong et al. 2020, arXiv 2010.05646) and its released weights; HiFT-Net (Li et
al. 2023, arXiv 2309.09493) as in CosyVoice, whose released weights OSUM-EChat speaks with; short
spectra of harmonics and noise: Serra and Smith 1990, DDSP (Engel et al. 2020, arXiv 2001.04643),
Vocos (Siuzdak 2023, arXiv 2306.00814), and hibari, whose voice our weights learnt.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SLOPE = 0.1  # of every LeakyReLU but the last one, which has torch's default 0.01


@dataclass
class VocoderConfig:
    """The defaults are our mini: a filtered source at 24 kHz, light discriminators."""

    kind: str = "filter"  # of generator: "filter", "hifigan" or "hift"
    sample_rate: int = 24000
    n_fft: int = 1024
    win: int = 1024
    hop: int = 240  # samples a frame
    n_mels: int = 80
    fmin: float = 0.0
    fmax: float | None = 8000.0  # of the input mel; None = half the sample rate
    channels: int = 192  # of HiFi-GAN and HiFT: halved by every upsampling stage
    layers: int = 6  # of the filter
    # HiFi-GAN and HiFT
    resblock: str = "1"  # "1": pairs of convolutions, "2": single ones (V3)
    rates: tuple[int, ...] = (6, 5, 4, 2)  # their product: hop; for HiFT a quarter of it
    kernels: tuple[int, ...] = (12, 10, 8, 4)  # twice the rate: every output sees two inputs
    mrf_kernels: tuple[int, ...] = (3, 7, 11)
    mrf_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    # discriminators
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    mpd: tuple[int, ...] = (16, 32, 64, 128, 128)  # channels of the period discriminators
    msd: tuple[tuple[int, ...], ...] = (  # scale discriminators: channels, kernel, stride, groups
        (16, 15, 1, 1), (32, 17, 4, 1), (64, 17, 4, 1), (128, 17, 4, 1), (128, 5, 1, 1))

    def __post_init__(self):
        if self.kind not in VOCODERS:
            raise ValueError(f"kind {self.kind!r} of vocoder")


def hifigan(version: int, sample_rate: int = 24000) -> VocoderConfig:
    """HiFi-GAN V1, V2, V3 with full discriminators; 24 kHz at hop 240 or 22.05 kHz at hop 256."""
    hop, rates = {22050: (256, (8, 8, 2, 2)), 24000: (240, (6, 5, 4, 2))}[sample_rate]
    size = dict(channels={1: 512, 2: 128, 3: 256}[version])
    if version == 3:
        rates = (8, 8, 4) if hop == 256 else (8, 6, 5)
        size |= dict(resblock="2", mrf_kernels=(3, 5, 7), mrf_dilations=((1, 2), (2, 6), (3, 12)))
    return VocoderConfig(
        "hifigan", sample_rate, hop=hop, rates=rates, kernels=tuple(2 * r for r in rates), **size,
        mpd=(32, 128, 512, 1024, 1024),
        msd=((128, 15, 1, 1), (128, 41, 2, 4), (256, 41, 2, 16), (512, 41, 4, 16),
             (1024, 41, 4, 16), (1024, 41, 1, 16), (1024, 5, 1, 1)))


def hift() -> VocoderConfig:
    """The HiFT of CosyVoice-300M: 22.05 kHz; its inverse STFT makes the last 4 of hop 8 * 8 * 4."""
    return VocoderConfig("hift", 22050, hop=256, channels=512, rates=(8, 8), kernels=(16, 16))


# ---- mel -----------------------------------------------------------------------------------------

def mel_filters(cfg: VocoderConfig, fmax: float) -> Tensor:
    """Slaney's triangles, linear below 1 kHz, logarithmic above, each of area one -> (M, bins)."""
    step = math.log(6.4) / 27  # 27 mels from 1 kHz to 6.4 kHz
    to_mel = lambda f: f * 3 / 200 if f < 1000 else 15 + math.log(f / 1000) / step
    mels = torch.linspace(to_mel(cfg.fmin), to_mel(fmax), cfg.n_mels + 2, dtype=torch.float64)
    hz = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * step))
    bins = torch.linspace(0, cfg.sample_rate / 2, cfg.n_fft // 2 + 1, dtype=torch.float64)
    low, mid, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]  # (M, 1) each, of one triangle
    rise, fall = (bins - low) / (mid - low), (high - bins) / (high - mid)
    return (torch.minimum(rise, fall).clamp(min=0) * (2 / (high - low))).float()


def mel_spectrogram(wave: Tensor, cfg: VocoderConfig, full_band: bool = False) -> Tensor:
    """Wave (B, N) in [-1, 1] -> natural-log mel (B, N // hop, M); N > (n_fft - hop) / 2.

    full_band: filters up to half the sample rate. The loss must hear what the input does not show.
    """
    fmax = cfg.sample_rate / 2 if full_band or cfg.fmax is None else cfg.fmax
    # this much on each side centres frame t on the hop samples that the vocoder makes of it
    wave = F.pad(wave.float(), [(cfg.n_fft - cfg.hop) // 2] * 2, mode="reflect")
    window = torch.hann_window(cfg.win, device=wave.device)
    spec = torch.stft(wave, cfg.n_fft, cfg.hop, cfg.win, window, center=False, return_complex=True)
    magnitude = torch.view_as_real(spec).square().sum(-1).add(1e-9).sqrt()  # (B, bins, T)
    with torch.autocast(wave.device.type, enabled=False):  # 8 bits would blur the target
        mel = mel_filters(cfg, fmax).to(wave.device) @ magnitude  # (B, M, T)
    return mel.clamp(min=1e-5).log().transpose(1, 2)


# ---- parts ---------------------------------------------------------------------------------------

class Conv1d(nn.Conv1d):
    """1-d convolution on (B, C, 1, time); pads for "same" length unless told otherwise."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1,
                 dilation: int = 1, padding: int | None = None):
        padding = dilation * (kernel - 1) // 2 if padding is None else padding
        super().__init__(c_in, c_out, kernel, stride, padding, dilation, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype, memory_format=torch.channels_last)  # mostly there already
        return F.conv2d(x, self.weight[:, :, None], self.bias, (1, *self.stride),
                        (0, *self.padding), (1, *self.dilation), self.groups)


class Upsample(nn.ConvTranspose1d):
    """(B, C, 1, time) -> (B, C / 2, 1, time * rate), for any kernel >= rate."""

    def __init__(self, channels: int, kernel: int, rate: int):
        # exact length: cut ceil((kernel - rate) / 2) at the left and floor of it at the right
        super().__init__(channels, channels // 2, kernel, rate, (kernel - rate + 1) // 2,
                         output_padding=(kernel - rate) % 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight[:, :, None], self.bias, (1, *self.stride),
                                  (0, *self.padding), (0, *self.output_padding))


class Snake(nn.Module):
    """x + sin(ax)^2 / a, a periodic nonlinearity with one learnt frequency per channel (HiFT)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None, None]
        return x + (alpha * x).sin().square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Residual convolutions of growing dilation; kind "1" puts an undilated one behind each."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], kind: str = "1",
                 snake: bool = False):
        super().__init__()
        dilated = nn.ModuleList(Conv1d(channels, channels, kernel, dilation=d) for d in dilations)
        self.kind = kind
        if kind == "2":
            self.convs = dilated
            return
        act = lambda: Snake(channels) if snake else nn.LeakyReLU(SLOPE)
        self.convs1, self.activations1 = dilated, nn.ModuleList(act() for _ in dilations)
        self.convs2 = nn.ModuleList(Conv1d(channels, channels, kernel) for _ in dilations)
        self.activations2 = nn.ModuleList(act() for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "2":
            for c in self.convs:
                x = x + c(F.leaky_relu(x, SLOPE))
            return x
        for a1, c1, a2, c2 in zip(self.activations1, self.convs1, self.activations2, self.convs2):
            x = x + c2(a2(c1(a1(x))))
        return x


def trunk(cfg: VocoderConfig, snake: bool = False) -> tuple[Conv1d, nn.ModuleList, nn.ModuleList]:
    """The parts HiFi-GAN and HiFT share: first convolution, upsamplers, their residual blocks."""
    widths = [cfg.channels >> i for i in range(len(cfg.rates))]
    ups = nn.ModuleList(Upsample(c, k, r) for c, k, r in zip(widths, cfg.kernels, cfg.rates))
    blocks = nn.ModuleList(ResBlock(c // 2, k, d, cfg.resblock, snake) for c in widths
                           for k, d in zip(cfg.mrf_kernels, cfg.mrf_dilations))
    return Conv1d(cfg.n_mels, cfg.channels, 7), ups, blocks


# ---- source --------------------------------------------------------------------------------------

VOICED = 10  # Hz


class PitchPredictor(nn.Module):
    """Mel (B, T, M) -> pitch (B, T) in Hz, near 0 where unvoiced."""

    def __init__(self, n_mels: int, channels: int):
        super().__init__()
        widths = [n_mels] + [channels] * 4
        pairs = ((Conv1d(c, channels, 3), nn.ELU()) for c in widths)
        self.condnet = nn.Sequential(*(m for pair in pairs for m in pair))
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.condnet(mel.transpose(1, 2)[:, :, None])  # (B, C, 1, T)
        return self.classifier(x.squeeze(2).transpose(1, 2)).squeeze(2).abs()


def cycles(f0: Tensor, cfg: VocoderConfig, phase: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pitch (B, T) in Hz -> the same of every sample (B, N, 1); at which part of their cycles its
    multiples are (B, N, H), from `phase` (B, 1, H) on; the last of these. H >= 1.
    In float64 and on the CPU: phases are sums over a whole reply."""
    hertz = f0.detach().cpu().repeat_interleave(cfg.hop, 1)[..., None]  # (B, N, 1)
    order = torch.arange(1, phase.size(-1) + 1)
    at = ((hertz.double() / cfg.sample_rate).cumsum(1) * order + phase) % 1  # (B, N, H)
    return hertz, at.float(), at[:, -1:]


# ---- generators ----------------------------------------------------------------------------------

@dataclass
class StreamState:
    """What a stream must remember. Never changed in place."""

    mel: Tensor  # (1, t, M) recent frames
    source: Tensor  # (1, n, C) of the first n / hop of them
    phase: Tensor  # (1, 1, harmonics) at the end of `source`
    rng: Tensor  # state of the generator of noise there
    done: int = 0  # frames of `mel` that are wave by now


class Vocoder(nn.Module):
    """What all generators share: mel -> pitch -> source, and both -> wave; at once or in pieces.

    Each says where phases `begin`, what the source is made of (`excite`), its `context`, and how
    mel and source become a wave (`filter`)."""

    pitch_reach = 5  # frames on either side that a pitch depends on

    def bfloat16(self) -> "Vocoder":
        """Convolutions of residual blocks, nearly all of the work of HiFi-GAN and HiFT, in
        bfloat16; what they add to, phases and spectra stay in float32."""
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.apply(lambda m: nn.Module.bfloat16(m) if isinstance(m, Conv1d) else m)
        return self

    def pitch(self, mel: Tensor) -> Tensor:
        """Mel (B, T, M) -> pitch (B, T) in Hz, near 0 where unvoiced."""
        return self.f0_predictor(mel)

    def forward(self, mel: Tensor, f0: Tensor | None = None, seed: int = 0) -> Tensor:
        """Mel (B, T, M) -> wave (B, T * hop) in [-1, 1]. The source sings at the pitch f0 (B, T) in
        Hz, or at the predicted one; `seed` draws its noise."""
        rng = torch.Generator().manual_seed(seed)
        f0 = self.pitch(mel) if f0 is None else f0
        return self.filter(mel, self.excite(f0, self.begin(len(mel), rng), rng)[0])

    @torch.inference_mode()
    def stream(self, mel: Tensor, state: StreamState | None, final: bool, seed: int = 0
               ) -> tuple[Tensor, StreamState]:
        """Next mel frames (1, t, M), t >= 0 -> the wave (1, n) that is certain by now, new state.

        The pieces join to exactly what `forward` makes of all frames at once: a frame is rendered
        as soon as its right context has arrived, with as many old frames before it as it can see.
        """
        rng, (left, right) = torch.Generator().manual_seed(seed), self.context()
        if state is None:
            phase = self.begin(len(mel), rng)
            empty, _ = self.excite(mel[:, :0, 0], phase, rng)
            state = StreamState(mel[:, :0], empty, phase, rng.get_state())
        frames, hop, done = torch.cat([state.mel, mel], 1), self.cfg.hop, state.done
        end = frames.size(1) if final else frames.size(1) - right
        if end <= done:
            return mel.new_zeros(len(mel), 0), replace(state, mel=frames)
        known = state.source.size(1) // hop
        sure = frames.size(1) - (0 if final else self.pitch_reach)
        rng.set_state(state.rng)
        new, phase = self.excite(self.pitch(frames)[:, known:sure], state.phase, rng)
        source, keep = torch.cat([state.source, new], 1), max(0, end - left)
        wave = self.filter(frames[:, :sure], source)[:, done * hop:end * hop]
        return wave, StreamState(frames[:, keep:], source[:, keep * hop:], phase, rng.get_state(),
                                 end - keep)


class Block(nn.Module):
    """ConvNeXt's, over time (Liu et al. 2022): mix each channel's neighbours, then the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.near = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        near = self.near(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(near))))


class SourceFilter(Vocoder):
    """Ours: short spectra of pulses and of noise, each times what the mel says -> inverse STFT."""

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        self.cfg, self.size = cfg, 4 * cfg.hop  # samples a short spectrum sees
        self.conv_pre = nn.Conv1d(cfg.n_mels, cfg.channels, 7, padding=3)
        self.blocks = nn.ModuleList(Block(cfg.channels) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.channels)
        self.head = nn.Linear(cfg.channels, 3 * (self.size // 2 + 1))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.constant_(self.head.bias, -4.0)  # of log amplitudes
        self.f0_predictor = PitchPredictor(cfg.n_mels, 2 * cfg.channels // 3)

    def begin(self, rows: int, rng: torch.Generator) -> Tensor:
        return torch.zeros(rows, 1, 1)

    def excite(self, f0: Tensor, phase: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pitch (B, T) -> source (B, T * hop, 2), phase: where voiced the sum of all harmonics as
        cosines of amplitude 1, in closed form; noise. Both with short spectra of about 1."""
        hertz, at, phase = cycles(f0, self.cfg, phase)  # (B, N, 1) each, (B, 1, 1)
        count = (0.45 * self.cfg.sample_rate / hertz.clamp(min=VOICED)).floor()
        sine = (math.pi * at).sin()
        top = sine.abs() < 1e-3  # of a pulse
        pulses = torch.where(top, count, ((2 * count + 1) * math.pi * at).sin()
                             / (2 * sine).masked_fill(top, 1) - 0.5)
        noise = (2 * torch.rand(at.shape, generator=rng) - 1) * (2 / self.cfg.hop) ** 0.5
        return torch.cat([pulses * (hertz > VOICED) / self.cfg.hop, noise], 2).to(f0), phase

    def filter(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel (B, T, M), source (B, T * hop, 2) -> wave (B, T * hop) in [-1, 1]."""
        x = self.conv_pre(mel.transpose(1, 2)).transpose(1, 2)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x)).float().transpose(1, 2)  # (B, 3 * bins, T)
        tone, turn, hiss = x.unflatten(1, (3, -1)).unbind(1)  # (B, bins, T) each
        window = torch.hann_window(self.size, device=mel.device)
        hop, edge = self.cfg.hop, (self.size - self.cfg.hop) // 2
        source = F.pad(source.transpose(1, 2), (edge, edge)).flatten(0, 1)  # (B * 2, N + 2 edge)
        spec = torch.stft(source, self.size, hop, window=window, center=False,
                          return_complex=True).unflatten(0, (-1, 2))  # (B, 2, bins, T)
        spec = torch.polar(tone.clamp(max=7).exp(), math.pi * turn) * spec[:, 0] \
            + hiss.clamp(max=7).exp() * spec[:, 1]
        frames = torch.fft.irfft(spec, self.size, dim=1) * window[:, None]  # (B, size, T)
        shape = dict(output_size=(1, source.size(1)), kernel_size=(1, self.size), stride=(1, hop))
        seen = window.square()[:, None].expand(frames.shape[1:])[None]
        wave = F.fold(frames, **shape) / F.fold(seen, **shape).clamp(min=1e-3)
        return wave.flatten(1)[:, edge:-edge].clamp(-1, 1)

    def context(self) -> tuple[int, int]:
        reach = 3 * (1 + len(self.blocks)) + 2  # the last: half a short spectrum
        return reach, reach + self.pitch_reach


class Generator(Vocoder):
    """HiFi-GAN, which has no source. Born with plain weights: to train, `unfold()` it before making
    the optimiser."""

    # The original draws N(0, 0.01) weights, but onto the product of weight norm, where the draw is
    # lost at the first forward: its published models began with torch's default, and so do ours.

    pitch_reach = 0

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        if math.prod(cfg.rates) != cfg.hop:
            raise ValueError(f"rates {cfg.rates} do not multiply up to hop {cfg.hop}")
        self.cfg = cfg
        self.conv_pre, self.ups, self.resblocks = trunk(cfg)
        self.conv_post = Conv1d(cfg.channels >> len(cfg.rates), 1, 7)

    def pitch(self, mel: Tensor) -> Tensor:
        return mel[..., 0]  # of no use: only its shape (B, T) counts

    def begin(self, rows: int, rng: torch.Generator) -> Tensor:
        return torch.zeros(rows, 1, 0)

    def excite(self, f0: Tensor, phase: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return f0.new_zeros(len(f0), f0.size(1) * self.cfg.hop, 0), phase

    def filter(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel (B, T, M) -> wave (B, T * hop)."""
        x, n = self.conv_pre(mel.transpose(1, 2)[:, :, None]), len(self.cfg.mrf_kernels)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))  # (B, C / 2, 1, time * rate)
            x = sum(block(x) for block in self.resblocks[i * n : i * n + n]) / n
        return self.conv_post(F.leaky_relu(x)).tanh().flatten(1)  # (B, N)

    def unfold(self) -> "Generator":
        """Split every weight into length and direction (weight norm), for training. Back to plain
        weights, which run faster, by `fold_weights(state_dict())`."""
        for m in self.modules():
            if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)):
                weight_norm(m)  # dim 0, which for the transposed ones is the input channel
        return self

    def context(self) -> tuple[int, int]:
        """Frames to the left and to the right of a frame that its samples depend on."""
        cfg = self.cfg
        block = max((k - 1) // 2 * sum(d + (cfg.resblock == "1") for d in dilations)
                    for k, dilations in zip(cfg.mrf_kernels, cfg.mrf_dilations))
        left = right = 3  # conv_post; from here back to the input, always in samples of that stage
        for rate, kernel in reversed(list(zip(cfg.rates, cfg.kernels))):
            cut = (kernel - rate + 1) // 2
            left = (left + block + kernel - 1 - cut) // rate
            right = (right + block + rate - 1 + cut) // rate
        return left + 3, right + 3  # conv_pre


# ---- HiFT: the generator of the released weights (inference only) --------------------------------

N_FFT, STEP = 16, 4  # of the small STFT on the way in and out
HARMONICS, AMPLITUDE, NOISE = 9, 0.1, 0.003  # of the source


class HiFT(Vocoder):
    """Neural source-filter vocoder: HiFi-GAN's trunk filters a harmonic source made from pitch.

    The trunk stops 4 samples short of the wave and gives a spectrogram, which an inverse STFT ends.
    Module names are those of the released file. Plain weights only; 256 samples a frame.
    """

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        self.cfg, channels, bins = cfg, cfg.channels, N_FFT + 2  # real and imaginary
        self.conv_pre, self.ups, self.resblocks = trunk(cfg, snake=True)
        self.f0_predictor = PitchPredictor(cfg.n_mels, channels)
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(HARMONICS, 1)})
        widths = [channels >> (i + 1) for i in range(len(cfg.rates))]
        strides = [math.prod(cfg.rates[i + 1:]) for i in range(len(cfg.rates))]
        self.source_downs = nn.ModuleList(  # the source joins each stage at that stage's rate
            Conv1d(bins, c, 2 * r, r, padding=(r + 1) // 2) if r > 1 else Conv1d(bins, c, 1)
            for c, r in zip(widths, strides))
        self.source_resblocks = nn.ModuleList(
            ResBlock(c, kernel, (1, 3, 5), snake=True)
            for c, kernel in zip(widths, [7] * (len(widths) - 1) + [11]))
        self.conv_post = Conv1d(widths[-1], bins, 7)

    def context(self) -> tuple[int, int]:
        return 20, 20  # frames on either side that a sample depends on

    def begin(self, rows: int, rng: torch.Generator) -> Tensor:
        """All but the fundamental begin anywhere."""
        return F.pad(torch.rand(rows, 1, HARMONICS - 1, generator=rng), (1, 0))

    def excite(self, f0: Tensor, phase: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pitch (B, T) -> source (B, T * hop, 1), phase: sines with a little noise, or noise."""
        hertz, at, phase = cycles(f0, self.cfg, phase)
        tones, noise = AMPLITUDE * (2 * math.pi * at).sin(), torch.randn(at.shape, generator=rng)
        source = torch.where(hertz > VOICED, tones + NOISE * noise, AMPLITUDE / 3 * noise).to(f0)
        return self.m_source["l_linear"](source).tanh(), phase

    def filter(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel (B, T, M), source (B, N, 1) -> wave (B, N) in [-0.99, 0.99]."""
        window = torch.hann_window(N_FFT, device=mel.device)
        spec = torch.stft(source[..., 0], N_FFT, STEP, window=window, return_complex=True)
        spec = torch.cat([spec.real, spec.imag], 1)[:, :, None]  # (B, 18, 1, N/4+1)
        x = self.conv_pre(mel.transpose(1, 2)[:, :, None])  # (B, C, 1, T)
        n = len(self.cfg.mrf_kernels)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0, 0, 0), mode="reflect")  # N/4 + 1 frames, as the STFT has
            x = x + self.source_resblocks[i](self.source_downs[i](spec))
            x = sum(block(x) for block in self.resblocks[i * n : i * n + n]) / n
        log_magnitude, phase = self.conv_post(F.leaky_relu(x)).squeeze(2).chunk(2, 1)  # (B, 9, ...)
        spec = torch.polar(log_magnitude.exp().clamp(max=100), phase.sin())
        return torch.istft(spec, N_FFT, STEP, window=window).clamp(-0.99, 0.99)


VOCODERS = {"filter": SourceFilter, "hifigan": Generator, "hift": HiFT}


# ---- discriminators ------------------------------------------------------------------------------

class ConvStack(nn.Module):
    """Convolutions with LeakyReLU, a last one to a single score; every output is a feature map."""

    def __init__(self, norm, layers: list[tuple]):
        super().__init__()
        self.convs = nn.ModuleList(norm(Conv1d(*layer)) for layer in layers)
        self.post = norm(Conv1d(layers[-1][1], 1, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for c in self.convs:
            x = F.leaky_relu(c(x), SLOPE)
            features.append(x)
        score = self.post(x)
        return score, features + [score]


class Discriminator(nn.Module):
    """Multi period (sees every P-th sample; the P phases share weights only) and multi scale (the
    wave as it is, at half and at a quarter of the rate)."""

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        self.periods, strides = cfg.periods, [3] * (len(cfg.mpd) - 1) + [1]
        period = [(a, b, 5, s) for a, b, s in zip((1, *cfg.mpd), cfg.mpd, strides)]
        scale = [(a, *layer) for a, layer in zip((1, *(m[0] for m in cfg.msd)), cfg.msd)]
        self.mpd = nn.ModuleList(ConvStack(weight_norm, period) for _ in self.periods)
        self.msd = nn.ModuleList(
            ConvStack(norm, scale) for norm in (spectral_norm, weight_norm, weight_norm))

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Wave (B, N) -> one score map of each stack, all their feature maps."""
        views, half = [], wave[:, None, None]  # (B, 1, 1, N)
        for period in self.periods:
            x = F.pad(wave, (0, -wave.size(1) % period), mode="reflect")
            x = x.unflatten(1, (-1, period)).transpose(1, 2).flatten(0, 1)  # (B * P, N / P)
            views.append(x[:, None, None])  # (B * P, 1, 1, N / P)
        for _ in self.msd:
            views.append(half)
            half = F.avg_pool2d(half, (1, 4), (1, 2), (0, 2))
        pairs = [stack(x) for stack, x in zip((*self.mpd, *self.msd), views)]
        return [score for score, _ in pairs], [m for _, maps in pairs for m in maps]


# ---- losses (least squares GAN) ------------------------------------------------------------------

def discriminator_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Scores of real waves should be 1, of made ones 0."""
    return sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake))


def generator_loss(fake: list[Tensor]) -> Tensor:
    """The generator wants 1 for what it made."""
    return sum((1 - f).square().mean() for f in fake)


def feature_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Made waves should look like real ones inside the discriminators; weight 2 as in the paper."""
    return 2 * sum((r.detach() - f).abs().mean() for r, f in zip(real, fake))


def mel_loss(real: Tensor, fake: Tensor, cfg: VocoderConfig) -> Tensor:
    """L1 between full-band log mels of two waves (B, N), with its weight of 45."""
    return 45 * F.l1_loss(mel_spectrogram(fake, cfg, True), mel_spectrogram(real, cfg, True))


def stft_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Spectral convergence and L1 of log magnitudes of two waves (B, N), mean over four windows
    (Parallel WaveGAN, Yamamoto et al. 2020)."""
    loss = 0
    for size, hop in ((2048, 480), (1024, 240), (512, 120), (240, 50)):
        window = torch.hann_window(size, device=real.device)
        a, b = (torch.stft(w, size, hop, window=window, return_complex=True).abs().clamp(min=1e-4)
                for w in (real, fake))
        loss = loss + F.l1_loss(b.log(), a.log()) + (a - b).norm() / a.norm()
    return loss / 4


# ---- foreign weights -----------------------------------------------------------------------------

def fold_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace weight norm, in both of torch's spellings, by plain weights: w = v * g / |v|."""
    out = {}
    for name, w in state.items():
        if name.endswith((".weight_v", ".weight.original1")):
            base = name.partition(".parametrizations")[0].removesuffix(".weight_v")
            g = name[:-1] + {"v": "g", "1": "0"}[name[-1]]
            if g not in state:
                raise ValueError(f"{g}: missing")
            out[base + ".weight"] = torch._weight_norm(w, state[g])  # to the bit as in training
        elif not name.endswith((".weight_g", ".weight.original0")):
            out[name] = w
    return out


def load_hifigan(state: dict[str, Tensor]) -> Generator:
    """The generator of the original HiFi-GAN (22.05 kHz, V1, V2 or V3, told by its width)."""
    state = fold_weights(state)
    width = len(state.get("conv_pre.bias", ()))
    version = {512: 1, 128: 2, 256: 3}.get(width)
    if version is None:
        raise ValueError(f"expected a generator of HiFi-GAN with conv_pre.bias of 512, 128 or 256, "
                         f"found {width or 'none'}")
    generator = Generator(hifigan(version, 22050))
    generator.load_state_dict(state)
    return generator


def load_hift(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released vocoder (hift.pt of CosyVoice-300M) by our names: weight norm in either
    spelling, Snake's alpha as (C,) or (C, 1), names with or without the `generator.` of a GAN."""
    return {k.removeprefix("generator."): w.flatten() if k.endswith(".alpha") else w
            for k, w in fold_weights(state).items()}
