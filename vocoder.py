"""
The vocoder: mel frames -> 24 kHz waveform (last half of the paper's Token2wav module).

HiFi-GAN is a stack of transposed convolutions, each followed by the mean of a few residual blocks of
different width ("multi receptive field fusion"), trained against two families of discriminators: one
looks at the wave folded by a prime period, the other at the wave at three time scales.

Legend: B batch, N samples, T mel frames (T = N // hop), M mel bins, C channels, P period.
Mels are time-major (B, T, M) at the border of this file, waves are (B, N); inside all is (B, C, time).

References: HiFi-GAN (Kong et al. 2020, arXiv 2010.05646) and its released weights.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SLOPE = 0.1  # of every LeakyReLU but the last one, which has torch's default 0.01


@dataclass
class VocoderConfig:
    """The defaults are our mini: HiFi-GAN V2's width at 24 kHz, with light discriminators."""

    sample_rate: int = 24000
    n_fft: int = 1024
    win: int = 1024
    hop: int = 240  # samples a frame = product of rates
    n_mels: int = 80
    fmin: float = 0.0
    fmax: float | None = 8000.0  # of the input mel; None = half the sample rate
    resblock: str = "1"  # "1": pairs of convolutions, "2": single ones (V3)
    channels: int = 128  # halved by every upsampling stage
    rates: tuple[int, ...] = (6, 5, 4, 2)
    kernels: tuple[int, ...] = (12, 10, 8, 4)  # twice the rate: every output sees two inputs
    mrf_kernels: tuple[int, ...] = (3, 7, 11)
    mrf_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    mpd_channels: tuple[int, ...] = (16, 64, 128, 128, 128)
    msd_channels: tuple[int, ...] = (32, 32, 64, 128, 256, 256, 256)


def hifigan(version: int, sample_rate: int = 24000) -> VocoderConfig:
    """HiFi-GAN V1, V2 or V3 with full discriminators, at 24 kHz / hop 240 or 22.05 kHz / hop 256."""
    hop, rates = {22050: (256, (8, 8, 2, 2)), 24000: (240, (6, 5, 4, 2))}[sample_rate]
    size = dict(channels={1: 512, 2: 128}.get(version, 256), rates=rates)
    if version == 3:
        size |= dict(resblock="2", rates=(8, 8, 4) if hop == 256 else (8, 6, 5),
                     mrf_kernels=(3, 5, 7), mrf_dilations=((1, 2), (2, 6), (3, 12)))
    return VocoderConfig(sample_rate, hop=hop, kernels=tuple(2 * r for r in size["rates"]), **size,
                         mpd_channels=(32, 128, 512, 1024, 1024),
                         msd_channels=(128, 128, 256, 512, 1024, 1024, 1024))


# ---------------------------------------------------------------------------------------------------
# mel


