"""
Token2wav, first half: speech codes -> mel by conditional flow matching (paper: Token2wav).

A token encoder turns codes into a coarse mel `mu`; a U-Net predicts the velocity that carries
Gaussian noise to the real mel, given mu, a speaker vector and a stretch of known mel (the prompt).
One set of classes, two shapes:
  FlowConfig()             mini: causal, attention of bounded reach, 4 frames a code; streams
  FlowConfig.cosyvoice1()  the released CosyVoice-300M(-25Hz): full context, U-Net at two rates

Legend: B batch, L codes, T mel frames, S keys in reach, D width, M mel bins, H heads of width hd.
All features are time-major (B, T, D). References: Lipman et al. 2022 (flow matching), Matcha-TTS
(U-Net), CosyVoice (conditioning, guidance, cosine grid), Transformer-XL (relative positions).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


NOISE_BLOCK = 64  # frames of noise drawn from one seed
SEGMENT = 16      # chunks rendered together when many are at hand; bounds memory for any length
FIRST, HOP = 12, 48  # codes that a window of CosyVoice 1 adds, at first and at most
EDGE = 20         # codes before these that it sees, and at most after: the released overlap


# ---- primitives

class Tape:
    """Left context of every causal layer, in the order the layers run: read from the last segment,
    written for the next. So layers need no index, and all a state holds is a list of tensors."""

    def __init__(self, old: list[Tensor], reach: int):
        self.old, self.new, self.reach = old, [], reach  # frames of the past that attention sees

    def extend(self, x: Tensor, keep: int) -> Tensor:
        """x (B, T, D) -> (B, past + T, D); its last `keep` frames stay for the next segment."""
        if self.old:
            x = torch.cat([self.old[len(self.new)], x], 1)
        self.new.append(x[:, max(0, x.shape[1] - keep):].clone())  # a view would keep all of x
        return x


class Conv(nn.Conv1d):
    """Conv1d on (B, T, D). Causal: all padding on the left, or from the tape when streaming."""

    def __init__(self, d_in: int, d_out: int, kernel: int, causal: bool = False, stride: int = 1):
        super().__init__(d_in, d_out, kernel, stride)
        self.causal = causal

    def forward(self, x: Tensor, tape: Tape | None = None) -> Tensor:
        k, n = self.kernel_size[0], x.shape[1]
        if k > 1:  # shifts side by side and one matmul: on a CPU twice as fast as conv1d
            x = x if tape is None else tape.extend(x, k - 1)
            left, right = (n + k - 1 - x.shape[1], 0) if self.causal else (k // 2, k // 2)
            x = F.pad(x, (0, 0, left, right))
            x = torch.stack([x[:, i:i + n:self.stride[0]] for i in range(k)], -1)  # (B, T, D, k)
            x = x.flatten(2)
        return F.linear(x, self.weight.flatten(1), self.bias)


class Upsample(nn.ConvTranspose1d):
    """Twice the frames, (B, T, D) -> (B, 2T, D)."""

    def forward(self, x: Tensor, tape: None) -> Tensor:
        return super().forward(x.mT).mT


class GroupNorm(nn.GroupNorm):
    """GroupNorm on (B, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT.contiguous()


def real_frames(lengths: Tensor, total: int) -> Tensor | None:
    """valid (B, total), False on pads; None if there are none, because masks cost time."""
    if bool((lengths == total).all()):
        return None
    return torch.arange(total, device=lengths.device) < lengths[:, None]


def angles(x: Tensor, n: int, last: int) -> Tensor:
    """Positions or times x (N,) at n frequencies from 1 down to about 1e-4 (N, n)."""
    freq = torch.exp(torch.arange(n, device=x.device) * (-math.log(1e4) / last))
    return x[:, None].float() * freq


def stretch(x: Tensor, frames: int) -> Tensor:
    """(B, L, M) -> (B, frames, M)"""
    return F.interpolate(x.mT, frames, mode="linear").mT


def noise(seed: int, start: int, stop: int, mel: int) -> Tensor:
    """Noise of frames start..stop (1, stop - start, M): the same whoever asks, in any pieces."""
    first, end = start // NOISE_BLOCK, stop // NOISE_BLOCK + 1
    blocks = [torch.randn(NOISE_BLOCK, mel, generator=torch.Generator().manual_seed(
        (seed * 1_000_003 + i) % 2**63)) for i in range(first, end)]
    return torch.cat(blocks)[None, start - first * NOISE_BLOCK:stop - first * NOISE_BLOCK]


def attention_mask(x: Tensor, valid: Tensor | None, past: int, chunk: int,
                   left: int) -> Tensor | None:
    """Who sees whom in x (B, T, D), True (B or 1, 1, T, past + T); None if everybody sees everybody
    (fast path). With a chunk size a frame sees its own chunk and `left` before it; `past` is whole
    chunks. A pad (valid False) still sees itself, lest a softmax over nothing be NaN."""
    mask, t = None, x.shape[1]
    if chunk:
        key = torch.arange(past + t, device=x.device) // chunk
        query = key[past:, None]
        mask = (key <= query) & (key >= query - left)  # (T, S)
        mask = None if mask.all() else mask[None, None]
    if valid is None:
        return mask
    seen = valid[:, None, None] if mask is None else mask & valid[:, None, None]
    return seen | torch.eye(t, dtype=torch.bool, device=x.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA of (B, H, T, hd); on a CPU in bf16, if everybody sees everybody, by its parts, which
    run 1.4 times as fast there. They take memory, so not for more than some 10 s at once."""
    if mask is not None or q.dtype != torch.bfloat16 or not q.is_cpu or k.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows, (q, k, v) = q.shape[:2], (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    return (scores.float().softmax(-1).to(v) @ v).unflatten(0, rows)


# ---- blocks

class Attention(nn.Module):
    """Multi-head attention; `relative` adds Transformer-XL positions (the encoder has them, the
    U-Net knows order from its convolutions alone)."""

    def __init__(self, dim: int, heads: int, head_dim: int, relative: bool):
        super().__init__()
        self.heads, self.relative, inner = heads, relative, heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=relative)
        self.register_state_dict_post_hook(self.parted)
        self.register_load_state_dict_pre_hook(self.joined)
        self.out = nn.Linear(inner, dim)
        if relative:
            self.pos = nn.Linear(dim, inner, bias=False)
            self.bias_u = nn.Parameter(torch.zeros(heads, head_dim))
            self.bias_v = nn.Parameter(torch.zeros(heads, head_dim))

    @staticmethod
    def parted(home: "Attention", state: dict, prefix: str, _) -> None:
        """q, k and v are one product, but files keep them apart, as all do."""
        for kind, _ in home.qkv.named_parameters():  # weight, bias
            rows = state.pop(f"{prefix}qkv.{kind}").chunk(3)
            state.update({f"{prefix}{name}.{kind}": r for name, r in zip("qkv", rows)})

    @staticmethod
    def joined(home: "Attention", state: dict, prefix: str, *_) -> None:
        for kind, _ in home.qkv.named_parameters():
            keys = [f"{prefix}{name}.{kind}" for name in "qkv"]
            if all(key in state for key in keys):  # else torch's own error tells what is missing
                state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(key) for key in keys])

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., H, T, hd)

    def forward(self, x: Tensor, mask: Tensor | None, tape: Tape | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if tape is not None:
            k, v = (tape.extend(y, tape.reach) for y in (k, v))  # (B, S, H hd)
        q, k, v = map(self.split, (q, k, v))
        if self.relative:
            bias = self.distance_bias(q + self.bias_v[:, None], k.shape[2], x)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
            q = q + self.bias_u[:, None]
        y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def distance_bias(self, q: Tensor, s: int, x: Tensor) -> Tensor:
        """Scores (B, H, T, S) of q (B, H, T, hd) with the distance to each of s keys, of which the
        last T are the queries' own frames."""
        t = q.shape[2]
        distance = torch.arange(s - 1, -t, -1, device=x.device)  # s-1 ... -(t-1)
        angle = angles(distance, x.shape[-1] // 2, x.shape[-1] // 2)
        p = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # interleaved (S+T-1, D)
        p = self.split(self.pos(p.to(x.dtype)))  # (H, S+T-1, hd)
        score = q @ p.mT / math.sqrt(q.shape[-1])  # (B, H, T, S+T-1)
        # Row i has to start at column T-1-i. One column of padding and a change of the row length
        # move every row by its index.
        score = F.pad(score, (1, 0)).view(*q.shape[:2], s + t, t)[:, :, 1:]
        return score.reshape(*q.shape[:2], t, s + t - 1)[..., :s]


class Layer(nn.Module):
    """Pre-norm transformer layer: of the encoder (relative, SiLU) or of the U-Net (GELU)."""

    def __init__(self, dim: int, heads: int, head_dim: int, ffn: int, relative: bool):
        super().__init__()
        eps = 1e-12 if relative else 1e-5  # as released
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, head_dim, relative)
        act = nn.SiLU() if relative else nn.GELU()
        self.ff = nn.Sequential(nn.Linear(dim, ffn), act, nn.Linear(ffn, dim))

    def forward(self, x: Tensor, mask: Tensor | None, tape: Tape | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, tape)
        return x + self.ff(self.norm2(x))


class Block(nn.Module):
    def __init__(self, d_in: int, d_out: int, causal: bool):
        super().__init__()
        self.conv = Conv(d_in, d_out, 3, causal)
        self.norm = nn.LayerNorm(d_out) if causal else GroupNorm(8, d_out)

    def forward(self, x: Tensor, tape: Tape | None) -> Tensor:
        x = self.norm(self.conv(x, tape))  # mish is hardly different and costs a tenth of a step
        return F.silu(x) if self.conv.causal else F.mish(x)


class Stage(nn.Module):
    """A residual block of convolutions that is told the time, then transformer layers. `tail`, if
    any, is run by the U-Net, which takes the skip connection before it."""

    def __init__(self, cfg: "FlowConfig", d_in: int, d: int, tail: nn.Module | None = None):
        super().__init__()
        self.time, self.tail = nn.Linear(cfg.time_dim, d), tail
        self.block1, self.block2 = Block(d_in, d, cfg.causal), Block(d, d, cfg.causal)
        self.skip = Conv(d_in, d, 1)
        self.layers = nn.ModuleList(
            Layer(d, cfg.heads, cfg.head_dim, 4 * d, False) for _ in range(cfg.tf))

    def forward(self, x: Tensor, temb: Tensor, mask: Tensor | None, tape: Tape | None) -> Tensor:
        h = self.block1(x, tape) + self.time(F.mish(temb))[:, None]
        x = self.block2(h, tape) + self.skip(x)
        for layer in self.layers:
            x = layer(x, mask, tape)
        return x


# ---- config

@dataclass
class FlowConfig:
    codes: int = 512  # size of the codebook
    mel: int = 80
    spk_dim: int = 192
    dim: int = 160  # token encoder
    enc_layers: int = 2
    enc_heads: int = 4
    enc_ffn: int = 640
    look_ahead: int = 3  # codes beyond its chunk that the encoder sees (only with causal)
    channels: tuple[int, ...] = (192,)  # U-Net: a width a level; all but the last halve the rate
    mid: int = 2  # stages between down and up
    tf: int = 1  # transformer layers a stage
    heads: int = 3
    head_dim: int = 64
    time_dim: int = 256
    causal: bool = True  # causal convolutions, LayerNorm, chunks; else GroupNorm, full context
    chunk: int = 24  # frames: 6 codes, 240 ms
    left_chunks: int = 3  # chunks of the past in reach of attention
    frames_per_code: float = 4.0
    mel_mean: float = -6.0  # log-mel of speech is about N(-6, 2.6); the flow works on N(0, 1)
    mel_std: float = 2.6
    spread: float = 0.4  # ours: how far mel is from mu, in mel_std; 0 as in CosyVoice: not said
    prompted: float = 0.5  # training: the share of samples that know some of the mel's beginning,
    prompt: float = 0.3  # at most this part of it: so a prompt's voice goes on
    drop: float = 0.2  # training: the share without condition, which guidance needs
    guidance: float = 0.7  # how strong that is

    @classmethod
    def cosyvoice1(cls, rate: int = 25) -> "FlowConfig":
        """CosyVoice-300M-25Hz, or CosyVoice-300M (rate=50), which has the same 104,874,752
        parameters; mel at 22,050 Hz, hop 256, as it is."""
        return cls(codes=4096, dim=512, enc_layers=6, enc_heads=8, enc_ffn=2048, look_ahead=0,
                   channels=(256, 256), mid=12, tf=4, heads=8, time_dim=1024, causal=False,
                   chunk=0, left_chunks=0, frames_per_code=22050 / 256 / rate,
                   mel_mean=0.0, mel_std=1.0, spread=0.0)

    @property
    def chunk_codes(self) -> int:
        return int(self.chunk / self.frames_per_code)

    def frames(self, codes: int) -> int:
        """Mel frames that so many codes become."""
        return int(codes * self.frames_per_code)


# ---- model

class Encoder(nn.Module):
    def __init__(self, cfg: FlowConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.dim
        self.proj, self.proj_norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.look = nn.Conv1d(d, d, 2 * cfg.look_ahead + 1) if cfg.look_ahead else None
        self.layers = nn.ModuleList(
            Layer(d, cfg.enc_heads, d // cfg.enc_heads, cfg.enc_ffn, True)
            for _ in range(cfg.enc_layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, x, valid=None, pad=None, past=0, tape=None) -> Tensor:
        """Embedded codes (B, L, D) -> (B, L, D). Streaming hands over `look_ahead` neighbours on
        either side too and says in `pad` how many of them do not exist; `past` codes are taped."""
        cfg, n = self.cfg, self.cfg.look_ahead
        x = self.proj_norm(self.proj(x)) * math.sqrt(cfg.dim)
        if self.look is not None:
            a, b = pad or (n, n)
            x = x if valid is None else x * valid[..., None]
            seen = self.look(F.pad(x, (0, 0, a, b)).mT).mT
            x = x[:, n - a:x.shape[1] - n + b] + F.gelu(seen)
        mask = attention_mask(x, valid, past, cfg.chunk_codes, cfg.left_chunks)
        for layer in self.layers:
            x = layer(x, mask, tape)
        return self.norm(x)


class Regulator(nn.Module):
    """CosyVoice 1: smooths mu (B, T, M) after its codes were stretched to frames."""

    def __init__(self, mel: int):
        super().__init__()
        self.convs = nn.ModuleList(Conv(mel, mel, 3) for _ in range(4))
        self.norms = nn.ModuleList(GroupNorm(1, mel) for _ in range(4))
        self.out = Conv(mel, mel, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = F.mish(norm(conv(x)))
        return self.out(x)


class Estimator(nn.Module):
    """The U-Net: velocity at the point x of the path from noise to mel, at time t."""

    def __init__(self, cfg: FlowConfig):
        super().__init__()
        self.cfg, ch, last = cfg, cfg.channels, len(cfg.channels) - 1
        self.time = nn.Sequential(nn.Linear(4 * cfg.mel, cfg.time_dim), nn.SiLU(),
                                  nn.Linear(cfg.time_dim, cfg.time_dim))
        self.down = nn.ModuleList(
            Stage(cfg, a, b, Conv(b, b, 3, cfg.causal, stride=1 if i == last else 2))
            for i, (a, b) in enumerate(zip((4 * cfg.mel,) + ch, ch)))
        self.mid = nn.ModuleList(Stage(cfg, ch[-1], ch[-1]) for _ in range(cfg.mid))
        self.up = nn.ModuleList(
            Stage(cfg, 2 * a, b,
                  Conv(b, b, 3, cfg.causal) if i == last else Upsample(b, b, 4, 2, 1))
            for i, (a, b) in enumerate(zip(ch[::-1], ch[-2::-1] + ch[:1])))
        self.final_block, self.final = Block(ch[0], ch[0], cfg.causal), Conv(ch[0], cfg.mel, 1)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv1d)):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.zeros_(self.final.weight)  # ours: velocity 0 is a better first guess than any

    def forward(self, x, mu, spk, cond, t, valid=None, past=0, tape=None) -> Tensor:
        """x, mu, cond (B, T, M), spk (B, M), t (B,), valid (B, T) or None -> (B, T, M)"""
        cfg, skips = self.cfg, []
        angle = angles(1000 * t, 2 * cfg.mel, 2 * cfg.mel - 1)
        temb = self.time(torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype))  # (B, time_dim)
        base = self.base(x, mu, t[:, None, None].to(x.dtype)) if cfg.spread else 0.0
        mask = attention_mask(x, valid, past, cfg.chunk, cfg.left_chunks)
        x = torch.cat([x, mu, spk[:, None].expand_as(x), cond], -1)  # (B, T, 4M)
        for stage in self.down:
            skips.append(stage(x, temb, mask, tape))
            x = stage.tail(skips[-1], tape)
        for stage in self.mid:
            x = stage(x, temb, mask, tape)
        for stage in self.up:
            skip = skips.pop()
            x = torch.cat([x[:, :skip.shape[1]], skip], -1)  # an odd length came back one longer
            x = stage.tail(stage(x, temb, mask, tape), tape)
        return base + self.final(self.final_block(x, tape))

    def base(self, x: Tensor, mu: Tensor, t: Tensor) -> Tensor:
        """The velocity at x if the mel were N(mu, spread^2), or N(0, 1) where mu is withheld. That
        needs no network, and ours starts from it: a small one else spends its training on
        carrying the noise from x to the output."""
        var = torch.where((mu == 0).all(2).all(1), 1.0, self.cfg.spread ** 2)[:, None, None]
        pull = (t * var - (1 - t)) / ((1 - t).square() + t.square() * var)
        return mu + pull * (x - t * mu)


@dataclass
class FlowState:
    """What streaming remembers. Never changed in place, so that one state, which has heard the
    prompt, can begin any number of replies; of a size that does not grow with the reply."""
    spk: Tensor  # (1, M) projected
    prompt: Tensor  # (1, P, M) normalised mel of the prompt
    steps: int
    cfg: float
    seed: int
    codes: Tensor  # (1, n) not rendered yet, and up to `look_ahead` or EDGE rendered ones before
    done: int  # codes rendered; of a causal flow, the prompt's included
    encoder: list[Tensor]  # tape: keys, values (1, reach, D)
    solver: list[list[Tensor]]  # a tape an Euler step (2, n, D)
    heard: Tensor  # codes of the prompt (1, P), which full context sees in every window
    tail: Tensor  # (1, t, M) only full context: what the last window made of later codes


class Flow(nn.Module):
    def __init__(self, cfg: FlowConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.codes, cfg.dim)
        self.spk_proj = nn.Linear(cfg.spk_dim, cfg.mel)
        self.encoder = Encoder(cfg)
        self.mu_proj = nn.Linear(cfg.dim, cfg.mel)
        self.regulator = None if cfg.causal else Regulator(cfg.mel)
        self.estimator = Estimator(cfg)
        # codes to hand to `stream` at a time: three chunks, a good part of the speed of many
        self.hop_codes = 3 * cfg.chunk_codes if cfg.causal else FIRST + FIRST // 2

    def forward(self, codes: Tensor, code_lengths: Tensor, mel: Tensor,
                spk: Tensor) -> tuple[Tensor, Tensor]:
        """codes (B, L), code_lengths (B,), natural-log mel (B, >= frames(L), M), spk (B, spk_dim)
        -> mel as guessed in one step (B, T, M), loss. ValueError for odd codes or a short mel.

        The loss is over all frames, the prompt's too: the released switch against it is not read.
        """
        b, device = len(codes), mel.device
        frames = torch.tensor([self.cfg.frames(n) for n in code_lengths.tolist()], device=device)
        total = int(frames.max())
        if mel.shape[1] < total:
            raise ValueError(f"mel has {mel.shape[1]} frames, its codes make {total}")
        x1, valid = self.normalise(mel[:, :total]), real_frames(frames, total)
        mu = self.mean(codes, code_lengths, frames)
        count = torch.ones_like(x1) if valid is None else valid[..., None].expand_as(x1)
        # Ours has mu be an average mel (Matcha-TTS's prior loss): codes are heeded far sooner.
        prior = ((mu - x1).square() * count).sum() if self.cfg.spread else 0.0
        known = (torch.rand(b, device=device) * self.cfg.prompt * frames).long()
        known = known * (torch.rand(b, device=device) < self.cfg.prompted)
        cond = x1 * (torch.arange(total, device=device) < known[:, None])[..., None]
        # Guidance contrasts the model with itself unconditioned: some samples teach that.
        keep = (torch.rand(b, 1, device=device) >= self.cfg.drop).to(mu.dtype)
        mu, cond, voice = mu * keep[..., None], cond * keep[..., None], self.voice(spk) * keep

        z, t = torch.randn_like(x1), torch.rand(b, device=device)
        s = t[:, None, None].to(x1.dtype)
        xt = (1 - s) * z + s * x1  # published with sigma = 1e-6, which is too small to matter
        v = self.estimator(xt, mu, voice, cond, t, valid)
        error = ((v - (x1 - z)).square() * count).sum()
        return self.denormalise(xt + (1 - s) * v), (error + prior) / count.sum()

    def normalise(self, mel: Tensor) -> Tensor:
        return (mel - self.cfg.mel_mean) / self.cfg.mel_std

    def denormalise(self, mel: Tensor) -> Tensor:
        return mel * self.cfg.mel_std + self.cfg.mel_mean

    def voice(self, spk: Tensor) -> Tensor:
        return self.spk_proj(F.normalize(spk, dim=-1))  # (B, M)

    def check(self, codes: Tensor) -> Tensor:
        bad = codes[(codes < 0) | (codes >= self.cfg.codes)]
        if len(bad):
            raise ValueError(f"speech code {int(bad[0])} is not in 0..{self.cfg.codes - 1}")
        return codes.long()

    def mean(self, codes: Tensor, lengths: Tensor, frames: Tensor) -> Tensor:
        """mu (B, frames.max(), M) of a batch of codes (B, L). Only a causal flow knows pads."""
        valid, total = real_frames(lengths, codes.shape[1]), int(frames.max())
        codes = self.check(codes if valid is None else codes * valid)
        mu = self.mu_proj(self.encoder(self.embed(codes), valid))  # (B, L, M)
        if self.regulator is None:
            return mu.repeat_interleave(int(self.cfg.frames_per_code), 1)[:, :total]
        if valid is not None:
            raise ValueError("a flow of full context trains on clips of one length")
        return self.regulator(stretch(mu, total))

    def generate(self, codes: Tensor, *voice, **how) -> Tensor:
        """codes (1, L) -> mel (1, frames(L), M); `voice` and `how` as of `start`."""
        return self.stream(codes, self.start(*voice, **how), final=True)[0]

    @torch.no_grad()
    def start(self, spk: Tensor, prompt_codes: Tensor | None = None,
              prompt_mel: Tensor | None = None, steps: int = 10, cfg: float | None = None,
              seed: int = 0) -> FlowState:
        """The state before the first code: spk (1, spk_dim), prompt_codes (1, P), prompt_mel
        (1, frames(P), M); `cfg` is the strength of guidance, if not the config's (0 halves the
        work). A causal flow renders the prompt here, once: keep the state for later replies with
        this voice and seed. ValueError for codes outside the codebook or a prompt mel that does not
        fit its codes."""
        if prompt_codes is None:
            prompt_codes = torch.zeros(1, 0, dtype=torch.long, device=spk.device)
        if prompt_mel is None:
            prompt_mel = spk.new_zeros(1, 0, self.cfg.mel)
        n, got = prompt_codes.shape[1], prompt_mel.shape[1]
        need = self.cfg.frames(n)
        if got < need - (0 if self.cfg.causal else 6) or (got > 0) != (n > 0):
            raise ValueError(f"prompt: {n} codes make {need} mel frames, got {got}")
        if self.cfg.causal:
            prompt_mel = prompt_mel[:, :need]
        cfg = self.cfg.guidance if cfg is None else cfg
        state = FlowState(self.voice(spk), self.normalise(prompt_mel), steps, cfg, seed,
                          codes=prompt_codes[:, :0], done=0, encoder=[], solver=[[]] * steps,
                          heard=self.check(prompt_codes), tail=prompt_mel[:, :0])
        return self.stream(prompt_codes, state, final=False)[1] if self.cfg.causal else state

    @torch.no_grad()
    def stream(self, codes: Tensor, state: FlowState, final: bool) -> tuple[Tensor, FlowState]:
        """More codes (1, n >= 0) -> the mel now certain (1, T >= 0, M), state. In sum exactly what
        `generate` returns, if the flow is causal: a chunk leaves once `look_ahead` codes after it
        are there, the rest with `final`. Of full context: of the same length, and near it."""
        state = replace(state, codes=torch.cat([state.codes, self.check(codes)], 1))
        render, mels, done = self.segment if self.cfg.causal else self.window, [], None
        while done != state.done:
            done = state.done
            mel, state = render(state, final)
            mels.append(mel)
        return self.denormalise(torch.cat(mels, 1)), state

    def segment(self, state: FlowState, final: bool) -> tuple[Tensor, FlowState]:
        """Render whole chunks whose neighbours are there, `final` all codes, up to a bound."""
        cfg, ahead = self.cfg, self.cfg.look_ahead
        before = min(state.done, ahead)  # rendered codes still at hand as neighbours
        n = state.codes.shape[1] - before
        if not final:
            n = max(0, n - ahead) // cfg.chunk_codes * cfg.chunk_codes
        if n == 0:
            return state.prompt[:, :0], state
        n = min(n, SEGMENT * cfg.chunk_codes)
        seen = state.codes[:, :before + n + ahead]
        pad = (ahead - before, before + n + ahead - seen.shape[1])
        reach = cfg.left_chunks * cfg.chunk_codes
        past, tape = min(state.done, reach), Tape(state.encoder, reach)
        tapes = [Tape(old, cfg.frames(reach)) for old in state.solver]
        mu = self.mu_proj(self.encoder(self.embed(seen), None, pad, past, tape))  # (1, n, M)
        mu = mu.repeat_interleave(int(cfg.frames_per_code), 1)  # (1, T, M)
        start = cfg.frames(state.done)
        z = noise(state.seed, start, start + mu.shape[1], cfg.mel)
        x = self.solve(z, mu, state, start, cfg.frames(past), tapes)
        drop = max(0, before + n - ahead)
        state = replace(state, codes=state.codes[:, drop:], done=state.done + n, encoder=tape.new,
                        solver=[t.new for t in tapes])
        return x[:, max(0, state.prompt.shape[1] - start):], state

    def window(self, state: FlowState, final: bool) -> tuple[Tensor, FlowState]:
        """Full context, CosyVoice 1: all codes at once where `final` finds nothing rendered, else
        windows of prompt, rendered codes, new ones and some ahead, whose mel is held back and faded
        into what the next window makes of them. Every frame has its own noise in all windows; the
        released code keeps it for 34 frames of overlap, 20 codes at 50 Hz, whatever the rate."""
        done, known, frames = state.done, state.prompt.shape[1], self.cfg.frames
        before, hop = min(done, EDGE), min(max(done, FIRST), HOP)
        n, ahead = state.codes.shape[1] - before, min(hop // 2, EDGE)
        if n < hop + ahead or final and not done:
            hop, ahead = n if final else 0, 0
        if hop == 0:
            return state.prompt[:, :0], state
        codes = torch.cat([state.heard, state.codes[:, :before + hop + ahead]], 1)
        first, now, end, last = map(frames, (done - before, done, done + hop, done + hop + ahead))
        h = self.mu_proj(self.encoder(self.embed(codes)))
        n, size, edge = before + hop + ahead, last - first, frames(EDGE)
        # Prompt and reply are stretched apart, and so are both ends of a long reply, as released.
        long = n > 2 * EDGE
        parts = h.split([state.heard.shape[1], *([EDGE, n - 2 * EDGE, EDGE] if long else [n])], 1)
        sizes = [known, *([edge, size - 2 * edge, edge] if long else [size])]
        mu = self.regulator(torch.cat([stretch(h, t) for h, t in zip(parts, sizes) if t], 1))
        z = torch.cat([noise(state.seed, a, b, self.cfg.mel)
                       for a, b in ((0, known), (known + first, known + last))], 1)
        x = self.solve(z, mu, state, 0, 0, [None] * state.steps)[:, known + now - first:]
        held = state.tail.shape[1]
        fade = (torch.arange(held, device=x.device)[:, None] + 0.5) / held
        x[:, :held] = state.tail.lerp(x[:, :held], fade)
        return x[:, :end - now], replace(
            state, codes=state.codes[:, max(0, before + hop - EDGE):], done=done + hop,
            tail=x[:, end - now:].clone())

    def solve(self, x: Tensor, mu: Tensor, state: FlowState, start: int, past: int,
              tapes: list[Tape | None]) -> Tensor:
        """Euler's method from noise x to mel for the frames of mu (1, T, M), the first of which is
        frame `start`. The cosine grid takes its small steps first, where the path is undecided."""
        x, frames = x.to(mu), mu.shape[1]
        rows = 2 if state.cfg else 1  # the second has no condition, for guidance
        known = state.prompt[:, start:start + frames]
        cond = F.pad(known, (0, 0, 0, frames - known.shape[1]))
        fade = torch.tensor([1.0, 0.0], device=mu.device, dtype=mu.dtype)[:rows, None]
        low = self.estimator.final.weight.dtype  # the U-Net's may be bf16; sums stay in float32
        mu, cond, spk = (given.to(low) for given in (
            mu * fade[..., None], cond * fade[..., None], state.spk * fade))
        grid = 1 - torch.cos(math.pi / 2 * torch.linspace(0, 1, state.steps + 1, device=mu.device))
        for tape, t, t_next in zip(tapes, grid, grid[1:]):
            v = self.estimator(x.expand(rows, -1, -1).to(low), mu, spk, cond, t.expand(rows),
                               past=past, tape=tape).to(x)
            x = x + (t_next - t) * ((1 + state.cfg) * v[:1] - state.cfg * v[-1:])
        return x


# ---- loading of released weights

COSYVOICE1 = (  # released name, ours; applied in turn wherever they match
    ("input_embedding.", "embed."), ("spk_embed_affine_layer.", "spk_proj."),
    ("encoder_proj.", "mu_proj."), ("encoder.embed.out.0.", "encoder.proj."),
    ("encoder.embed.out.1.", "encoder.proj_norm."), ("encoder.after_norm.", "encoder.norm."),
    ("encoder.encoders.", "encoder.layers."), ("self_attn.linear_", "attn."),
    ("self_attn.pos_", "attn."), ("feed_forward.w_1.", "ff.0."), ("feed_forward.w_2.", "ff.2."),
    ("norm_mha.", "norm1."), ("norm_ff.", "norm2."),
    ("length_regulator.model.12.", "regulator.out."),
    *((f"length_regulator.model.{3 * i}.", f"regulator.convs.{i}.") for i in range(4)),
    *((f"length_regulator.model.{3 * i + 1}.", f"regulator.norms.{i}.") for i in range(4)),
    ("decoder.estimator.", "estimator."),
    ("time_mlp.linear_1.", "time.0."), ("time_mlp.linear_2.", "time.2."),
    ("final_proj.", "final."),
    *((f"{part}_blocks.{i}.{a}", f"{part}.{i}.{b}") for part in ("down", "mid", "up")
      for i in range(12) for a, b in (("0.", ""), ("1.", "layers."), ("2.conv.", "tail."),
                                      ("2.", "tail."))),
    ("mlp.1.", "time."), ("res_conv.", "skip."), ("block.0.", "conv."), ("block.1.", "norm."),
    ("attn1.to_out.0.", "attn.out."), ("attn1.to_", "attn."), ("norm3.", "norm2."),
    ("ff.net.0.proj.", "ff.0."), ("ff.net.2.", "ff.2."))


def load_cosyvoice1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released flow.pt (25 or 50 Hz) under the names of Flow(FlowConfig.cosyvoice1()). Whoever
    loads the result sees whether all is there, and nothing else."""
    found = {}
    for key, weight in state.items():
        name = key
        for old, new in COSYVOICE1:
            name = name.replace(old, new)
        if name in found:
            raise ValueError(f"{key}: twice in this file")
        found[name] = weight
    return found
