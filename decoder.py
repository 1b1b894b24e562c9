"""The language model: Qwen2.5 with a second vocabulary of speech codes (paper: Architecture, LLM).

One stack of layers reads text rows, speech-code rows and the adapter's audio vectors, and has two
heads, text and speech. The text table keeps its size, so a published Qwen2.5 loads untouched;
speech code c is called by the virtual id `vocab + c`.

Legend: B batch, T new positions, S all positions (cached + new), D width, H query heads,
K key/value heads, E width of a head, V text vocabulary, C speech codes.

References: Qwen2.5 (arXiv:2412.15115), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202).
State dicts carry the parameter names of Hugging Face's Qwen2, without their leading `model.`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class SharedPrefix:
    """The prompt that all rows of a training batch begin with, computed once, with gradients: a
    fifth to a half of a sequence. Used in place of a cache: the first forward, of one row, fills
    it; the second, of all rows, continues it."""

    pads = None

    def __init__(self):
        self.kv, self.length = [], 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, T, E) -> with the prefix of all rows before them."""
        if not self.length:
            self.kv.append((k, v))
            return k, v
        shared = (t.expand(len(k), -1, -1, -1) for t in self.kv[layer])
        return tuple(torch.cat(pair, 2) for pair in zip(shared, (k, v)))


def rotation(positions: Tensor, width: int, theta: float, dtype: torch.dtype):
    """cos and signed sin (..., T, 1, E) for `rotate`; angles in float32 whatever the dtype."""
    # the formula of Qwen's code: rates rounded in another way differ by 3e-4 in hidden states
    rates = 1 / theta ** (torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions[..., None, None].float() * rates  # (..., T, 1, E/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (B, T, heads, E). As in Qwen's files, dimension i turns together with i + E/2."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def fuse(home: nn.Module, name: str, dim: int, widths: tuple[int, ...], bias: bool) -> None:
    """Set `home.<name>` to one linear doing the work of several that read the same input: faster
    (here 4 % in training, 9 % in decoding). State dicts still hold the parts under their own
    names, as everyone's files do."""
    linear = nn.Linear(dim, sum(widths), bias)
    setattr(home, name, linear)

    def split(_, state, prefix, __):
        for kind, _ in linear.named_parameters():  # weight, bias
            rows = state.pop(f"{prefix}{name}.{kind}").split(widths)
            state.update({f"{prefix}{part}.{kind}": r for part, r in zip(FUSED[name], rows)})

    home.register_state_dict_post_hook(split)

    def join(_, state, prefix, *__):
        for kind, _ in linear.named_parameters():
            keys = [f"{prefix}{part}.{kind}" for part in FUSED[name]]
            if all(key in state for key in keys):  # else torch's own error tells what is missing
                state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(key) for key in keys])

    home.register_load_state_dict_pre_hook(join)