def mel_filters(cfg: VocoderConfig, fmax: float) -> Tensor:
    """Slaney's triangles, linear below 1 kHz and logarithmic above, each of area one -> (M, bins)."""
    step = math.log(6.4) / 27  # 27 mels from 1 kHz to 6.4 kHz
    to_mel = lambda f: f * 3 / 200 if f < 1000 else 15 + math.log(f / 1000) / step
    mels = torch.linspace(to_mel(cfg.fmin), to_mel(fmax), cfg.n_mels + 2, dtype=torch.float64)
    hz = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * step))
    bins = torch.linspace(0, cfg.sample_rate / 2, cfg.n_fft // 2 + 1, dtype=torch.float64)
    slopes = (bins - hz[:, None]) / hz.diff(append=hz[-1:] + 1)[:, None]  # rising, one per corner
    falls = (hz[2:, None] - bins) / (hz[2:] - hz[1:-1])[:, None]
    area = 2 / (hz[2:] - hz[:-2])
    return (torch.minimum(slopes[:-2], falls).clamp(min=0) * area[:, None]).float()


def mel_spectrogram(wave: Tensor, cfg: VocoderConfig, full_band: bool = False) -> Tensor:
    """Wave (B, N) in [-1, 1] -> natural-log mel (B, N // hop, M); N > (n_fft - hop) / 2.

    full_band: filters up to half the sample rate. The loss must hear what the input does not show.
    """
    fmax = cfg.sample_rate / 2 if full_band or cfg.fmax is None else cfg.fmax
    # (n_fft - hop) / 2 on each side makes frame t centre on the samples of frame t, without one extra
    wave = F.pad(wave.float(), [(cfg.n_fft - cfg.hop) // 2] * 2, mode="reflect")
    window = torch.hann_window(cfg.win, device=wave.device)
    spec = torch.stft(wave, cfg.n_fft, cfg.hop, cfg.win, window, center=False, return_complex=True)
    magnitude = torch.view_as_real(spec).square().sum(-1).add(1e-9).sqrt()  # (B, bins, T)
    mel = mel_filters(cfg, fmax).to(wave.device) @ magnitude  # (B, M, T)
    return mel.clamp(min=1e-5).log().transpose(1, 2)


# ---------------------------------------------------------------------------------------------------
# generator


def conv(c_in: int, c_out: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(c_in, c_out, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)


class ResBlock(nn.Module):
    """Residual convolutions of growing dilation; kind "1" puts an undilated one behind each."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], kind: str):
        super().__init__()
        first = nn.ModuleList(conv(channels, channels, kernel, d) for d in dilations)
        if kind == "1":
            self.convs1 = first
            self.convs2 = nn.ModuleList(conv(channels, channels, kernel) for _ in dilations)
        else:
            self.convs = first
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "2":
            for c in self.convs:
                x = x + c(F.leaky_relu(x, SLOPE))
            return x
        for c1, c2 in zip(self.convs1, self.convs2):
            x = x + c2(F.leaky_relu(c1(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


@dataclass
class StreamState:
    """What a stream must remember: recent mel frames, the first `done` of which are already wave."""

    mel: Tensor  # (1, t, M)
    done: int = 0


class Generator(nn.Module):
    """HiFi-GAN. Born with plain weights; `unfold()` before the optimiser, to train with weight norm."""

    # The original also draws N(0, 0.01) weights, but onto the product of weight norm, where the draw
    # is lost at the first forward. Its published models thus began with torch's default, as ours do.

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        if math.prod(cfg.rates) != cfg.hop:
            raise ValueError(f"rates {cfg.rates} do not multiply to hop {cfg.hop}")
        self.cfg = cfg
        self.conv_pre = conv(cfg.n_mels, cfg.channels, 7)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        c = cfg.channels
        for rate, kernel in zip(cfg.rates, cfg.kernels):
            c //= 2
            # length is T * rate exactly: cut ceil((kernel - rate) / 2) left and floor of it right
            self.ups.append(nn.ConvTranspose1d(2 * c, c, kernel, rate, (kernel - rate + 1) // 2,
                                               output_padding=(kernel - rate) % 2))
            for k, d in zip(cfg.mrf_kernels, cfg.mrf_dilations):
                self.resblocks.append(ResBlock(c, k, d, cfg.resblock))
        self.conv_post = conv(c, 1, 7)

    def forward(self, mel: Tensor) -> Tensor:
        """Mel (B, T, M) -> wave (B, T * hop) in (-1, 1)."""
        x = self.conv_pre(mel.transpose(1, 2))  # (B, C, T)
        n = len(self.cfg.mrf_kernels)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))  # (B, C / 2, time * rate)
            x = sum(block(x) for block in self.resblocks[i * n : i * n + n]) / n
        return self.conv_post(F.leaky_relu(x)).tanh().squeeze(1)  # (B, N)

    def unfold(self) -> "Generator":
        """Split every weight into length and direction (weight norm), for training."""
        for m in self.modules():
            if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)):
                weight_norm(m)  # dim 0, which for the transposed ones is the input channel
        return self

    def fold(self) -> "Generator":
        """Back to plain weights, which run faster; the function stays the same."""
        for m in list(self.modules()):
            if parametrize.is_parametrized(m, "weight"):
                parametrize.remove_parametrizations(m, "weight")
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

    @torch.inference_mode()
    def stream(self, mel: Tensor, state: StreamState | None, final: bool
               ) -> tuple[Tensor, StreamState]:
        """Next mel frames (1, t, M), t >= 0 -> the wave (1, n) that is certain by now, new state.

        The pieces join to exactly what `forward` makes of all frames at once: a frame is rendered
        as soon as its right context has arrived, with as many old frames before it as it can see.
        """
        state = state or StreamState(mel[:, :0])
        frames, done = torch.cat([state.mel, mel], 1), state.done
        left, right = self.context()
        end = frames.size(1) if final else max(done, frames.size(1) - right)
        hop, keep = self.cfg.hop, max(0, end - left)
        wave = self(frames)[:, done * hop : end * hop] if end > done else frames.new_zeros(1, 0)
        return wave, StreamState(frames[:, keep:], end - keep)


# ---------------------------------------------------------------------------------------------------
# discriminators: forward(wave (B, N)) -> (one score map each, all their feature maps)


class ConvStack(nn.Module):
    """Convolutions with LeakyReLU, a last one to a single score; every output is a feature map."""

    def __init__(self, convs: list[nn.Module], post: nn.Module):
        super().__init__()
        self.convs, self.post = nn.ModuleList(convs), post

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for c in self.convs:
            x = F.leaky_relu(c(x), SLOPE)
            features.append(x)
        score = self.post(x)
        return score, features + [score]


class MPD(nn.Module):
    """Multi period discriminator: sees every P-th sample. The P phases share weights, not context."""

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        self.periods, c = cfg.periods, (1, *cfg.mpd_channels)
        # (the original has 2-d convolutions of width 1 over (time, phase): the same thing)
        self.stacks = nn.ModuleList(ConvStack(
            [weight_norm(nn.Conv1d(c[i], c[i + 1], 5, 3 if i < 4 else 1, 2)) for i in range(5)],
            weight_norm(nn.Conv1d(c[-1], 1, 3, 1, 1))) for _ in self.periods)

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scores, features = [], []
        for period, stack in zip(self.periods, self.stacks):
            x = F.pad(wave[:, None], (0, -wave.size(1) % period), mode="reflect")
            x = x.unflatten(2, (-1, period)).transpose(1, 3).flatten(0, 1)  # (B, P, N/P, 1)
            score, maps = stack(x.transpose(1, 2).contiguous())  # (B * P, 1, N / P)
            scores, features = scores + [score], features + maps
        return scores, features


class MSD(nn.Module):
    """Multi scale discriminator: the wave as it is, at half and at a quarter of the rate."""

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        c = (1, *cfg.msd_channels)
        kernels, strides, groups = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, 16, 16, 16, 16, 1)
        self.stacks = nn.ModuleList(ConvStack(
            [norm(nn.Conv1d(c[i], c[i + 1], k, s, k // 2, groups=g))
             for i, (k, s, g) in enumerate(zip(kernels, strides, groups))],
            norm(nn.Conv1d(c[-1], 1, 3, 1, 1))) for norm in (spectral_norm, weight_norm, weight_norm))

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scores, features, x = [], [], wave[:, None]  # (B, 1, N)
        for stack in self.stacks:
            score, maps = stack(x)
            scores, features = scores + [score], features + maps
            x = F.avg_pool1d(x, 4, 2, 2)
        return scores, features


class Discriminator(nn.Module):
    """Both families as one module."""

    def __init__(self, cfg: VocoderConfig):
        super().__init__()
        self.mpd, self.msd = MPD(cfg), MSD(cfg)

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        (s1, f1), (s2, f2) = self.mpd(wave), self.msd(wave)
        return s1 + s2, f1 + f2


# ---------------------------------------------------------------------------------------------------
# losses (least squares GAN)


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


# ---------------------------------------------------------------------------------------------------
# foreign weights


def fold_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace weight norm, in both of torch's spellings, by plain weights: w = v * g / |v|.

    `fold_weights(generator.state_dict())` is the checkpoint of a generator that goes on training.
    """
    out = {}
    for name, v in state.items():
        for g_end, v_end in ((".weight_g", ".weight_v"), (".parametrizations.weight.original0",
                                                          ".parametrizations.weight.original1")):
            if name.endswith(v_end):
                base = name.removesuffix(v_end)
                length = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
                name, v = base + ".weight", v * (state[base + g_end] / length)
        if not name.endswith((".weight_g", ".original0")):
            out[name] = v
    return out


def load_exact(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load `state`, or raise ValueError naming the first key that is missing, unknown or misshapen."""
    own = module.state_dict()
    for name in own.keys() | state.keys():
        if name not in own or name not in state:
            raise ValueError(f"{name}: {'unknown key' if name in state else 'missing key'}")
        if own[name].shape != state[name].shape:
            raise ValueError(f"{name}: {tuple(state[name].shape)}, not {tuple(own[name].shape)}")
    module.load_state_dict(state)


def load_hifigan(path: str) -> Generator:
    """A generator file of the original HiFi-GAN (22.05 kHz, V1, V2 or V3, told by its width)."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = fold_weights(state.get("generator", state))
    version = {512: 1, 128: 2, 256: 3}.get(len(state["conv_pre.bias"]))
    if version is None:
        raise ValueError(f"conv_pre.bias: no HiFi-GAN has width {len(state['conv_pre.bias'])}")
    generator = Generator(hifigan(version, 22050))
    load_exact(generator, state)
    return generator
