"""EChat: the whole model. Paper sections Architecture and App. B.2.

Encoder, adapter and decoder together; the prompt of every task, for training and generation alike;
the generators with the 6:18 state machine; presets; checkpoint folders and the released files.

    python model.py RUN OUT                              # what inference needs of a run, in fp16
    python model.py small --whisper FILE --llm DIR OUT   # published parts -> a checkpoint to train

One sequence of ids says everything the decoder reads:
    0 .. V-1        text tokens
    V + c           speech row c: 0..codes-1 codes, codes = open/close of generated speech,
                    codes+1 / codes+2 = open/close of the user's audio (input only)
    AUDIO (-1)      a slot filled by one frame of the adapter's output (12.5 Hz)

Tensor legend: B batch, T mel frames (100 Hz), S adapter frames, L sequence, D width, V text ids.
"""
import argparse
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import adapter
import decoder
from adapter import Adapter, AdapterConfig
from decoder import Decoder, DecoderConfig, SharedPrefix, StaticCache
from encoder import Encoder, EncoderConfig, SpeechTokenizer, TokenizerConfig, load_whisper
from flow import Flow, FlowConfig, load_cosyvoice1
from vocoder import VOCODERS, VocoderConfig, hift, load_hift

AUDIO, PAD = -1, -2  # ids that no table holds
TEXT_BLOCK, SPEECH_BLOCK = 6, 18  # the interleave, paper section LLM
THINK, THINK_END = "<think>", "<think end>"

# ---- Prompts. The words are protocol: the released code's (App. B.2 prints other wording), and an
# English think for models of our own. A think in either language is read.
with open(os.path.join(os.path.dirname(__file__), "assets/protocol.json"), encoding="utf-8") as f:
    PROTOCOL = json.load(f)
SYSTEM = PROTOCOL["system"]
TEMPLATE = PROTOCOL["think"]
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def prompt(task: str, tok, cfg: DecoderConfig, n_audio: int = 0, text: str = "",
           history=()) -> list[int]:
    """Ids of everything before the answer. `text`: the user prompt of understanding, the question
    of t2t, the words of tts. `n_audio`: adapter frames of the user's speech, left as AUDIO slots.
    `history`: earlier turns as (n_audio, reply text, reply codes), laid out as the released
    training code does it (the speech unwrapped, `<|im_end|>` twice)."""
    speech = cfg.vocab  # virtual id of speech code 0
    ids = tok.fixed(f"<|im_start|>system\n{SYSTEM[task]}<|im_end|>\n{USER}")
    for frames, reply, reply_codes in history:
        ids = ids + [AUDIO] * frames + tok.fixed(f"<|im_end|>\n{ASSISTANT}") + tok.encode(reply)
        ids = ids + [speech + c for c in reply_codes] + tok.fixed(f"<|im_end|>\n{USER}")
    ids = ids + tok.encode(text)
    if n_audio:
        ids = ids + [speech + cfg.codes + 1] + [AUDIO] * n_audio + [speech + cfg.codes + 2]
    ids = ids + tok.fixed(ASSISTANT)
    return ids + [speech + cfg.codes] if task == "tts" else ids  # tts opens speech itself


# What an understanding task may be asked for, and how it is asked.
ASKED = ("asr", "age", "gender", "emotion", "event")  # the order of question and answer
CHINESE = {"age": "年龄", "gender": "性别", "emotion": "情感", "event": "音频事件"}
NATURAL = "Think in your own words."  # asks a think-mode model of ours for the natural think


def user_prompt(wanted: list[str], language: str = "en") -> str:
    """The user prompt of an understanding task, from names among ASKED. In Chinese it is the one of
    the released demo, or for what that never asks one after its training's; there the answer's
    labels come in an order of their own."""
    labels = [w for w in ASKED[1:] if w in wanted]
    if language == "zh":
        asr = "asr " * ("asr" in wanted)
        known = PROTOCOL["ask"].get(f"{asr}{' '.join(labels)}".strip())
        return known or PROTOCOL["ask"][f"{asr}..."].format("、".join(CHINESE[w] for w in labels))
    if "asr" not in wanted:
        return f"Tell the {', '.join(labels)}."
    return "Transcribe the speech" + (f", then tell the {', '.join(labels)}." if labels else ".")


LABELS = ("age", "gender", "emotion", "event", "reply_emotion")  # of the label think
UNKNOWN = "<&&>"


def label_think(language: str, text: str, labels: dict) -> str:
    """The label think of one turn; a label not in `labels` becomes the placeholder `<&&>`."""
    known = {name: labels.get(name) or UNKNOWN for name in LABELS}
    return THINK + TEMPLATE[language].format(text=text, **known) + THINK_END


