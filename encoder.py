"""
Speech in: log-mel features, the Whisper-shaped encoder, and the S3 speech tokenizer.

Paper: "Speech Encoder" (Whisper medium, 80 mels, 50 frames a second out) and the CosyVoice
codebook of "Token2wav". The tokenizer is the same stem and blocks, cut early and followed by a
vector quantiser that learns to keep what a recogniser needs (CosyVoice, arXiv 2407.05407).

Legend: B batch, T mel frames (100 a second), S encoder frames (50 a second), L codes (25 a
second), D width, H heads, K codes in the codebook, V text vocabulary, U text tokens, N samples.

References: openai/whisper (features, encoder), xingchensong/S3Tokenizer (weights of S3 v1).
"""

import functools
import math
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- log-mel -----------------------------------------------------------------------------------

SAMPLE_RATE, N_FFT, HOP = 16000, 400, 160  # 25 ms windows, one every 10 ms


@functools.cache
def mel_filters(sr: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> Tensor:
    """Triangular mel filters (n_mels, n_fft // 2 + 1) on Slaney's scale, each of equal area."""
    step = math.log(6.4) / 27  # linear to 1 kHz (mel 15), then logarithmic: 27 mels are x6.4
    first, last = (hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step
                   for hz in (fmin, fmax))
    mels = torch.linspace(first, last, n_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    bins = torch.linspace(0, sr / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, mid, high = (edges[i:i + n_mels, None] for i in range(3))  # (n_mels, 1) each
    triangle = torch.minimum((bins - low) / (mid - low), (high - bins) / (high - mid))
    return (triangle.clamp(min=0) * 2 / (high - low)).float()


def log_mel(wave: Tensor, n_mels: int = 80) -> Tensor:
    """Whisper's features of a 16 kHz wave (N,) in [-1, 1] -> (T, n_mels), T = N // 160.

    No padding to 30 s, so the loudest real frame sets the floor (80 dB below it). Raises
    ValueError if the wave is too short to be reflected at its edges (N < 201).
    """
    if wave.dim() != 1 or len(wave) <= N_FFT // 2:
        raise ValueError(f"log_mel: shape {tuple(wave.shape)} is not a wave of over 200 samples")
    window = torch.hann_window(N_FFT, device=wave.device)
    spec = torch.stft(wave.float(), N_FFT, HOP, window=window, return_complex=True)  # (201, T + 1)
    power = spec[:, :-1].abs().square()
    filters = mel_filters(SAMPLE_RATE, N_FFT, n_mels, 0.0, SAMPLE_RATE / 2).to(wave.device)
    logs = (filters @ power).clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8)
    return ((logs + 4) / 4).T  # (T, n_mels)


def fbank(wave: Tensor, n_mels: int = 80) -> Tensor:
    """Kaldi's log-mel of a 16 kHz wave (N,), N >= 400, less its mean over time -> (T, n_mels).

    What a speaker model of that tradition (CAM++) hears: no padding, no dither; each frame of its
    own mean and pre-emphasis; filters from 20 Hz, triangles on the mel scale itself."""
    if wave.dim() != 1 or len(wave) < N_FFT:
        raise ValueError(f"fbank: shape {tuple(wave.shape)} is not a wave of 400 samples or more")
    frames = wave.float().unfold(0, N_FFT, HOP)  # (T, 400)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    window = torch.hann_window(N_FFT, periodic=False, device=wave.device) ** 0.85  # Povey's
    power = torch.fft.rfft(frames * window, 512).abs().square()  # (T, 257)
    mels = 1127 * torch.log1p(torch.linspace(0, SAMPLE_RATE / 2, 257, dtype=torch.float64) / 700)
    first, last = (1127 * math.log1p(hz / 700) for hz in (20, SAMPLE_RATE / 2))
    edges = torch.linspace(first, last, n_mels + 2, dtype=torch.float64)
    rise = (mels - edges[:-1, None]) / edges.diff()[:, None]  # (n_mels + 1, 257)
    filters = torch.minimum(rise[:-1], 1 - rise[1:]).clamp(min=0).float().to(wave.device)
    logs = (power @ filters.T).clamp(min=torch.finfo(torch.float32).eps).log()
    return logs - logs.mean(0)


# ---- primitives --------------------------------------------------------------------------------

def sinusoids(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Whisper's positions (length, dim): all sines, then all cosines. Computed, never stored, so
    any length works and no checkpoint carries a table."""
    rate = torch.exp(torch.arange(dim // 2, device=device) * (-math.log(10000) / (dim // 2 - 1)))
    angle = torch.arange(length, device=device)[:, None] * rate[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def frame_mask(lengths: Tensor, size: int) -> Tensor | None:
    """(B, size) True on real frames, or None if every sample fills the batch (the fast path)."""
    if (lengths >= size).all():
        return None
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def zero_tail(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, T, D) with zeros beyond each length: what a convolution sees past a lone sample."""
    mask = frame_mask(lengths, x.shape[1])
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def conv_stem(mel: Tensor, lengths: Tensor, convs: list[nn.Conv1d]) -> tuple[Tensor, Tensor]:
    """(B, T, n_mels) -> (B, T / strides rounded up, D) and the new lengths.

    Tails are zeroed before *every* convolution: gelu(conv(0)) is not 0, and at odd lengths the
    second one would see it (in the released code the last frame depends on the batch)."""
    x = zero_tail(mel, lengths)
    for conv in convs:
        x = F.gelu(conv(x.transpose(1, 2))).transpose(1, 2)
        lengths = -(-lengths // conv.stride[0])  # kernel 3, padding 1: divides, rounding up
        x = zero_tail(x, lengths)
    return x, lengths


# ---- blocks ------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)  # a key bias only shifts all scores of a query
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, S, D = x.shape
        q, k, v = (proj(x).view(B, S, self.n_heads, -1).transpose(1, 2)  # (B, H, S, D / H)
                   for proj in (self.query, self.key, self.value))
        keys = None if mask is None else mask[:, None, None]  # (B, 1, 1, S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.attn = Attention(dim, n_heads)
        self.attn_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask)
        return x + self.mlp(self.mlp_ln(x))


def transform(x: Tensor, lengths: Tensor, blocks: nn.ModuleList, positions=True) -> Tensor:
    x = x + sinusoids(*x.shape[1:], x.device).to(x.dtype) if positions else x
    mask = frame_mask(lengths, x.shape[1])
    for block in blocks:
        x = block(x, mask)
    return x


# ---- the encoder -------------------------------------------------------------------------------

@dataclass
class EncoderConfig:
    n_mels: int = 80
    d_model: int = 384  # Whisper medium: 1024, 16 heads, 24 layers
    n_heads: int = 6
    n_layers: int = 4


class Encoder(nn.Module):
    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        D = cfg.d_model
        self.conv1 = nn.Conv1d(cfg.n_mels, D, 3, padding=1)
        self.conv2 = nn.Conv1d(D, D, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(D, cfg.n_heads) for _ in range(cfg.n_layers))
        self.ln_post = nn.LayerNorm(D)

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """mel (B, T, n_mels), lengths (B,) -> hidden (B, ceil(T / 2), D), its lengths (B,).

        Frames beyond a length come out as zeros."""
        x, lengths = conv_stem(mel, lengths, [self.conv1, self.conv2])
        x = transform(x, lengths, self.blocks)
        return zero_tail(self.ln_post(x), lengths), lengths


# ---- the speech tokenizer ----------------------------------------------------------------------

@dataclass
class TokenizerConfig:
    n_mels: int = 80  # S3 v1: 128 mels, 1280, 20 heads, 6 layers, stride 2, pool 1, 4096 codes
    d_model: int = 384
    n_heads: int = 6
    n_layers: int = 2  # blocks before the quantiser
    conv1_stride: int = 1
    pool: int = 2  # frames averaged into one code; stride * 2 * pool mel frames make a code
    codes: int = 512
    tail_layers: int = 2  # blocks after the quantiser; only training needs them
    vocab: int = 0  # text tokens of the CTC head; 0: no tail and no head, encode() only
    positions: bool = True  # before the quantiser; without, a sound's code ignores when it comes


class Codebook(nn.Module):
    """K vectors that follow the features assigned to them as moving averages (no gradient)."""

    def __init__(self, size: int, dim: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("fitted", torch.tensor(False))  # fit() was called, or codes loaded
        self.register_buffer("embed", torch.zeros(size, dim))
        self.register_buffer("counts", torch.ones(size))  # moving average of uses a batch

    def nearest(self, x: Tensor) -> Tensor:
        """x (N, D) -> index (N,) of the nearest code. |x - e|^2 has the same order as
        |e|^2 / 2 - x.e, which is one matmul; in slices, as N x K may be large."""
        half = self.embed.square().sum(-1) / 2
        return torch.cat([(part @ self.embed.T - half).argmax(-1) for part in x.split(8192)])

    def totals(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Uses (K,) of each code and the sum (K, D) of its features, over all ranks."""
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.embed).index_add_(0, codes, x)
        if dist.is_initialized():
            dist.all_reduce(counts), dist.all_reduce(sums)
        return counts, sums

    def reset(self, rows: Tensor, x: Tensor) -> None:
        """Move the codes where rows (K,) is True onto features drawn from x, as used as most."""
        fresh = x[torch.randint(len(x), (len(rows),), device=x.device)]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        self.embed[rows], self.counts[rows] = fresh[rows], self.counts.mean()

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        """One training step; codes that fell under 5 % of the average use are dead: revived."""
        counts, sums = self.totals(x, codes)
        sums = (self.embed * self.counts[:, None]).lerp(sums, 1 - self.decay)
        self.counts.lerp_(counts, 1 - self.decay)
        self.embed.copy_(sums / self.counts[:, None])
        self.reset(self.counts < 0.05 * self.counts.mean(), x)

    @torch.no_grad()
    def fit(self, x: Tensor, rounds: int = 10) -> None:
        """k-means on x (N, D), N >= K: real frames of features(). Empty clusters draw a new one."""
        if len(x) < len(self.embed):
            raise ValueError(f"k-means of {len(self.embed)} codes got only {len(x)} features")
        self.fitted.fill_(True)
        self.reset(torch.ones_like(self.counts, dtype=torch.bool), x)
        for _ in range(rounds):
            counts, sums = self.totals(x, self.nearest(x))
            self.counts.copy_(counts / counts.mean())  # 1 on average, as after one small batch
            self.embed.copy_(sums / counts[:, None])  # 0 / 0 where empty: drawn anew
            self.reset(counts == 0, x)


class SpeechTokenizer(nn.Module):
    """Speech -> 25 codes a second, taught by recognising text through the codes (CTC).

    S3 v1 has an attention decoder behind its codes; CTC asks the same of them, to keep the words.
    As in S3, the quantiser joins a recogniser that works: forward() lets features pass until
    codebook.fit() has seen some. Any sooner, and CTC's first move, blanks everywhere, carries all
    features to one code."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D, self.cfg = cfg.d_model, cfg
        self.conv1 = nn.Conv1d(cfg.n_mels, D, 3, stride=cfg.conv1_stride, padding=1)
        self.conv2 = nn.Conv1d(D, D, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(D, cfg.n_heads) for _ in range(cfg.n_layers))
        self.codebook = Codebook(cfg.codes, D)
        if cfg.vocab:
            self.tail = nn.ModuleList(Block(D, cfg.n_heads) for _ in range(cfg.tail_layers))
            self.ln_post = nn.LayerNorm(D)
            self.head = nn.Linear(D, cfg.vocab + 1)  # the last row is CTC's blank

    def features(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """mel (B, T, n_mels) -> unit vectors (B, ceil(T / 4), D) to be quantised, lengths."""
        x, lengths = conv_stem(mel, lengths, [self.conv1, self.conv2])
        x = zero_tail(transform(x, lengths, self.blocks, self.cfg.positions), lengths)
        pool = self.cfg.pool
        x = F.pad(x, (0, 0, 0, -x.shape[1] % pool)).unflatten(1, (-1, pool))  # (B, L, pool, D)
        first = pool * torch.arange(x.shape[1], device=x.device)
        real = (lengths[:, None] - first).clamp(1, pool)  # frames averaged; the last may lack one
        x = (x.sum(2) / real[..., None]).to(self.codebook.embed.dtype)
        return F.normalize(x, dim=-1), -(-lengths // pool)

    @torch.no_grad()
    def encode(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """mel (B, T, n_mels), lengths (B,) -> codes (B, ceil(T / 4)), 0 beyond the lengths."""
        x, lengths = self.features(mel, lengths)
        codes = self.codebook.nearest(x.flatten(0, 1)).view(x.shape[:2])
        return zero_tail(codes[..., None], lengths)[..., 0], lengths

    def quantise(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> codes' vectors with x's gradient, commitment loss, codes (n,) in use."""
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        real = x[valid]  # (n, D): padding must not vote
        codes = self.codebook.nearest(real.detach())
        vectors = self.codebook.embed[codes]
        commit = (real - vectors).square().sum(-1).mean()  # of unit vectors: 0 .. 4
        if self.training:
            self.codebook.update(real.detach(), codes)
        straight = torch.zeros_like(x).masked_scatter(valid[..., None], vectors)
        return x + (straight - x).detach(), commit, codes

    def forward(self, mel: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor
                ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """targets (B, U) text ids < vocab -> CTC logits (B, pool L, vocab + 1), loss, and stats:
        ctc, commit, used (codes in this batch), perplexity (of the moving code use; at most K)."""
        x, lengths = self.features(mel, lengths)
        commit, codes = x.new_zeros(()), lengths.new_zeros(0)
        if self.codebook.fitted:
            x, commit, codes = self.quantise(x, lengths)
        # A unit vector would drown in positions of norm sqrt(D / 2): give its entries unit size.
        # Back to the encoder's rate: 25 frames a second are too few for the letters of fast speech.
        x = (x * x.shape[2] ** 0.5).repeat_interleave(self.cfg.pool, 1)
        lengths = lengths * self.cfg.pool
        x = transform(x, lengths, self.tail)
        logits = self.head(self.ln_post(x))  # (B, pool L, V + 1)
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (pool L, B, V + 1)
        ctc = F.ctc_loss(log_probs, targets, lengths, target_lengths,
                         blank=self.cfg.vocab, zero_infinity=True)  # inf: text longer than codes
        share = self.codebook.counts / self.codebook.counts.sum()
        stats = {"ctc": ctc.item(), "commit": commit.item(), "used": len(codes.unique()),
                 "perplexity": torch.special.entr(share).sum().exp().item()}
        return logits, ctc + 0.25 * commit, stats

    def init_from_encoder(self, state: dict[str, Tensor]) -> None:
        """Start from an Encoder's state dict: stem, block i -> block i, the blocks after the cut
        -> tail, ln_post. What the encoder has not (codebook, head, deeper tail) stays as it is."""
        for i in range(self.cfg.n_layers, self.cfg.n_layers + self.cfg.tail_layers):
            state = {k.replace(f"blocks.{i}.", f"tail.{i - self.cfg.n_layers}."): v
                     for k, v in state.items()}
        own = self.state_dict()
        if not (known := {k: v for k, v in state.items() if k in own}):
            raise ValueError("nothing of Whisper's encoder")
        self.load_state_dict(own | known)


# ---- loading foreign weights -------------------------------------------------------------------

NAMES = {  # module of HF, WeNet (the released OSUM-EChat) or S3Tokenizer -> ours, as openai's
    "embed.conv.0": "conv1", "embed.conv.2": "conv2",
    "self_attn.q_proj": "attn.query", "self_attn.linear_q": "attn.query",
    "self_attn.k_proj": "attn.key", "self_attn.linear_k": "attn.key",
    "self_attn.v_proj": "attn.value", "self_attn.linear_v": "attn.value",
    "self_attn.out_proj": "attn.out", "self_attn.linear_out": "attn.out",
    "self_attn_layer_norm": "attn_ln", "norm1": "attn_ln",
    "fc1": "mlp.0", "feed_forward.w_1": "mlp.0", "fc2": "mlp.2", "feed_forward.w_2": "mlp.2",
    "final_layer_norm": "mlp_ln", "norm2": "mlp_ln",
    "layer_norm": "ln_post", "after_norm": "ln_post",
    "quantizer._codebook.embed": "codebook.embed",
}
POSITIONS = ("positional_embedding", "embed_positions.weight", "embed.pos_enc.pe")


def load_whisper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whisper under openai's, HF's or WeNet's names (of a released OSUM-EChat file: its keys that
    begin with "encoder.") -> our names. A decoder is left out, and so are stored positions, once
    they are seen to be the sinusoids (up to the rounding of half precision; else ValueError).
    Whoever loads the result sees whether all is there, and nothing else."""
    found = {}
    for old, value in state.items():
        name = re.sub(r"^(model\.)?encoder\.", "", old)
        name = re.sub(r"^(layers|encoders)\.", "blocks.", name)
        parts = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name).groups("")
        name = parts[0] + NAMES.get(parts[1], parts[1]) + parts[2]
        if name in POSITIONS:
            table = value.float().reshape(-1, value.shape[-1])[:1500]
            if not torch.allclose(table, sinusoids(*table.shape, table.device), atol=1e-2):
                raise ValueError(f"{old}: not Whisper's sinusoids, which are all we compute")
        elif name in found:
            raise ValueError(f"{old}: twice in this file")
        elif not re.match(r"(model\.)?decoder\.|proj_out\.", old):
            found[name] = value
    return found


def released_s3(state: dict[str, Tensor], rate: int = 25) -> SpeechTokenizer:
    """S3 v1 under S3Tokenizer's names -> the tokenizer, ready to encode. The weights do not tell
    whether they make 25 or 50 codes a second. ValueError: a bad key."""
    found = load_whisper(state)
    if "conv1.weight" not in found:
        raise ValueError("conv1.weight: missing")
    (D, n_mels, _), codes = found["conv1.weight"].shape, len(found.get("codebook.embed", ()))
    n_layers = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    with torch.device("meta"):
        model = SpeechTokenizer(TokenizerConfig(
            n_mels, D, D // 64, n_layers, conv1_stride=50 // rate, pool=1, codes=codes))
    averages = {"codebook.counts": torch.ones(codes), "codebook.fitted": torch.tensor(True)}
    try:  # averages are of training: not released
        model.load_state_dict(found | averages, assign=True)
    except RuntimeError as e:
        raise ValueError(" ".join(str(e).split())) from None  # torch names every key, a line each
    return model.eval()


# The exporter kept the names of modules for the nodes of the graph, but not for all weights: the
# operation that uses a weight tells which one it is. (A LayerNorm is spelt out: its Add_1 adds.)
ONNX_OPS = {"MatMul": "weight", "Mul": "weight", "Add": "bias", "Add_1": "bias"}


def read_onnx(path: str) -> tuple[dict[str, Tensor], int]:
    """speech_tokenizer_v1.onnx -> its weights under S3Tokenizer's names, and its codes a second.

    ValueError in one line if it is not such a file or the package onnx is not installed."""
    try:
        import onnx
        graph = onnx.load(path).graph
    except ImportError:
        raise ValueError(f"{path}: to read this, install onnx (pip install onnx)") from None
    except Exception as e:  # protobuf's own errors have no public name
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{path}: expected an ONNX graph ({reason})") from None
    arrays = {w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy())
              for w in graph.initializer}
    state, convs = {}, [node for node in graph.node if node.op_type == "Conv"]
    for node in graph.node:
        inputs = [(name, arrays[name]) for name in node.input if name in arrays]
        inputs = [(n, w) for n, w in inputs if w.is_floating_point() and w.numel() > 1]
        module, _, op = re.sub(r"^/(encoders?/)?", "", node.name).rpartition("/")
        module = module.replace("/mlp/mlp.", "/mlp/").replace("/", ".")
        module = f"conv{convs.index(node) + 1}" if node.op_type == "Conv" else module
        for kind, (name, w) in zip(("weight", "bias"), inputs):
            if node.op_type not in ("Conv", "LayerNormalization"):
                kind = ONNX_OPS.get(op, op)
            turned = w.dim() == 2 and (op == "MatMul" or "codebook" in node.name)
            w = w.T.contiguous() if turned else w
            if "codebook" not in node.name:
                where = re.search("positional_embedding", name)
                state["encoder." + (where[0] if where else f"{module}.{kind}")] = w
            elif w.dim() == 2 and min(w.shape) > 1:  # not |e|^2, should that be stored
                state["quantizer._codebook.embed"] = w
    strides = [a.ints[0] for node in convs[:1] for a in node.attribute if a.name == "strides"]
    if not strides or "quantizer._codebook.embed" not in state:
        raise ValueError(f"{path}: expected S3 v1, found an ONNX graph without its codebook")
    return state, 50 // strides[0]
