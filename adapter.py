"""
From the encoder's frames to the LLM's inputs: 50 -> 12.5 vectors a second, into the LLM's width.

Paper: "Adapter". Three causal convolutions (x4 down), four transformer layers, one linear layer,
in this order. Causal convolutions see only the past, so a padded batch needs no zeroing here:
what lies beyond a length cannot reach the frames before it; only attention needs a mask.

Legend: B batch, T encoder frames, L = ceil(ceil(T / 2) / 2) frames out, D width, H heads.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AdapterConfig:
    d_in: int = 384  # paper: 1024, Whisper medium
    d_out: int = 320  # 2048, Qwen2.5-3B
    n_heads: int = 4
    n_layers: int = 4
    ffn: int = 768  # 2560
    dropout: float = 0.1


def out_length(length: int | Tensor) -> int | Tensor:
    """Frames out of the adapter for frames in; works on ints and on int tensors."""
    return ((length + 1) // 2 + 1) // 2


def positions(length: int, dim: int, device: torch.device) -> Tensor:
    """The transformer paper's table (length, dim): sine and cosine in turn."""
    rate = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000) / dim))
    angle = torch.arange(length, device=device)[:, None] * rate[None]  # (length, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, L, D = x.shape
        q, k, v = (proj(x).view(B, L, self.n_heads, -1).transpose(1, 2)  # (B, H, L, D / H)
                   for proj in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Pre-norm layer; ReLU, where the encoder has GELU: that is what was released."""

    def __init__(self, cfg: AdapterConfig):
        super().__init__()
        D = cfg.d_in
        self.attn = Attention(D, cfg.n_heads)
        self.attn_ln = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, cfg.ffn), nn.ReLU(), nn.Dropout(cfg.dropout),
                                 nn.Linear(cfg.ffn, D))
        self.mlp_ln = nn.LayerNorm(D)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop(self.attn(self.attn_ln(x), mask))
        return x + self.drop(self.mlp(self.mlp_ln(x)))


class Adapter(nn.Module):
    def __init__(self, cfg: AdapterConfig):
        super().__init__()
        D = cfg.d_in
        self.convs = nn.ModuleList(nn.Conv1d(D, D, 3, stride=s) for s in (1, 2, 2))
        self.embed = nn.Linear(D, D)
        self.embed_ln = nn.LayerNorm(D)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.after_norm = nn.LayerNorm(D)
        self.proj = nn.Linear(D, cfg.d_out)
        self.start_open()
        self.look_around()

    @torch.no_grad()
    def start_open(self, norm: nn.LayerNorm | None = None) -> None:
        """Weights that let the encoder's frames pass, so that learning begins from what Whisper
        heard: convolutions that favour the newest frame, and an embedding of unit size, as
        forward() scales it by sqrt(D) and would drown the blocks for thousands of steps. norm:
        the encoder's last layer, whose large weights make a few channels outweigh all others;
        they are undone: with them, 160 steps do not teach the ear its letters."""
        eye = torch.eye(len(self.embed.weight))
        for module in (*self.convs, self.embed):
            module.reset_parameters()
            weight = module.weight if module is self.embed else module.weight[..., 2]
            module.weight.mul_(0.5)
            weight.add_(eye)
            module.bias.zero_()
        self.embed_ln.weight.fill_(self.embed_ln.weight.numel() ** -0.5)
        if norm is not None:
            first = self.convs[0]
            first.weight.div_(norm.weight[:, None])
            first.bias.sub_((first.weight.sum(2) * norm.bias).sum(1))

    @torch.no_grad()
    def look_around(self) -> None:
        """Let each head begin by looking at one neighbour: 1 frame away, and in layer i also i + 2.
        A word is longer than what the convolutions see, and to find one's neighbours by chance
        takes attention thousands of steps. sin and cos of a position, turned by a shift, are those
        of the shifted one: a query so turned meets the key of that neighbour."""
        D = self.proj.in_features
        for depth, block in enumerate(self.blocks):
            attn, size = block.attn, D // block.attn.n_heads
            for linear in (attn.query, attn.key):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
            for head, shift in zip(range(attn.n_heads), (-1, 1, -depth - 2, depth + 2)):
                rows = slice(head * size, (head + 1) * size)
                query, key = (linear.weight[rows, :size] for linear in (attn.query, attn.key))
                angle = shift * 10000 ** (-torch.arange(0, size, 2) / D)
                query.diagonal().add_(1.5 * angle.cos().repeat_interleave(2))
                query.diagonal(1)[::2].add_(1.5 * angle.sin())
                query.diagonal(-1)[::2].sub_(1.5 * angle.sin())
                key.diagonal().add_(1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, d_in), lengths (B,) -> (B, out_length(T), d_out), lengths (B,).

        Frames beyond a length mean nothing."""
        x = x.transpose(1, 2)  # (B, D, T)
        for conv in self.convs:
            x = F.gelu(conv(F.pad(x, (2, 0))))  # two zeros of past: frame t sees t-2 .. t
        x, lengths = x.transpose(1, 2), out_length(lengths)  # (B, L, D)
        B, L, D = x.shape
        x = self.drop(self.embed_ln(self.embed(x)))
        x = self.drop(x * D ** 0.5 + positions(L, D, x.device).to(x.dtype))
        mask = None  # a mask costs SDPA its fastest kernels, so only where lengths differ
        if (lengths < L).any():
            mask = (torch.arange(L, device=x.device) < lengths[:, None])[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.proj(self.after_norm(x)), lengths


# ---- loading the released weights --------------------------------------------------------------

NAMES = {  # module in the released OSUM-EChat (WeNet's names) -> ours
    "down_sample_2.conv.1": "convs.0", "down_sample_2.conv.4": "convs.1",
    "down_sample_2.conv.7": "convs.2", "speech_transformer.embed.out.0": "embed",
    "speech_transformer.embed.out.1": "embed_ln", "speech_transformer.after_norm": "after_norm",
    "speech_llama_proj": "proj", "self_attn.linear_q": "attn.query",
    "self_attn.linear_k": "attn.key", "self_attn.linear_v": "attn.value",
    "self_attn.linear_out": "attn.out", "feed_forward.w_1": "mlp.0", "feed_forward.w_2": "mlp.3",
    "norm1": "attn_ln", "norm2": "mlp_ln",
}
SKIPPED = ("ln_speech.weight", "ln_speech.bias",  # in the file, used by nothing
           "speech_transformer.embed.pos_enc.pe")  # positions are computed


def load_osum(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released file's down_sample_2, speech_transformer, speech_llama_proj and ln_speech keys
    -> our names. Whoever loads the result sees whether all is there, and nothing else."""
    found = {}
    for old, value in state.items():
        if old not in SKIPPED:
            name = re.sub(r"^speech_transformer\.encoders\.", "blocks.", old)
            block, module, kind = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.\w+)", name).groups("")
            found[block + NAMES.get(module, module) + kind] = value
    return found