def read_think(think: str) -> dict:
    """Transcript and labels in a label think (None where absent); tags lose their brackets."""
    out = dict.fromkeys(("transcript", *LABELS))
    for template in TEMPLATE.values():
        pattern = re.escape(template).replace(r"\{text\}", "(?P<transcript>.*?)")
        pattern = re.sub(r"\\\{(\w+)\\\}", r"<?(?P<\1>[^<>,]*)>?", pattern)
        if found := re.search(pattern, think, re.S):
            out |= {k: v.strip() for k, v in found.groupdict().items()
                    if v.strip() not in ("", "&&")}
    return out


def think_length(ids: list[int], tok) -> int:
    """How many leading ids belong to the think, 0 if it has no `<think end>`: sought in the text,
    not the ids, as its `>` may merge with what follows (`><`; trap of the released code)."""
    seen = b""
    for i, token in enumerate(ids):
        seen += tok.bytes_of(token)
        if THINK_END.encode() in seen:
            return i + 1
    return 0


# ---- Presets

@dataclass
class Sampling:
    """temperature 0 = greedy; top_k 0 and top_p 1 = off; repetition as in transformers."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition: float = 1.0


@dataclass
class Config:
    name: str = "mini"
    language: str = "en"  # of the label think
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    s3: TokenizerConfig = field(default_factory=TokenizerConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    understand: Sampling = field(default_factory=Sampling)
    text: Sampling = field(default_factory=Sampling)
    speech: Sampling = field(default_factory=lambda: Sampling(0.2, 20, 0.9))
    steps: int = 10  # of the flow's solver


def mini() -> Config:
    """The committed default: Whisper tiny's encoder, a 10 M Qwen2-shaped decoder, 24 kHz."""
    return Config(adapter=AdapterConfig(ffn=512), s3=TokenizerConfig(positions=False), steps=2,
                  text=Sampling(repetition=1.1))  # greedy text of so small an LLM may go in circles


def s3_v1() -> TokenizerConfig:
    """That of CosyVoice-300M-25Hz."""
    return TokenizerConfig(n_mels=128, d_model=1280, n_heads=20, n_layers=6, conv1_stride=2, pool=1,
                           codes=4096)


def small() -> Config:
    """Whisper base + Qwen2.5-0.5B."""
    return Config(
        name="small", encoder=EncoderConfig(80, 512, 8, 6),
        adapter=AdapterConfig(d_in=512, d_out=896, n_heads=4, n_layers=4, ffn=1280),
        decoder=DecoderConfig(vocab=151936, dim=896, n_layers=24, n_heads=14, n_kv_heads=2,
                              head_dim=64, ffn=4864, codes=4096),
        s3=s3_v1(), flow=FlowConfig(codes=4096))


def paper() -> Config:
    """Whisper medium + Qwen2.5-3B, 3,458.8 M parameters, with the released sampling."""
    return Config(
        name="paper", language="zh", encoder=EncoderConfig(80, 1024, 16, 24),
        adapter=AdapterConfig(d_in=1024, d_out=2048, n_heads=4, n_layers=4, ffn=2560),
        decoder=DecoderConfig(vocab=151936, dim=2048, n_layers=36, n_heads=16, n_kv_heads=2,
                              head_dim=128, ffn=11008, codes=4096),
        s3=s3_v1(), flow=FlowConfig(codes=4096), understand=Sampling(1.0, 5, 0.9, 1.05),
        text=Sampling(1.2, 10, 0.9), speech=Sampling(1.2, 10, 0.9))


PRESETS = {"mini": mini, "small": small, "paper": paper}

# ---- The model


def sample(logits: Tensor, how: Sampling, past: list[list[int]],
           rngs: list[torch.Generator]) -> Tensor:
    """Ids (B,) from logits (B, V): repetition penalty, temperature, top-k, top-p, then a draw.
    past, rngs: of each row the ids so far and the dice, so that a row gets what it gets alone."""
    if how.repetition != 1.0:
        logits = logits.clone()
        for row, ids in zip(logits, past):
            row[ids] *= torch.where(row[ids] > 0, 1 / how.repetition, how.repetition)
    if how.temperature == 0:
        return logits.argmax(-1)
    ranked, order = logits.float().topk(min(how.top_k or logits.shape[1], logits.shape[1]))
    p = (ranked / how.temperature).softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p > how.top_p, 0)
    # Gumbel trick, with noise from the CPU: the same seed gives the same reply on any device.
    noise = torch.stack([torch.rand(p.shape[1], generator=rng) for rng in rngs])
    noise = noise.clamp_(1e-20).log_().neg_().to(p.device, non_blocking=True)
    chosen = (p / noise).argmax(-1, keepdim=True)
    return order.gather(1, chosen)[:, 0]


