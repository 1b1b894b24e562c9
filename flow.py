"""
Token2wav, first half: speech codes -> mel, by conditional flow matching (paper: Token2wav; CosyVoice).

A token encoder turns codes into a coarse mel `mu`; a U-Net predicts the velocity that carries Gaussian noise to
the real mel, given mu, a speaker vector and a stretch of known mel (the prompt). One set of classes, two shapes:
  FlowConfig()               mini: causal, attention in chunks of bounded reach, four mel frames a code, streams exactly
  FlowConfig.cosyvoice1()    the released CosyVoice-300M-25Hz: full context, U-Net at two rates, offline only

Legend: B batch, L codes, T mel frames, D width, M mel bins, H heads, S keys a query may look at.
Everything is time-major, (B, T, D). CFM: Lipman et al. 2022; U-Net: Matcha-TTS; positions: Transformer-XL.
"""
import math
import re
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1e-6        # width of the path's end; in the papers, in the checkpoints, and too small to matter
NOISE_BLOCK = 64    # frames of noise drawn from one seed
SEGMENT = 16        # chunks solved in one go when many are at hand: bounds memory and the quadratic mask

# ---------------------------------------------------------------------------------------------------------------------
# primitives

class Tape:
    """Left context of every causal layer, in the order the layers run: read from the last segment, written for the
    next. Layers need no names or indices, and what a state holds is a flat list of tensors."""

    def __init__(self, old: list[Tensor]):
        self.old, self.new = old, []

    def extend(self, x: Tensor, keep: int) -> Tensor:
        """x (B, T, D) -> (B, past + T, D); the last `keep` frames are what the next segment will see."""
        if self.old:
            x = torch.cat([self.old[len(self.new)], x], 1)
        self.new.append(x[:, max(0, x.shape[1] - keep):].clone())  # a view would keep the whole segment alive
        return x


