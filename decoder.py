"""The language model: Qwen2.5 with a second vocabulary of speech codes (paper: Architecture, LLM).

The same stack of layers reads text rows, speech-code rows and the adapter's audio vectors, and has two heads:
text (tied to the text table where Qwen2.5 ties it) and speech. Text tables keep their size, so a published
Qwen2.5 loads untouched; speech code c is called by the virtual id `vocab + c`.

Legend: B batch, T new positions, S all positions (cached + new), D width, H query heads, K key/value heads,
G = H / K queries that share a key head, E width of a head, V text vocabulary, C speech codes.

References: Qwen2.5 technical report (arXiv:2412.15115); RoPE (arXiv:2104.09864); GQA (arXiv:2305.13245);
parameter names inside the state dict are those of Hugging Face's Qwen2.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class DecoderConfig:
    vocab: int = 2048  # rows of the text table
    dim: int = 320
    n_layers: int = 8
    n_heads: int = 5
    n_kv_heads: int = 1
    head_dim: int = 64
    ffn: int = 864
    rope_theta: float = 1e6
    eps: float = 1e-6
    tied: bool = True  # the text head is the text table
    codes: int = 1024  # `codes` opens and closes speech; +1, +2 wrap the user's audio (input only)


class KVCache:
    """Keys and values of every layer, (L, B, K, max_len, E) each, allocated once and filled in place.

    `length` positions are filled and all rows of the batch are equally long. (Rows of different length
    would not need left pads: make `length` a (B,) tensor, scatter each row's new key at its own length,
    and mask keys >= length; what lies behind is zero or stale but finite, so a masked key adds nothing.)
    To forget a turn, set `length` back.
    """

    def __init__(self, cfg: DecoderConfig, batch: int, max_len: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        shape = (cfg.n_layers, batch, cfg.n_kv_heads, max_len, cfg.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length, self.max_len = 0, max_len

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, E) behind `length`; returns views of all filled keys and values."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """cos and signed sin, (..., T, 1, E), for `rotate`; angles in float32 whatever the model's dtype."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None, None].float() * rates  # (..., T, 1, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (B, T, heads, E): dimension i turns with i + E/2, as Hugging Face lays Qwen out."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def fuse(home: nn.Module, name: str, dim: int, parts: dict[str, int], bias: bool):
    """Set `home.<name>` to one linear that does the work of several with the same input.

    One big matrix product is faster than three small ones; the state dict still shows the parts under
    their own names (`q_proj`, ...), so checkpoints look like everyone's.
    """
    linear = nn.Linear(dim, sum(parts.values()), bias)
    setattr(home, name, linear)
    kinds = [kind for kind, _ in linear.named_parameters()]

    def split(_, state, prefix, __):
        for kind in kinds:
            rows = state.pop(f"{prefix}{name}.{kind}").split(list(parts.values()))
            state.update({f"{prefix}{part}.{kind}": r for part, r in zip(parts, rows)})

    def join(_, state, prefix, *__):
        for kind in kinds:
            keys = [f"{prefix}{part}.{kind}" for part in parts]
            if all(key in state for key in keys):
                state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(key) for key in keys])

    home.register_state_dict_post_hook(split)
    home.register_load_state_dict_pre_hook(join)


class Attention(nn.Module):
    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        fuse(self, "qkv", cfg.dim, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=True)
        self.o_proj = nn.Linear(q, cfg.dim, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, T, _ = x.shape
        H, K, E = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * K, E)
        qk, v = qkv.split([H + K, K], 2)
        q, k = rotate(qk, cos, sin).split([H, K], 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, E)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, S, E)
        if T == 1:  # one new token sees every key: the G queries of a key head are its "time" axis
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, E), k, v)
        else:
            k, v = (t[:, :, None].expand(-1, -1, H // K, -1, -1).reshape(B, H, -1, E) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            y = y.transpose(1, 2)  # (B, T, H, E)
        return self.o_proj(y.reshape(B, T, H * E))


class MLP(nn.Module):
    """SwiGLU: silu(gate) * up, then down."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        fuse(self, "gate_up", cfg.dim, {"gate_proj": cfg.ffn, "up_proj": cfg.ffn}, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.eps)
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.dim, cfg.vocab, bias=False)
        self.speech_embed = nn.Embedding(cfg.codes + 3, cfg.dim)
        self.speech_head = nn.Linear(cfg.dim, cfg.codes + 1, bias=True)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, the deeper the stack
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * cfg.n_layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, ids: Tensor) -> Tensor:
        """Virtual ids (B, T) -> rows (B, T, D): id < V text, V + c speech row c, negative zeros."""
        vocab = self.cfg.vocab
        text = self.embed_tokens(ids.clamp(0, vocab - 1))  # (B, T, D)
        speech = self.speech_embed((ids - vocab).clamp(min=0))
        rows = torch.where((ids >= vocab)[..., None], speech, text)
        return rows.masked_fill((ids < 0)[..., None], 0)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) -> hidden (B, T, D) behind the final norm. Causal, so right pads need no mask.

        mask (B, T) bool, without a cache: False keys are seen by nobody (unknown labels, paper App. A).
        positions (B, T) or (T,): by default the running index, which an unseen key does not advance.
        cache: x continues it; the new keys are written in place and `cache.length` grows by T.
        """
        T, past = x.shape[1], cache.length if cache is not None else 0
        if cache is not None and past + T > cache.max_len:
            raise ValueError(f"{past} + {T} positions do not fit a cache of {cache.max_len}")
        if positions is None:
            positions = (torch.arange(past, past + T, device=x.device) if mask is None
                         else (mask.cumsum(1) - 1).clamp(min=0))
        cos, sin = rotation(positions, self.cfg.head_dim, self.cfg.rope_theta, x.dtype)
        seen = None  # None: plain causal from an empty cache, the fast kernel
        if mask is not None or (past and T > 1):
            seen = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            seen = seen if mask is None else seen & mask[:, None, None]  # (B, 1, T, S)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, seen, cache, i)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def prefill(self, x: Tensor, cache: KVCache) -> Tensor:
        """Append a stretch x (B, T, D) to the cache -> hidden of its last position (B, 1, D)."""
        return self(x, cache=cache)[:, -1:]

    def decode(self, x: Tensor, cache: KVCache) -> Tensor:
        """Append one position x (B, 1, D) to the cache -> its hidden (B, 1, D)."""
        return self(x, cache=cache)

    def logits(self, hidden: Tensor, head: str = "text") -> Tensor:
        """(..., D) -> (..., V) text, (..., C + 1) speech, or both side by side, indexed by virtual id."""
        text = self.embed_tokens.weight if self.cfg.tied else self.lm_head.weight
        if head == "text":
            return F.linear(hidden, text)
        if head == "speech":
            return self.speech_head(hidden)
        return torch.cat([F.linear(hidden, text), self.speech_head(hidden)], -1)