def reading(ids: Tensor):
    """Begin to bring ids to the host; the function that waits for them, and for nothing that the
    device was told to do since."""
    if not ids.is_cuda:
        return ids.tolist
    copy, ready = ids.to("cpu", non_blocking=True), torch.cuda.Event()
    ready.record()

    def read() -> list[int]:
        ready.synchronize()
        return copy.tolist()
    return read


def phases(layout: str, think: bool, tok, close: int):
    """Who says the next token, "text" or "speech": a coroutine that is sent each token as it is
    said, and at the end of the answer yields None. The layouts are those of `generate_all`."""
    opened = layout == "speech"  # by the prompt of tts
    token, seen = tok.im_end if opened else None, b""
    while True:
        words = spoken = 0
        while token != tok.im_end and not (layout == "interleave" and words == TEXT_BLOCK):
            token = yield "text"
            if think:  # comes whole, before the first block
                seen += tok.bytes_of(token)
                think = THINK_END.encode() not in seen
            else:
                words += 1
        if layout == "text":
            yield None
        while token == tok.im_end or spoken < SPEECH_BLOCK:
            code = yield "speech"
            if opened and code == close:
                yield None
            opened, spoken = True, spoken + 1  # the first code of an answer opens the speech


class Answer:
    """One row of a batch while it is generated: what it said, and who says the next token."""

    def __init__(self, row: int, plan, seed: int):
        self.row, self.plan, self.phase = row, plan, next(plan)
        self.said, self.rng = {"text": [], "speech": []}, torch.Generator().manual_seed(seed)

    def take(self, token: int) -> tuple[int, str, int]:
        said = self.row, self.phase, token
        self.said[self.phase].append(token)
        self.phase = self.plan.send(token)
        return said


def ctc_loss(logits: Tensor, lengths: Tensor, targets: list[Tensor], blank: int = 0) -> Tensor:
    """CTC of logits (B, T, V), lengths (B,) against rows of ids: nats an id."""
    return F.ctc_loss(logits.float().log_softmax(-1).transpose(0, 1), torch.cat(targets), lengths,
                      torch.tensor([len(t) for t in targets]), blank, zero_infinity=True)