class Conv(nn.Conv1d):
    """Conv1d on (B, T, D). Causal: all padding on the left, taken from the tape when streaming."""

    def __init__(self, d_in: int, d_out: int, kernel: int, causal: bool = False, stride: int = 1):
        super().__init__(d_in, d_out, kernel, stride, padding=kernel // 2)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None, tape: Tape | None = None) -> Tensor:
        k, n = self.kernel_size[0], x.shape[1]
        if not self.causal and k > 1:
            x = x if mask is None else x * mask  # a neighbour's pad must look like the end of the signal
            return super().forward(x.mT).mT
        # Side by side shifts and one matmul: on a CPU twice as fast as conv1d on a transposed tensor.
        if k > 1:
            x = tape.extend(x, k - 1) if tape else x
            x = F.pad(x, (0, 0, n + k - 1 - x.shape[1], 0))
            x = torch.cat([x[:, i:i + n] for i in range(k)], -1)                  # (B, T, k D)
        return F.linear(x, self.weight.permute(0, 2, 1).flatten(1), self.bias)


class GroupNorm(nn.GroupNorm):
    """GroupNorm on (B, T, D) whose statistics leave pads out: a padded sample is normalised as it is alone."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().forward(x.mT).mT
        b, t, d = x.shape
        g = x.view(b, t, self.num_groups, -1)                                     # (B, T, G, D/G)
        m = mask[..., None]                                                       # (B, T, 1, 1)
        n = m.sum((1, 3), keepdim=True) * g.shape[-1]
        mean = (g * m).sum((1, 3), keepdim=True) / n
        var = ((g - mean).square() * m).sum((1, 3), keepdim=True) / n
        return ((g - mean) * (var + self.eps).rsqrt()).view(b, t, d) * self.weight + self.bias


def sinusoid(x: Tensor, dim: int, base: float = 1e4) -> Tensor:
    """Interleaved sin/cos of signed relative distances x (N,) -> (N, dim)."""
    freq = torch.exp(torch.arange(0, dim, 2, device=x.device) * (-math.log(base) / dim))
    angle = x[:, None].float() * freq
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Attention(nn.Module):
    """Multi-head attention; `relative` adds Transformer-XL positions (the token encoder has them, the U-Net none)."""

    def __init__(self, dim: int, heads: int, head_dim: int, relative: bool):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(dim, inner, bias=relative)
        self.k = nn.Linear(dim, inner, bias=relative)
        self.v = nn.Linear(dim, inner, bias=relative)
        self.out = nn.Linear(inner, dim)
        if relative:
            self.pos = nn.Linear(dim, inner, bias=False)
            self.bias_u = nn.Parameter(torch.zeros(heads, head_dim))
            self.bias_v = nn.Parameter(torch.zeros(heads, head_dim))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)                # (B, H, T, hd)

    def forward(self, x: Tensor, mask: Tensor | None, reach: int, tape: Tape | None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if tape:
            k, v = tape.extend(k, reach), tape.extend(v, reach)                   # (B, S, D)
        q, k, v = self.split(q), self.split(k), self.split(v)
        if hasattr(self, "pos"):
            bias = self.distance_bias(q + self.bias_v[:, None], k.shape[2], x)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
            q = q + self.bias_u[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def distance_bias(self, q: Tensor, s: int, x: Tensor) -> Tensor:
        """Scores of q (B, H, T, hd) against the distance to each of s keys, the last T of them its own frames."""
        t = q.shape[2]
        distance = torch.arange(s - 1, -t, -1, device=x.device)                   # s-1 ... -(t-1)
        p = self.split(self.pos(sinusoid(distance, x.shape[-1]).to(x.dtype)))     # (H, S+T-1, hd)
        score = q @ p.mT / math.sqrt(q.shape[-1])                                 # (B, H, T, S+T-1)
        # Row i must start T-1-i columns later: one column of padding and a reshape shift every row by its index.
        score = F.pad(score, (1, 0)).view(*q.shape[:2], s + t, t)[:, :, 1:]
        return score.reshape(*q.shape[:2], t, s + t - 1)[..., :s]                 # (B, H, T, S)


class Layer(nn.Module):
    """Pre-norm transformer layer: encoder (SiLU, relative positions) or U-Net (GELU, none)."""

    def __init__(self, dim: int, heads: int, head_dim: int, ffn: int, relative: bool):
        super().__init__()
        eps = 1e-12 if relative else 1e-5  # as released
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, head_dim, relative)
        act = nn.SiLU() if relative else nn.GELU()
        self.ff = nn.Sequential(nn.Linear(dim, ffn), act, nn.Linear(ffn, dim))

    def forward(self, x: Tensor, mask: Tensor | None, reach: int, tape: Tape | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, reach, tape)
        return x + self.ff(self.norm2(x))


def attention_mask(valid: Tensor | None, t: int, past: int, chunk: int, left: int, device) -> Tensor | None:
    """Who may look at whom: True (B or 1, 1, T, past + T), or None if everybody at everybody (the fast path).

    chunk > 0: a frame sees its own chunk and `left` chunks before it; both t = 0 and the past start on a chunk border.
    valid (B, T): False on pads."""
    mask = None
    if chunk:
        key = torch.arange(past + t, device=device) // chunk
        query = key[past:, None]
        mask = (key <= query) & (key >= query - left)                             # (T, S)
        mask = None if mask.all() else mask[None, None]
    if valid is not None:
        mask = valid[:, None, None] if mask is None else mask & valid[:, None, None]
    return mask

# ---------------------------------------------------------------------------------------------------------------------
# config

@dataclass
class FlowConfig:
    codes: int = 1024               # size of the codebook
    mel: int = 80
    spk_dim: int = 192
    dim: int = 160                  # token encoder
    enc_layers: int = 2
    enc_heads: int = 4
    enc_ffn: int = 640
    look_ahead: int = 3             # codes the encoder may see beyond the chunk (0 in a full-context model)
    channels: tuple[int, ...] = (192,)  # U-Net: one width a level; every level but the last halves the rate
    mid: int = 2                    # stages between down and up
    tf: int = 1                     # transformer layers a stage
    heads: int = 3
    head_dim: int = 64
    time_dim: int = 256
    causal: bool = True             # causal convolutions, LayerNorm, chunked attention; else GroupNorm, full context
    chunk: int = 24                 # frames; with four frames a code six codes, 240 ms
    left_chunks: int = 3            # chunks of the past that attention may see
    frames_per_code: float = 4.0
    mel_mean: float = -5.0          # log-mel of speech is about N(-5, 2.2); the flow works on N(0, 1)
    mel_std: float = 2.2

    @classmethod
    def cosyvoice1(cls, codes: int = 4096) -> "FlowConfig":
        """CosyVoice-300M-25Hz: 22,050 Hz, hop 256, no mel normalisation; 104,874,752 parameters."""
        return cls(codes=codes, dim=512, enc_layers=6, enc_heads=8, enc_ffn=2048, look_ahead=0, channels=(256, 256),
                   mid=12, tf=4, heads=8, time_dim=1024, causal=False, chunk=0, left_chunks=0,
                   frames_per_code=22050 / 256 / 25, mel_mean=0.0, mel_std=1.0)

    @property
    def chunk_codes(self) -> int:
        return int(self.chunk / self.frames_per_code)

    def frames(self, codes: int) -> int:
        """Mel frames of so many codes."""
        return int(codes * self.frames_per_code)

# ---------------------------------------------------------------------------------------------------------------------
# codes -> mu

class Encoder(nn.Module):
    def __init__(self, cfg: FlowConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.dim
        self.proj, self.proj_norm = nn.Linear(d, d), nn.LayerNorm(d)
        if cfg.look_ahead:
            self.look = nn.Conv1d(d, d, 2 * cfg.look_ahead + 1)
        self.layers = nn.ModuleList(Layer(d, cfg.enc_heads, d // cfg.enc_heads, cfg.enc_ffn, True)
                                    for _ in range(cfg.enc_layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, valid: Tensor | None, pad: tuple[int, int], past: int = 0,
                tape: Tape | None = None) -> Tensor:
        """Embedded codes x (B, L, D). With a look-ahead of n the first and last n only serve as neighbours;
        `pad` says how many of those are missing, because the sequence starts or ends there."""
        cfg = self.cfg
        x = self.proj_norm(self.proj(x)) * math.sqrt(cfg.dim)
        if valid is not None:
            x = x * valid[..., None]
        if cfg.look_ahead:
            n = cfg.look_ahead
            y = F.gelu(self.look(F.pad(x, (0, 0, *pad)).mT).mT)
            x = x[:, n - pad[0]:x.shape[1] - n + pad[1]] + y
        mask = attention_mask(valid, x.shape[1], past, cfg.chunk_codes, cfg.left_chunks, x.device)
        for layer in self.layers:
            x = layer(x, mask, cfg.left_chunks * cfg.chunk_codes, tape)
        return self.norm(x)


class Regulator(nn.Module):
    """CosyVoice 1: mu of the codes, stretched to mel frames by linear interpolation, then smoothed by convolutions."""

    def __init__(self, mel: int):
        super().__init__()
        self.convs = nn.ModuleList(Conv(mel, mel, 3) for _ in range(4))
        self.norms = nn.ModuleList(GroupNorm(1, mel) for _ in range(4))
        self.out = Conv(mel, mel, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = F.mish(norm(conv(x, mask), mask))
        return self.out(x)


def stretch(x: Tensor, frames: int) -> Tensor:
    """x (B, L, D) -> (B, frames, D)"""
    return F.interpolate(x.mT, frames, mode="linear").mT if x.shape[1] and frames else x.new_zeros(
        x.shape[0], frames, x.shape[2])

# ---------------------------------------------------------------------------------------------------------------------
# the U-Net

class Block(nn.Module):
    def __init__(self, d_in: int, d_out: int, causal: bool):
        super().__init__()
        self.conv = Conv(d_in, d_out, 3, causal)
        self.norm = nn.LayerNorm(d_out) if causal else GroupNorm(8, d_out)
        self.act = F.silu if causal else F.mish  # nearly the same curve; mish costs a tenth of a training step

    def forward(self, x: Tensor, mask: Tensor | None, tape: Tape | None) -> Tensor:
        x = self.conv(x, mask, tape)
        return self.act(self.norm(x) if self.conv.causal else self.norm(x, mask))


class Stage(nn.Module):
    """A residual convolution block told the time, then transformer layers."""

    def __init__(self, cfg: FlowConfig, d_in: int, d: int, tail: nn.Module | None = None):
        super().__init__()
        self.time = nn.Linear(cfg.time_dim, d)
        self.block1, self.block2 = Block(d_in, d, cfg.causal), Block(d, d, cfg.causal)
        self.skip = Conv(d_in, d, 1)
        self.layers = nn.ModuleList(Layer(d, cfg.heads, cfg.head_dim, 4 * d, False) for _ in range(cfg.tf))
        self.reach = cfg.left_chunks * cfg.chunk
        self.tail = tail

    def forward(self, x: Tensor, temb: Tensor, mask: Tensor | None, look: Tensor | None,
                tape: Tape | None) -> Tensor:
        h = self.block1(x, mask, tape) + self.time(F.mish(temb))[:, None]
        x = self.block2(h, mask, tape) + self.skip(x)
        for layer in self.layers:
            x = layer(x, look, self.reach, tape)
        return x


class Up(nn.ConvTranspose1d):
    def forward(self, x: Tensor, mask: Tensor | None = None, tape: Tape | None = None) -> Tensor:
        return super().forward((x if mask is None else x * mask).mT).mT


class Estimator(nn.Module):
    """Velocity of the flow at x (B, T, M), time t (B,)."""

    def __init__(self, cfg: FlowConfig):
        super().__init__()
        self.cfg, ch = cfg, cfg.channels
        self.time = nn.Sequential(nn.Linear(4 * cfg.mel, cfg.time_dim), nn.SiLU(), nn.Linear(cfg.time_dim, cfg.time_dim))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip((4 * cfg.mel,) + ch, ch)):
            self.down.append(Stage(cfg, a, b, Conv(b, b, 3, cfg.causal, stride=1 if i == len(ch) - 1 else 2)))
        self.mid = nn.ModuleList(Stage(cfg, ch[-1], ch[-1]) for _ in range(cfg.mid))
        for i, (a, b) in enumerate(zip(ch[::-1], ch[-2::-1] + ch[:1])):
            self.up.append(Stage(cfg, 2 * a, b, Conv(b, b, 3, cfg.causal) if i == len(ch) - 1 else Up(b, b, 4, 2, 1)))
        self.final_block = Block(ch[0], ch[0], cfg.causal)
        self.final = Conv(ch[0], cfg.mel, 1)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv1d)):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.zeros_(self.final.weight)  # ours: start from velocity 0, not from a random one ten times too long

    def forward(self, x: Tensor, mu: Tensor, spk: Tensor, cond: Tensor, t: Tensor, valid: Tensor | None = None,
                past: int = 0, tape: Tape | None = None) -> Tensor:
        """x, mu, cond (B, T, M), spk (B, M), valid (B, T) False on pads; `past` frames lie on the tape."""
        cfg = self.cfg
        temb = self.time(self.time_features(t).to(x.dtype))                       # (B, time_dim)
        x = torch.cat([x, mu, spk[:, None].expand_as(x), cond], -1)               # (B, T, 4M)

        def masks(valid: Tensor | None, n: int):
            return (None if valid is None else valid[..., None].to(x.dtype),
                    attention_mask(valid, n, past, cfg.chunk, cfg.left_chunks, x.device))

        levels, skips = [masks(valid, x.shape[1])], []
        for i, stage in enumerate(self.down):
            x = stage(x, temb, *levels[-1], tape)
            skips.append(x)
            x = stage.tail(x, levels[-1][0], tape)
            if i < len(self.down) - 1:
                valid = None if valid is None else valid[:, ::2]
                levels.append(masks(valid, x.shape[1]))
        for stage in self.mid:
            x = stage(x, temb, *levels[-1], tape)
        for stage in self.up:
            skip, level = skips.pop(), levels.pop()
            x = stage(torch.cat([x[:, :skip.shape[1]], skip], -1), temb, *level, tape)
            x = stage.tail(x, level[0], tape)
        return self.final(self.final_block(x, level[0], tape))

    def time_features(self, t: Tensor) -> Tensor:
        half = 2 * self.cfg.mel
        freq = torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / (half - 1)))
        angle = 1000 * t[:, None].float() * freq
        return torch.cat([angle.sin(), angle.cos()], -1)                          # (B, 4M)

# ---------------------------------------------------------------------------------------------------------------------
# the model

@dataclass
class FlowState:
    """What streaming remembers; its size does not depend on how much was said. Never changed in place, so a state
    that has heard the prompt can start any number of replies."""
    spk: Tensor                     # (1, M) projected
    prompt: Tensor                  # (1, P, M) normalised mel of the prompt
    steps: int
    cfg: float
    seed: int
    codes: Tensor                   # (1, n) not yet rendered, and `look_ahead` before them as neighbours
    done: int = 0                   # codes rendered, prompt included
    encoder: list[Tensor] = field(default_factory=list)           # keys and values a layer: (1, S, D)
    solver: list[list[Tensor]] = field(default_factory=list)      # a step: convolution and key/value tails (2, n, D)


def noise(seed: int, start: int, stop: int, mel: int) -> Tensor:
    """Gaussian noise of frames start..stop, (1, stop - start, mel): the same whoever asks, in whatever pieces."""
    first = start // NOISE_BLOCK
    blocks = [torch.randn(NOISE_BLOCK, mel, generator=torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63))
              for i in range(first, max(first + 1, -(-stop // NOISE_BLOCK)))]
    return torch.cat(blocks)[None, start - first * NOISE_BLOCK:stop - first * NOISE_BLOCK]


class Flow(nn.Module):
    def __init__(self, cfg: FlowConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.codes, cfg.dim)
        self.spk_proj = nn.Linear(cfg.spk_dim, cfg.mel)
        self.encoder = Encoder(cfg)
        self.mu_proj = nn.Linear(cfg.dim, cfg.mel)
        if not cfg.causal:
            self.regulator = Regulator(cfg.mel)
        self.estimator = Estimator(cfg)

    # -- training

    def forward(self, codes: Tensor, code_lengths: Tensor, mel: Tensor, spk: Tensor) -> tuple[Tensor, Tensor]:
        """codes (B, L), code_lengths (B,), natural-log mel (B, >= frames(L), M), spk (B, spk_dim)
        -> (the mel that one step from here would reach (B, T, M), loss).

        The loss counts every frame, the prompt's too (`only_mask_loss` of the released config is never read)."""
        frames = torch.tensor([self.cfg.frames(n) for n in code_lengths.tolist()], device=mel.device)
        total = int(frames.max())
        if mel.shape[1] < total:
            raise ValueError(f"mel has {mel.shape[1]} frames, its codes say {total}")
        x1 = self.normalise(mel[:, :total])
        mu = self.mean(codes, code_lengths, frames)
        valid = self.valid(frames, total)
        # Half of the samples know the first 0..30 % of the mel: that is how a prompt's voice is carried on.
        known = (torch.rand(len(x1), device=mel.device) * 0.3 * frames * (torch.rand(len(x1), device=mel.device) < 0.5))
        cond = x1 * (torch.arange(total, device=mel.device) < known.long()[:, None])[..., None]
        # Classifier-free guidance needs a model that can also do without any condition.
        keep = (torch.rand(len(x1), 1, device=mel.device) >= 0.2).to(mu.dtype)
        mu, cond, voice = mu * keep[..., None], cond * keep[..., None], self.voice(spk) * keep

        z, t = torch.randn_like(x1), torch.rand(len(x1), device=mel.device)
        s = t[:, None, None].to(x1.dtype)
        xt = (1 - (1 - SIGMA) * s) * z + s * x1
        v = self.estimator(xt, mu, voice, cond, t, valid)
        error = (v - (x1 - (1 - SIGMA) * z)).square()
        if valid is not None:
            error = error * valid[..., None]
        loss = error.sum() / (frames.sum() * self.cfg.mel)
        return self.denormalise(xt + (1 - s) * v), loss

    def normalise(self, mel: Tensor) -> Tensor:
        return (mel - self.cfg.mel_mean) / self.cfg.mel_std

    def denormalise(self, mel: Tensor) -> Tensor:
        return mel * self.cfg.mel_std + self.cfg.mel_mean

    def voice(self, spk: Tensor) -> Tensor:
        return self.spk_proj(F.normalize(spk, dim=-1))                            # (B, M)

    def valid(self, lengths: Tensor, total: int) -> Tensor | None:
        """(B, total), False on pads; None if there are none: masks cost time."""
        if bool((lengths == total).all()):
            return None
        return torch.arange(total, device=lengths.device) < lengths[:, None]

    def check(self, codes: Tensor) -> Tensor:
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.cfg.codes:
            bad = codes[(codes < 0) | (codes >= self.cfg.codes)][0]
            raise ValueError(f"speech code {int(bad)} is outside 0..{self.cfg.codes - 1}: strip the special ids")
        return codes

    def mean(self, codes: Tensor, lengths: Tensor, frames: Tensor) -> Tensor:
        """mu (B, frames.max(), M) of a whole batch."""
        valid = self.valid(lengths, codes.shape[1])
        codes = self.check(codes if valid is None else codes * valid)
        pad = (self.cfg.look_ahead,) * 2
        mu = self.mu_proj(self.encoder(self.embed(codes), valid, pad))            # (B, L, M)
        if self.cfg.causal:
            return mu.repeat_interleave(int(self.cfg.frames_per_code), 1)[:, :int(frames.max())]
        rows = [stretch(m[None, :n], f)[0] for m, n, f in zip(mu, lengths.tolist(), frames.tolist())]
        valid = self.valid(frames, int(frames.max()))
        mask = None if valid is None else valid[..., None].to(mu.dtype)
        return self.regulator(nn.utils.rnn.pad_sequence(rows, batch_first=True), mask)

    # -- generation

    @torch.no_grad()
    def generate(self, codes: Tensor, spk: Tensor, prompt_codes: Tensor | None = None,
                 prompt_mel: Tensor | None = None, steps: int = 10, cfg: float = 0.7, seed: int = 0) -> Tensor:
        """codes (1, L), spk (1, spk_dim), prompt_codes (1, P), prompt_mel (1, frames, M) -> mel (1, frames(L), M).

        steps of the Euler solver, cfg the strength of guidance (0: none, half the work), seed of the noise.
        Raises ValueError for ids outside the codebook or a prompt whose mel is shorter than its codes."""
        state = self.start(spk, prompt_codes, prompt_mel, steps, cfg, seed)
        if self.cfg.causal:
            return self.stream(codes, state, final=True)[0]
        frames, known = self.cfg.frames(codes.shape[1]), state.prompt.shape[1]
        if not frames:
            return state.prompt[:, :0]
        mu = self.prompted_mean(self.check(torch.cat([state.codes, codes], 1)), state.codes.shape[1], known, frames)
        x = self.solve(mu, state, 0, [None] * steps)
        return self.denormalise(x[:, known:])

    def prompted_mean(self, codes: Tensor, n_prompt: int, known: int, frames: int) -> Tensor:
        """mu (1, known + frames, M), as released: prompt and target are stretched apart, and the first and last 20
        codes of a long target apart from its middle, so that borders do not drift with length."""
        h = self.mu_proj(self.encoder(self.embed(codes), None, (0, 0)))           # (1, P + L, M)
        parts, h = [stretch(h[:, :n_prompt], known)], h[:, n_prompt:]
        if h.shape[1] > 40:
            edge = self.cfg.frames(20)
            parts += [stretch(h[:, :20], edge), stretch(h[:, 20:-20], frames - 2 * edge), stretch(h[:, -20:], edge)]
        else:
            parts.append(stretch(h, frames))
        return self.regulator(torch.cat(parts, 1))

    def solve(self, mu: Tensor, state: FlowState, start: int, tapes: list[Tape | None], past: int = 0) -> Tensor:
        """Euler from noise to mel for frames start.. of mu (1, T, M); the cosine grid takes small steps first."""
        t_end = start + mu.shape[1]
        known = state.prompt[:, start:t_end]
        cond = F.pad(known, (0, 0, 0, mu.shape[1] - known.shape[1]))
        x = noise(state.seed, start, t_end, self.cfg.mel).to(mu)
        grid = 1 - torch.cos(math.pi / 2 * torch.linspace(0, 1, state.steps + 1, device=mu.device))
        rows = 2 if state.cfg else 1                                              # the second without conditions
        fade = torch.tensor([1.0, 0.0], device=mu.device, dtype=mu.dtype)[:rows, None]
        mu, cond, spk = mu * fade[..., None], cond * fade[..., None], state.spk * fade
        for tape, t, t_next in zip(tapes, grid, grid[1:]):
            v = self.estimator(x.expand(rows, -1, -1), mu, spk, cond, t.expand(rows), None, past, tape)
            v = (1 + state.cfg) * v[:1] - state.cfg * v[-1:]
            x = x + (t_next - t) * v
        return x

    # -- streaming

    @torch.no_grad()
    def start(self, spk: Tensor, prompt_codes: Tensor | None = None, prompt_mel: Tensor | None = None,
              steps: int = 10, cfg: float = 0.7, seed: int = 0) -> FlowState:
        """The state before the first code. A causal model renders the prompt here, once: keep the state for the
        next reply in the same voice."""
        mel = prompt_mel if prompt_mel is not None else spk.new_zeros(1, 0, self.cfg.mel)
        codes = prompt_codes if prompt_codes is not None else torch.zeros(1, 0, dtype=torch.long, device=spk.device)
        if self.cfg.causal:
            if mel.shape[1] < self.cfg.frames(codes.shape[1]):
                raise ValueError(f"prompt: {codes.shape[1]} codes need {self.cfg.frames(codes.shape[1])} mel frames, "
                                 f"got {mel.shape[1]}")
            mel = mel[:, :self.cfg.frames(codes.shape[1])]
        state = FlowState(self.voice(spk), self.normalise(mel), steps, cfg, seed, codes[:, :0])
        if self.cfg.causal:
            return self.stream(codes, state, final=False)[1]
        return replace(state, codes=self.check(codes))

    @torch.no_grad()
    def stream(self, codes: Tensor, state: FlowState, final: bool) -> tuple[Tensor, FlowState]:
        """More codes (1, n >= 0) -> (the mel that is certain now (1, T, M), state). Chunks leave as soon as they and
        `look_ahead` codes more are there; `final` flushes the rest. Sums up to exactly what `generate` returns."""
        if not self.cfg.causal:
            raise ValueError("a full-context flow cannot stream: collect the codes and call generate")
        cfg, mels = self.cfg, [state.prompt[:, :0]]
        state = replace(state, codes=torch.cat([state.codes, self.check(codes)], 1))
        while True:
            before = min(state.done, cfg.look_ahead)                              # neighbours, rendered already
            fresh = state.codes.shape[1] - before
            ready = fresh if final else max(0, fresh - cfg.look_ahead) // cfg.chunk_codes * cfg.chunk_codes
            n = min(ready, SEGMENT * cfg.chunk_codes)
            if n == 0:
                return self.denormalise(torch.cat(mels, 1)), state
            mel, state = self.segment(state, before, n)
            mels.append(mel)

    def segment(self, state: FlowState, before: int, n: int) -> tuple[Tensor, FlowState]:
        """Render the next n codes: whole chunks, or whatever is left at the end."""
        cfg, la = self.cfg, self.cfg.look_ahead
        seen = state.codes[:, :before + n + la]
        pad = (la - before, before + n + la - seen.shape[1])
        past = min(state.done, cfg.left_chunks * cfg.chunk_codes)                 # codes
        tape = Tape(state.encoder)
        mu = self.mu_proj(self.encoder(self.embed(seen), None, pad, past, tape))  # (1, n, M)
        mu = mu.repeat_interleave(int(cfg.frames_per_code), 1)                    # (1, T, M)
        tapes = [Tape(old) for old in state.solver or [[]] * state.steps]
        start = cfg.frames(state.done)
        x = self.solve(mu, state, start, tapes, cfg.frames(past))
        done = state.done + n
        keep = max(0, before + n - la)                                            # codes no longer needed
        state = replace(state, codes=state.codes[:, keep:], done=done, encoder=tape.new,
                        solver=[t.new for t in tapes])
        return x[:, max(0, state.prompt.shape[1] - start):], state