class Int8(nn.Module):
    """A trained linear layer on a CPU, its weights in 8 bits with a scale for each row: a quarter
    of the bytes to read for a token. x goes in as bf16; products are added up in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.scale = nn.Buffer(weight.float().abs().amax(1).clamp(min=1e-9) / 127)  # (out,)
        self.weight = nn.Buffer((weight / self.scale[:, None]).round().to(torch.int8).contiguous())
        self.ones = torch.ones_like(self.scale, dtype=torch.bfloat16)  # the kernel scales in bf16
        self.bias = bias

    def forward(self, x):
        y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.weight, self.ones)
        y = (y * self.scale).to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Packed(nn.Linear):
    """A trained linear layer on a CPU, its weights in the order in which oneDNN reads them."""

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, state, prefix, keep_vars):  # as everyone's files have it
        super()._save_to_state_dict(state, prefix, keep_vars)
        state[prefix + "weight"] = state[prefix + "weight"].to_dense()


def pack(module: nn.Module) -> nn.Module:
    """Make the linear layers of `module` that lie on a CPU Packed, if oneDNN is there: to generate
    with, no longer to train. By two threads a token of Qwen2.5-0.5B takes three quarters of the
    time, in bf16 half. A tied text table stays, as the embedding, beside its packed copy."""
    if not torch.backends.mkldnn.is_available():
        return module
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    fits = lambda weight: weight.is_cpu and weight.dtype in dtypes
    for layer in module.modules():  # a parent before its children
        if isinstance(layer, Decoder) and not layer.lm_head and fits(layer.embed_tokens.weight):
            layer.lm_head = nn.Linear(1, 1, bias=False)
            layer.lm_head.weight = layer.embed_tokens.weight
        if type(layer) is nn.Linear and fits(layer.weight):
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.weight, layer.__class__ = nn.Parameter(weight, requires_grad=False), Packed
    return module


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads, self.width = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        fuse(self, "qkv", cfg.dim, (q, kv, kv), bias=True)
        self.o_proj = nn.Linear(q, cfg.dim, bias=False)

    def forward(self, x, cos, sin, mask, cache, index):
        (B, T, _), H, K, E = x.shape, self.heads, self.kv_heads, self.width
        qk, v = self.qkv(x).view(B, T, H + 2 * K, E).split([H + K, K], 2)
        q, k = rotate(qk, cos, sin).split([H, K], 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, E)
        if cache is not None:
            k, v = cache.write(index, k, v)  # (B, K, S, E)
        if T == 1:
            # One position needs no causality, so the queries that share a key head can stand in
            # for its time axis: the cache is read in place, not copied per query.
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, E), k, v, mask)
        else:  # repeated by hand: not every fused kernel knows both a mask and enable_gqa
            k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))  # (B, H, S, E)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            y = y.transpose(1, 2)  # (B, T, H, E)
        return self.o_proj(y.reshape(B, T, H * E))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        fuse(self, "gate_up", cfg.dim, (cfg.ffn, cfg.ffn), bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class DecoderConfig:
    vocab: int = 1024  # rows of the text table
    dim: int = 320
    n_layers: int = 8
    n_heads: int = 6
    n_kv_heads: int = 3
    head_dim: int = 64
    ffn: int = 768
    rope_theta: float = 1e6
    eps: float = 1e-6
    tied: bool = True  # the text head is the text table
    codes: int = 512  # id `codes` opens and closes speech; +1, +2 wrap the user's audio (input)


class KVCache:
    """Keys and values, for every layer (B, K, max_len, E), allocated once, filled in place up to
    `length`; set it back to forget the newest. Rows of different lengths end together:
    `pads` (B,) says how many positions before each row are nothing, and seen by nobody."""

    def __init__(self, cfg: DecoderConfig, batch: int, max_len: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 pads: Tensor | None = None):
        shape = (batch, cfg.n_kv_heads, max_len, cfg.head_dim)
        self.k, self.v = ([torch.empty(shape, dtype=dtype, device=device)
                           for _ in range(cfg.n_layers)] for _ in range(2))
        self.length, self.max_len, self.pads = 0, max_len, pads

    def end(self, new: int) -> int:
        """The length with so many positions more; ValueError if they do not fit."""
        if self.length + new > self.max_len:
            raise ValueError(f"{self.length} + {new} positions do not fit a cache of "
                             f"{self.max_len}")
        return self.length + new

    def write(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's k, v (B, K, T, E) behind `length`; views (B, K, S, E) of all so far."""
        end = self.end(k.shape[2])
        self.k[index][:, :, self.length:end] = k
        self.v[index][:, :, self.length:end] = v
        return self.k[index][:, :, :end], self.v[index][:, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Forget all rows of the batch but these, which are in ascending order."""
        for tensor in self.k + self.v:
            for to, row in enumerate(rows):
                tensor[to, :, :self.length] = tensor[row, :, :self.length]
        self.k, self.v = ([t[:len(rows)] for t in kv] for kv in (self.k, self.v))
        self.pads = None if self.pads is None else self.pads[rows]


class StaticCache(KVCache):
    """A cache of one row for compiled steps, whose shapes and addresses never change: the position
    is a tensor, and all of the cache is read, what is not there yet masked. On a GPU a step is
    replayed as one CUDA graph. Its first use compiles, for tens of seconds (torch keeps the code
    on disk); on a CPU plain steps are faster, as they read only what is there."""

    def __init__(self, decoder: "Decoder", max_len: int, backend: str = "inductor"):
        like = decoder.norm.weight
        super().__init__(decoder.cfg, 1, max_len, like.dtype, like.device)
        self.at = torch.empty(1, dtype=torch.long, device=like.device)
        for tensor in (*self.k, *self.v, self.at):  # a tensor a layer: one of all would be copied
            torch._dynamo.mark_static_address(tensor.zero_())  # NaN would pass any mask
        mode = "reduce-overhead" if like.is_cuda else None
        self.compiled = torch.compile(decoder.step, fullgraph=True, backend=backend, mode=mode)

    def step(self, x: Tensor) -> Tensor:
        end = self.end(1)
        self.at.fill_(self.length)
        self.length = end
        return self.compiled(x, self.k, self.v, self.at)


@dataclass
class Window:
    """What a compiled step sees of a StaticCache."""
    k: list[Tensor]
    v: list[Tensor]
    at: Tensor

    def write(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k[index].index_copy_(2, self.at, k)
        self.v[index].index_copy_(2, self.at, v)
        return self.k[index], self.v[index]


class Decoder(nn.Module):
    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.eps)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.dim, cfg.vocab, bias=False)
        self.speech_embed = nn.Embedding(cfg.codes + 3, cfg.dim)
        self.speech_head = nn.Linear(cfg.dim, cfg.codes + 1)
        self.static = None  # a StaticCache, where steps are compiled
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller in a deep stack
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * cfg.n_layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, ids: Tensor) -> Tensor:
        """Virtual ids (B, T) -> (B, T, D): below V text, V + c speech row c, negative zeros."""
        code = ids - self.cfg.vocab  # negative: text
        rows = torch.where((code >= 0)[..., None], self.speech_embed(code.clamp(min=0)),
                           self.embed_tokens(ids.clamp(0, self.cfg.vocab - 1)))  # (B, T, D)
        return rows.masked_fill((ids < 0)[..., None], 0)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | SharedPrefix | None = None) -> Tensor:
        """x (B, T, D) -> hidden (B, T, D) after the final norm. Causal: right pads need no mask.

        mask (B, past + T) bool: a False key is seen by nobody (unknown labels).
        positions (B, T) or (T,); by default they count the seen keys, so skip the unseen.
        cache: x continues it; ValueError if it is too short."""
        T, past = x.shape[1], cache.length if cache is not None else 0
        every = torch.arange(past + T, device=x.device)  # (S,)
        if cache is not None and cache.pads is not None:
            mask = every >= cache.pads[:, None]
        if positions is None:
            positions = every[past:] if mask is None else (mask.cumsum(1) - 1).clamp(0)[:, past:]
        seen = None  # plain causal with nothing cached: the kernel needs no mask and is fastest
        if mask is not None or (past and T > 1):
            seen = every <= every[past:, None]  # (T, S)
            seen = seen if mask is None else seen & mask[:, None, None]  # (B, 1, T, S)
        x = self.through_layers(x, positions, seen, cache)
        if cache is not None:
            cache.length += T
        return x

    def through_layers(self, x: Tensor, positions: Tensor, seen: Tensor | None, cache) -> Tensor:
        """forward() of a mask `seen` as attention takes it, for plain and compiled steps alike."""
        cos, sin = rotation(positions, self.cfg.head_dim, self.cfg.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, seen, cache, index)
        return self.norm(x)

    @torch.no_grad()
    def to_int8(self) -> None:
        """Linear layers in 8 bits, to generate with on a CPU; embeddings stay as they are, and what
        the kernel cannot multiply: widths that 64 does not divide."""
        for home in [*self.modules()]:
            for name, layer in [*home.named_children()]:
                if isinstance(layer, nn.Linear) and layer.in_features % 64 == 0:
                    setattr(home, name, Int8(layer.weight, layer.bias))
                    layer.weight = None  # which fuse() would keep
        if self.cfg.tied and self.cfg.dim % 64 == 0:
            self.lm_head = Int8(self.embed_tokens.weight)

    def cache(self, batch: int, max_len: int, pads: Tensor | None = None) -> KVCache:
        """An empty one: for a single row that fits it the static one, if there is one, which then
        belongs to that answer alone."""
        if self.static and batch == 1 and max_len <= self.static.max_len:
            self.static.length = 0
            return self.static
        like = self.norm.weight
        return KVCache(self.cfg, batch, max_len, like.dtype, like.device, pads)

    def prefill(self, x: Tensor, cache: KVCache) -> Tensor:
        """Append x (B, T, D) to the cache -> hidden (B, 1, D) of its last position."""
        return self(x, cache=cache)[:, -1:]

    def decode(self, x: Tensor, cache: KVCache) -> Tensor:
        """Append one position x (B, 1, D) to the cache -> its hidden (B, 1, D)."""
        return cache.step(x) if isinstance(cache, StaticCache) else self(x, cache=cache)

    def step(self, x: Tensor, k: list[Tensor], v: list[Tensor], at: Tensor) -> Tensor:
        """decode() of one row x (1, 1, D) at the position `at` (1,) of a StaticCache's k and v."""
        seen = (torch.arange(k[0].shape[2], device=x.device) <= at)[None]  # (1, S)
        return self.through_layers(x, at, seen, Window(k, v, at))

    def logits(self, hidden: Tensor, head: str = "text") -> Tensor:
        """hidden (..., D) -> "text" (..., V), "speech" (..., C + 1), or "joint": both side by
        side, so that a virtual id is its index."""
        if head == "speech":
            return self.speech_head(hidden)
        text = self.lm_head(hidden) if self.lm_head else \
            F.linear(hidden, self.embed_tokens.weight)
        return text if head == "text" else torch.cat([text, self.speech_head(hidden)], -1)


# Foreign names -> ours, by prefix. A tied file may repeat its text table under other names.
QWEN2 = {"model.": "", "lm_head.": "lm_head."}
QWEN2_TIED = QWEN2 | {"lm_head.": "embed_tokens."}
OSUM = {"llama_model.model.": "", "llama_model.lm_head.": "embed_tokens.",
        "embed_tokens.": "embed_tokens.", "lm_head.": "embed_tokens.",
        "speech_token_emded.": "speech_embed.", "speech_head.": "speech_head.",  # their spelling
        "llama_model.speech_token_emded.": "speech_embed.",
        "llama_model.speech_head.": "speech_head."}


def renamed(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Keys by their prefix in the table; copies of one weight must agree."""
    found = {}
    for key, value in state.items():
        prefix = next((p for p in table if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"{key}: no such weight in the decoder")
        name = table[prefix] + key[len(prefix):]
        other = found.setdefault(name, value)
        one = other.data_ptr() == value.data_ptr() and other.shape == value.shape  # nothing to read
        if not one and not torch.equal(other, value):
            raise ValueError(f"{key}: differs from the other copy of {name}")
    return found


def load_osum(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released file's llama_model, speech_token_emded and speech_head keys -> state dict."""
    return renamed(state, OSUM)


def opened(path: Path, read: Callable, expected: str):
    """read(path), or a ValueError of one line: what the file should be, and what it is."""
    try:
        return read(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as e:
        found = "none"
        if path.is_file():
            with path.open("rb") as f:
                found = f"{path.stat().st_size:,} bytes that begin with {f.read(24)!r} ({e})"
        raise ValueError(f"{path}: expected {expected}, found {found}") from None


def read_json(path: Path) -> dict:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def load_qwen2(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """A Hugging Face Qwen2 / Qwen2.5 folder, sharded or not -> (DecoderConfig fields, state dict
    without speech_*), mapped. ValueError: another architecture, a file that does not fit."""
    config = Path(folder) / "config.json"
    hf = opened(config, read_json, "the config of a Hugging Face Qwen2 model")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 or 4
    for key, found, expected in [
            ("model_type", hf.get("model_type"), "qwen2"),
            ("hidden_act", hf.get("hidden_act", "silu"), "silu"),
            ("use_sliding_window", hf.get("use_sliding_window", False), False),
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")]:
        if found != expected:
            raise ValueError(f"{config}: expected {key} {expected!r}, found {found!r}")
    try:
        fields = dict(
            vocab=hf["vocab_size"], dim=hf["hidden_size"], n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"], n_kv_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            ffn=hf["intermediate_size"], rope_theta=rope.get("rope_theta") or hf["rope_theta"],
            eps=hf["rms_norm_eps"], tied=hf.get("tie_word_embeddings", False))
    except KeyError as e:
        raise ValueError(f"{config}: expected {e}, found none") from None
    shards, index = ["model.safetensors"], config.with_name("model.safetensors.index.json")
    if index.exists():
        shards = opened(index, lambda path: sorted(set(read_json(path)["weight_map"].values())),
                        "the index of a sharded model")
    state = {}
    for shard in shards:
        state |= opened(config.with_name(shard), load_file, "a whole safetensors file")
    return fields, renamed(state, QWEN2_TIED if fields["tied"] else QWEN2)