class EChat(nn.Module):
    """Encoder -> adapter -> decoder (paper Figure 2, without token2wav)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg.encoder)
        self.adapter = Adapter(cfg.adapter)
        self.decoder = Decoder(cfg.decoder)

    def hear(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """log-mel (B, T, n_mels) and frames (B,) -> speech in the decoder's space (B, S, D)."""
        hidden, lengths = self.encoder(mel, lengths)
        return self.adapter(hidden, lengths)

    @staticmethod
    def audio_slots(frames: int) -> int:
        """Adapter frames of `frames` mel frames: the encoder halves, the adapter quarters."""
        return -(-frames // 8)

    def embed(self, ids: Tensor, speech: Tensor | None, lengths: Tensor | None) -> Tensor:
        """ids (B, L), adapter output (N, S, D) with lengths (N,) -> embeddings (B, L, D). The
        pieces of audio fill the AUDIO slots in reading order, any number in a row of ids."""
        x = self.decoder.embed(ids)
        if speech is None:
            return x
        real = torch.arange(speech.shape[1], device=ids.device) < lengths[:, None]  # (N, S)
        return x.masked_scatter((ids == AUDIO)[..., None], speech[real].to(x.dtype))

    def forward(self, ids: Tensor, heard: tuple[Tensor, Tensor] | None = None,
                attend: Tensor | None = None, targets: Tensor | None = None):
        """ids (B, L), what hear() made of their audio -> joint logits over text and speech
        (B, L, V+codes+1), None. `attend` (B, L) False masks a key (unknown labels). With targets
        (B, L), -100 = no loss: logits only where there is a target, in row order (N, V+codes+1),
        and the cross-entropy of each (N,)."""
        x = self.embed(ids, *(heard or (None, None)))
        if targets is None:
            return self.decoder.logits(self.decoder(x, mask=attend), "joint"), None
        wanted = F.pad(targets[:, 1:], (0, 1), value=-100)  # position i predicts i + 1
        shared, prefix = self.shared(ids, attend, wanted), None
        if shared:
            prefix = SharedPrefix()
            self.decoder(x[:1, :shared], cache=prefix)
            x, wanted = x[:, shared:], wanted[:, shared:]
        hidden = self.decoder(x, mask=attend, cache=prefix)  # (B, L - shared, D)
        logits = self.decoder.logits(hidden[wanted != -100], "joint")  # (N, V+codes+1)
        return logits, F.cross_entropy(logits.float(), wanted[wanted != -100], reduction="none")

    def ctc(self, speech: Tensor, lengths: Tensor, words: list[Tensor], blank: int) -> Tensor:
        """CTC of the text ids `words` on adapter output (B, S, D), read off by the text table.
        Not in the paper, whose LLM knows language: it draws each frame towards the embedding of
        what is said in it, so that a decoder of our own learns to listen in minutes. By cosine:
        the row of the blank is short, as nothing else trains it, and could never win by a product.
        """
        rows = self.decoder.embed_tokens.weight
        rows = F.normalize(rows - rows.mean(0), dim=-1)  # three quarters of a row are the mean
        logits = 20 * F.linear(F.normalize(speech, dim=-1), rows)  # (B, S, V)
        return ctc_loss(logits, lengths, words, blank)

    @staticmethod
    def shared(ids: Tensor, attend: Tensor | None, wanted: Tensor) -> int:
        """Leading positions that are the same in all rows and predict nothing: the prompt."""
        differs = (ids != ids[:1]) | (ids < 0) | (wanted != -100)
        if attend is not None:
            differs |= ~attend
        return int((~differs.any(0)).long().cumprod(0).sum()) if len(ids) > 1 else 0

    @torch.inference_mode()
    def generate_all(self, prompts: list[list[int]], tok, mels: list[Tensor] = (),
                     layout: str = "text", think: bool = False,
                     how: dict[str, Sampling] | None = None, seed: int = 0, max_tokens: int = 1200):
        """Yields (row, "text", id) and (row, "speech", code) as they come, for every prompt what
        it gets alone. A row that has ended leaves the batch. mels: a log-mel (T, n_mels) for each
        run of AUDIO slots, in reading order; how: sampling that is not the checkpoint's.
        layout: "text" until `<|im_end|>`; "speech" until speech closes (tts); "both", all text
        then all speech; "interleave", 6 text : 18 speech after the think (if `think`), which
        comes whole. Only the head of the current phase is asked, as released (training has one
        softmax over both). `<|im_end|>` and the open and close of speech are yielded too."""
        cfg, table = self.cfg.decoder, self.decoder.embed_tokens.weight
        device, dtype = table.device, table.dtype
        how = {"text": self.cfg.text, "speech": self.cfg.speech} | (how or {})
        heard = lengths = None
        if mels:  # one by one: a batch would save nothing on a CPU, and pads cost
            heard = torch.cat([self.hear(mel[None].to(device, dtype), torch.tensor(
                [len(mel)], device=device))[0] for mel in mels], 1)  # (1, all S, D)
            lengths = torch.tensor([heard.shape[1]], device=device)
        longest = max(map(len, prompts))
        pads = [longest - len(ids) for ids in prompts]
        ids = torch.tensor([[PAD] * n + ids for n, ids in zip(pads, prompts)], device=device)
        cache = self.decoder.cache(len(ids), longest + max_tokens,
                                   torch.tensor(pads, device=device) if any(pads) else None)
        ahead = isinstance(cache, StaticCache)  # steps begin before the host has read their token
        hidden = self.decoder.prefill(self.embed(ids, heard, lengths), cache)  # (B, 1, D)
        live = [Answer(i, phases(layout, think, tok, cfg.codes), seed) for i in range(len(ids))]
        for _ in range(max_tokens):
            rows = torch.empty(len(live), 1, dtype=torch.long, device=device)
            for phase in ("text", "speech"):
                if here := [i for i, answer in enumerate(live) if answer.phase == phase]:
                    at = here if len(here) < len(live) else slice(None)  # a GPU waits for a list
                    logits = self.decoder.logits(hidden[at, -1], phase)
                    tokens = sample(logits, how[phase], [live[i].said[phase] for i in here],
                                    [live[i].rng for i in here])
                    rows[at, 0] = tokens + cfg.vocab * (phase == "speech")
            read = reading(rows[:, 0])
            if ahead:
                hidden = self.decoder.decode(self.decoder.embed(rows), cache)
            for answer, row in zip(live, read()):
                yield answer.take(row - cfg.vocab * (answer.phase == "speech"))
            here = [i for i, answer in enumerate(live) if answer.phase]
            if not here:
                return
            if len(here) < len(live):
                cache.keep(here)
                live, rows = [live[i] for i in here], rows[here]
            if not ahead:
                hidden = self.decoder.decode(self.decoder.embed(rows), cache)

    def answers(self, tok, task: str, asked: list[tuple], think: bool = True,
                interleave: bool = False, **options):
        """generate_all() for one of the tasks s2s, s2t, t2t, tts, understand (with its prompt).
        asked: of each row the log-mel (T, n_mels) or None, the text or "", and the history,
        earlier turns as (log-mel (T, n_mels), reply text, reply codes)."""
        layout = {"s2s": "both", "tts": "speech"}.get(task, "text")
        layout = "interleave" if interleave and layout != "text" else layout
        think = think and task in ("s2s", "s2t")
        name = task + "_stream" * (layout == "interleave") + "_think" * think
        prompts, mels = [], []
        for mel, text, history in asked:
            turns = [(self.audio_slots(len(m)), reply, codes) for m, reply, codes in history]
            frames = 0 if mel is None else self.audio_slots(len(mel))
            prompts.append(prompt(name, tok, self.cfg.decoder, frames, text, turns))
            mels += [m for m, *_ in [*history, (mel,)] if m is not None]
        own = {"text": self.cfg.understand} if task == "understand" else {}
        options["how"] = own | (options.get("how") or {})
        return self.generate_all(prompts, tok, mels, layout, think and layout == "interleave",
                             **options)

    def generate(self, ids: list[int], tok, *how, **options):
        """generate_all() after one prompt, as (phase, token)."""
        return (said[1:] for said in self.generate_all([ids], tok, *how, **options))


class Token2Wav(nn.Module):
    """Flow and vocoder with the voice they speak in: codes -> wave (ours 24 kHz)."""

    def __init__(self, cfg: Config, voice: dict[str, Tensor]):
        super().__init__()
        self.cfg, self.voice = cfg, voice
        self.flow = Flow(cfg.flow)
        self.vocoder = VOCODERS[cfg.vocoder.kind](cfg.vocoder)

    def bfloat16(self) -> "Token2Wav":
        """Where the time goes in bfloat16: the flow's U-Net, the vocoder's residual blocks."""
        self.flow.estimator.bfloat16()
        self.vocoder.bfloat16()
        return self

    def start(self, seed: int = 0, steps: int | None = None,
              voice: dict[str, Tensor] | None = None):
        """The state before the first code; the flow hears the voice's prompt here. `steps` that are
        not the checkpoint's."""
        voice, device = voice or self.voice, next(self.parameters()).device
        heard = (voice[name].to(device) for name in ("spk", "prompt_codes", "prompt_mel"))
        return self.flow.start(*heard, steps=steps or self.cfg.steps, seed=seed), None

    @torch.inference_mode()
    def stream(self, codes: list[int], state, final: bool = False):
        """More codes -> (the wave (N,) that is certain by now, state). The pieces of a reply join
        to exactly what one call with all codes and `final` gives."""
        mel_state, wave_state = state
        codes = torch.tensor([codes], dtype=torch.long, device=next(self.parameters()).device)
        mel, mel_state = self.flow.stream(codes, mel_state, final)
        wave, wave_state = self.vocoder.stream(mel, wave_state, final)
        return wave[0].cpu(), (mel_state, wave_state)


# ---- Checkpoint folders: config.json, tokenizer.json, and as safetensors model (encoder, adapter,
# decoder), token2wav (flow, vocoder), tokenizer_s3 and voice

class BadCheckpoint(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message is one clear line."""


def config_from_dict(data: dict, cls=Config):
    """Nested dataclass from parsed JSON; a key the dataclass lacks is an error naming it."""
    own, out = cls(), {}
    for key, value in data.items():
        if not hasattr(own, key):
            raise ValueError(f"unknown key {key!r} for {cls.__name__}")
        if is_dataclass(default := getattr(own, key)):
            value = config_from_dict(value, type(default))
        elif isinstance(value, str) != isinstance(default, str) or \
                isinstance(value, list) != isinstance(default, tuple):
            raise ValueError(f"{key} of {cls.__name__}: {value!r} in the place of {default!r}")
        elif isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        out[key] = value
    return cls(**out)


def load_config(folder: str) -> Config:
    path = os.path.join(folder, "config.json")
    with expecting("the config of a checkpoint", path), open(path, encoding="utf-8") as f:
        return config_from_dict(json.load(f))


MAGIC = {b"PK": "a zip", b"\x80": "a pickle", b"<": "an HTML page", b"GGUF": "a GGUF file",
         b"version https://git-lfs": "a Git LFS pointer"}


def found(path: str, error: Exception) -> str:
    """What a file that could not be used is, in a few words."""
    text = f"missing {error}" if isinstance(error, KeyError) else str(error)
    if code := re.search(r"[Uu]nsupported (?:\w+: )?GLOBAL (\S+)", text):
        return f"pickled code, {code[1]}, which is never run"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    kind = "a folder"
    if os.path.isfile(path):
        with open(path, "rb") as f:
            head = f.read(100)
        kind = "safetensors" if head[8:9] == b"{" else "an empty file" if not head else next(
            (kind for magic, kind in MAGIC.items() if head.lstrip().startswith(magic)), "a file")
        kind += f" of {os.path.getsize(path):,} bytes"
    return f"{kind} ({text[:250].partition(chr(10))[0]})"


@contextmanager
def expecting(what: str, path: str):
    """Whatever goes wrong inside becomes a BadCheckpoint: what was expected, what was found."""
    try:
        yield
    except BadCheckpoint:
        raise
    except Exception as e:  # IndexError and struct.error are among what torch.load raises
        raise BadCheckpoint(f"{path}: expected {what}, found {found(path, e)}") from None


def read_weights(path: str) -> dict[str, Tensor]:
    """A safetensors, .pt or .pth.tar file (never unpickling code) as a dict, or BadCheckpoint in
    one line. The weights are mapped: what is not used is not read."""
    pickled = path.endswith((".pt", ".pth", ".pth.tar"))
    with expecting("torch.save's weights" if pickled else "safetensors", path):
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)) \
            if pickled else load_file(path)
    # openai-whisper's, DeepSpeed's, HiFi-GAN's (whose older files are no zip, so cannot be mapped)
    for wrapper in ("model_state_dict", "module", "generator"):
        weights = weights.get(wrapper, weights) if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise BadCheckpoint(f"{path}: expected weights by name, found something else")
    return weights


class Hollow(TorchFunctionMode):
    """Modules made inside are given no first weights: a file has them. (Not the meta device, which
    takes a second to import torch's compiler for that.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def check(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Every key of `module` there, no other, every shape equal; or an error naming the key."""
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights:
            raise BadCheckpoint(f"{source}: {name} {'missing' if name in own else 'unexpected'}")
        was, due = weights[name], own[name]
        if was.shape != due.shape:
            raise BadCheckpoint(f"{source}: {name} is {tuple(was.shape)}, expected "
                                f"{tuple(due.shape)}")
        if was.is_floating_point() != due.is_floating_point():  # quantised, perhaps
            raise BadCheckpoint(f"{source}: {name} is {was.dtype}, expected {due.dtype}")


def fit(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `module`, if they are its own."""
    fill(module, lambda: weights, source)


PART = 128 << 20  # bytes


def fill(module: nn.Module, read, source: str) -> None:
    """fit() of what read() maps, anew for every part: nothing large is held twice. A layer stays
    whole: some of its weights are joined on the way in (decoder.fuse)."""
    check(module, read(), source)
    layers = {}
    for name in module.state_dict():
        layers.setdefault(re.match(r"(.*?\.\d+\.)?", name)[0], []).append(name)
    todo = list(layers.values())
    while todo:
        weights, part, size = read(), {}, 0
        while todo and size < PART:
            part |= {name: weights[name] for name in todo[0]}
            size += sum(weights[name].nbytes for name in todo.pop(0))
        module.load_state_dict(part, strict=False)
        del weights, part


def save_weights(path: str, module_or_dict, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file whole or not at all; floats in `dtype` if given."""
    tensors = module_or_dict if isinstance(module_or_dict, dict) else module_or_dict.state_dict()
    try:
        with open(path + ".tmp", "w") as f:
            mode = os.fstat(f.fileno()).st_mode
        save_file({k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
                   for k, v in tensors.items()}, path + ".tmp")
        os.chmod(path + ".tmp", mode)  # as of any new file; safetensors' can be read by us alone
    except (SafetensorError, OSError) as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise BadCheckpoint(f"{path}: cannot be written ({e})") from None
    os.replace(path + ".tmp", path)


def save_config(folder: str, cfg: Config) -> None:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(asdict(cfg), f, indent=1)
    os.replace(path + ".tmp", path)


def restored(make, path: str, device, dtype: torch.dtype | None = None, read=read_weights):
    """The module that make() makes, with the weights that read(path) maps, in eval mode."""
    with Hollow():
        model = make()
    model = model.to("meta", dtype).to_empty(device=device)
    fill(model, lambda: read(path), path)
    return model.eval()


def load_echat(path: str, device="cpu", dtype: torch.dtype | None = None) -> EChat:
    """The model of a checkpoint folder, or of a released file (see `osum_file`), in eval mode.
    dtype: float32 where not given, or what the released file holds."""
    if not (file := osum_file(path)):
        cfg = load_config(path)
        return restored(lambda: EChat(cfg), os.path.join(path, "model.safetensors"), device, dtype)
    cfg, weights = read_osum(file)
    dtype = dtype or weights["decoder.speech_head.weight"].dtype
    del weights  # or its map would stay, and what is copied be there twice
    return restored(lambda: EChat(cfg), file, device, dtype, lambda file: read_osum(file)[1])


# The released OSUM-EChat: one flat dict of the training code's names

TO_ADAPTER = ("down_sample_2.", "speech_transformer.", "speech_llama_proj.", "ln_speech.")


def osum_file(path: str) -> str | None:
    """The weights file if `path` is a released file or a DeepSpeed training folder, else None."""
    inside = os.path.join(path, "mp_rank_00_model_states.pt")
    return next((p for p in (path, inside) if os.path.isfile(p)), None)


def encoder_config(state: dict[str, Tensor]) -> EncoderConfig:
    """The size of Whisper's encoder with these weights; all its heads are 64 wide."""
    D, n_mels, _ = state["conv1.weight"].shape
    return EncoderConfig(n_mels, D, D // 64, numbered(state, "blocks."))


def numbered(state: dict[str, Tensor], prefix: str) -> int:
    """How many layers there are under a prefix."""
    return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})


def read_osum(path: str) -> tuple[Config, dict[str, Tensor]]:
    """A released .pt, or what DeepSpeed saved in training -> the paper's preset at the size of
    these weights (only widths of heads are taken as known), and the weights by our names."""
    weights, own, cfg = read_weights(path), {"encoder": {}, "adapter": {}, "decoder": {}}, paper()
    for key, value in weights.items():
        part = "adapter" if key.startswith(TO_ADAPTER) else \
            "encoder" if key.startswith("encoder.") else "decoder"
        own[part][key] = value
    for key in ("encoder.embed.conv.0.weight", "speech_llama_proj.weight", "speech_head.weight"):
        if key not in weights:
            raise BadCheckpoint(f"{path}: expected the weights of a released OSUM-EChat, among "
                                f"them {key}; found {len(weights)}, {next(iter(weights))} first")
    llm, width = "llama_model.model.", cfg.decoder.head_dim
    with expecting("the weights of a released OSUM-EChat", path):
        own["encoder"] = load_whisper(own["encoder"])
        own["adapter"] = adapter.load_osum(own["adapter"])
        cfg.encoder, heard = encoder_config(own["encoder"]), own["adapter"]
        cfg.adapter = AdapterConfig(*heard["proj.weight"].shape[::-1], cfg.adapter.n_heads,
                                    numbered(heard, "blocks."), len(heard["blocks.0.mlp.0.weight"]))
        q, k, ffn = (len(weights[f"{llm}layers.0.{name}_proj.weight"])
                     for name in ("self_attn.q", "self_attn.k", "mlp.gate"))
        cfg.decoder = DecoderConfig(
            *weights[llm + "embed_tokens.weight"].shape, numbered(weights, llm + "layers."),
            q // width, k // width, width, ffn, codes=len(weights["speech_head.weight"]) - 1)
        own["decoder"] = decoder.load_osum(own["decoder"])
    return cfg, {f"{part}.{k}": v for part, state in own.items() for k, v in state.items()}


def load_voice(path: str, cfg: FlowConfig) -> dict[str, Tensor]:
    """A voice file: spk (1, spk_dim), prompt_codes (1, P), prompt_mel (1, 4P, M)."""
    voice = {k: v.float() if v.is_floating_point() else v for k, v in read_weights(path).items()}
    spk, codes, mel = (voice.get(k, torch.zeros(0)) for k in ("spk", "prompt_codes", "prompt_mel"))
    spare = 0 if cfg.causal else 6  # a prompt that is stretched may lack a few frames
    if not (codes.dim() == 2 and len(codes) == 1 and not codes.is_floating_point()
            and ((codes >= 0) & (codes < cfg.codes)).all() and spk.shape == (1, cfg.spk_dim)
            and mel.dim() == 3 and mel.shape[::2] == (1, cfg.mel)
            and mel.shape[1] >= cfg.frames(codes.shape[1]) - spare
            and (mel.shape[1] > 0) == (codes.shape[1] > 0)):
        raise BadCheckpoint(f"{path}: not a voice for this model (spk, prompt_codes, prompt_mel)")
    return voice


def load_token2wav(folder: str, voice: str | None = None, device="cpu") -> Token2Wav:
    """Flow and vocoder of a checkpoint folder, speaking in its voice or in the file `voice`; or, if
    the folder has a flow.pt, those of the released CosyVoice."""
    if os.path.exists(os.path.join(folder, "flow.pt")):
        return load_cosyvoice(folder, voice, device)
    cfg = load_config(folder)
    voice = load_voice(voice or os.path.join(folder, "voice.safetensors"), cfg.flow)
    return restored(lambda: Token2Wav(cfg, voice), os.path.join(folder, "token2wav.safetensors"),
                    device)


def load_cosyvoice(folder: str, voice: str | None, device) -> Token2Wav:
    """Flow and vocoder of the released CosyVoice-300M-25Hz (22.05 kHz), with a voice file; or of
    CosyVoice-300M: its weights look the same, only a voice file tells its 50 codes a second."""
    if not voice:
        raise BadCheckpoint(f"{folder}: has no voice; give --voice FILE (python data.py voice)")
    cfg = paper()
    cfg.flow, cfg.vocoder = FlowConfig.cosyvoice1(), hift()
    try:
        heard = load_voice(voice, cfg.flow)
    except BadCheckpoint:
        cfg.flow = FlowConfig.cosyvoice1(rate=50)
        heard = load_voice(voice, cfg.flow)
    with Hollow():
        model = Token2Wav(cfg, heard)
    for name, part, load in (("flow", model.flow, load_cosyvoice1),
                             ("hift", model.vocoder, load_hift)):
        path = os.path.join(folder, f"{name}.pt")
        with expecting(f"the {name} of CosyVoice-300M", path):
            fit(part, load(read_weights(path)), path)
    return model.to(device, torch.float32).eval()


def load_s3(folder: str, device="cpu") -> SpeechTokenizer:
    cfg = load_config(folder).s3
    return restored(lambda: SpeechTokenizer(cfg),
                    os.path.join(folder, "tokenizer_s3.safetensors"), device)


def export(run: str, out: str) -> None:
    """A run's checkpoint folder without what only training needs, in fp16."""
    save_config(out, load_config(run))
    shutil.copy(os.path.join(run, "tokenizer.json"), out)  # first: an error where `out` is `run`
    for name in ("model", "token2wav", "tokenizer_s3", "voice"):
        if os.path.exists(path := os.path.join(run, f"{name}.safetensors")):
            save_weights(os.path.join(out, os.path.basename(path)), read_weights(path),
                         torch.float16)


def compose(preset: str, whisper: str, llm: str, out: str) -> None:
    """A checkpoint folder from Whisper's encoder (.pt or safetensors) and a Qwen2 folder."""
    cfg, state = PRESETS[preset](), {}
    with expecting("the weights of Whisper", whisper):
        state["encoder"] = load_whisper(read_weights(whisper))
        cfg.encoder = encoder_config(state["encoder"])
        norm = nn.LayerNorm(cfg.encoder.d_model)  # its last
        norm.load_state_dict({k: state["encoder"][f"ln_post.{k}"] for k in ("weight", "bias")})
    with expecting("a Hugging Face folder of Qwen2 or Qwen2.5", llm):
        sizes, state["decoder"] = decoder.load_qwen2(llm)
    cfg.decoder = DecoderConfig(**sizes, codes=cfg.decoder.codes)
    cfg.adapter.d_in, cfg.adapter.d_out = cfg.encoder.d_model, cfg.decoder.dim
    ears = Adapter(cfg.adapter)
    ears.start_open(norm)
    state["adapter"] = ears.state_dict()
    rows = Decoder(DecoderConfig(1, cfg.decoder.dim, 0, codes=cfg.decoder.codes)).state_dict()
    state["decoder"] |= {k: v for k, v in rows.items() if k.startswith("speech_")}
    state = {f"{part}.{k}": v for part, weights in state.items() for k, v in weights.items()}
    with Hollow():
        check(EChat(cfg), state, f"{whisper}, {llm}")
    os.makedirs(out, exist_ok=True)
    with expecting("tokenizer.json", llm):
        shutil.copy(os.path.join(llm, "tokenizer.json"), out)
    save_config(out, cfg)
    save_weights(os.path.join(out, "model.safetensors"), state)
    print(f"{out}: adapter and speech codes are untrained, so only --task t2t works; train them: "
          f"python train.py --stage align --preset {preset} --init {out} ...", file=sys.stderr)


def main() -> None:
    p = argparse.ArgumentParser(description="Make a checkpoint folder.")
    p.error = lambda message: p.exit(2, f"model.py: {message}\n")
    p.add_argument("source", help="RUN: a run to export, or a preset: small, paper")
    p.add_argument("out")
    p.add_argument("--whisper", metavar="FILE", help="for a preset: Whisper's weights")
    p.add_argument("--llm", metavar="DIR", help="for a preset: folder of Qwen2.5-...-Instruct")
    args = p.parse_args()
    try:
        if args.source in PRESETS and args.whisper and args.llm:  # also if such a folder is there
            compose(args.source, args.whisper, args.llm, args.out)
        elif os.path.isdir(args.source):
            export(args.source, args.out)
        else:
            p.error(f"{args.source}: expected a run, or small --whisper FILE --llm DIR")
    except (BadCheckpoint, OSError) as e:
        p.error(str(e))


if __name__ == "__main__":
    main()
