"""EChat: the whole model. Paper sections Architecture and App. B.2.

Puts encoder, adapter and decoder together; holds the prompt of every task (one function, used by
training and by generation alike), the generators of every task with the 6:18 state machine, the
presets, and reading and writing of a checkpoint folder.

One sequence of ids says everything the decoder reads:
    0 .. V-1        text tokens
    V + c           speech row c: 0..codes-1 codes, codes = open/close of generated speech,
                    codes+1 / codes+2 = open/close of the user's audio (input only)
    AUDIO (-1)      a slot filled by one frame of the adapter's output (12.5 Hz)

Tensor legend: B batch, T mel frames (100 Hz), S adapter frames, L sequence, D width, V text
vocabulary.
"""
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapter import Adapter, AdapterConfig
from decoder import Decoder, DecoderConfig, KVCache, SharedPrefix
from encoder import Encoder, EncoderConfig, SpeechTokenizer, TokenizerConfig
from flow import Flow, FlowConfig
from vocoder import Generator, VocoderConfig

AUDIO = -1
TEXT_BLOCK, SPEECH_BLOCK = 6, 18  # the interleave, paper section LLM
THINK, THINK_END = "<think>", "<think end>"

# ---------------------------------------------------------------------------------------------
# Prompts. Protocol of the released code, word for word (paper App. B.2 prints other wording).

_YOU = ("You are OSUM-chat, {} by ASLP Lab. ")
_BOTH = "You understand both the meaning and paralinguistic cues in speech"
SYSTEM = {
    "s2s": _YOU.format("a speech-to-speech dialogue assistant") + _BOTH
    + " then respond with appropriate text and emotionally matching synthetic speech.",
    "s2s_think": _YOU.format("a speech-to-speech dialogue assistant") + _BOTH
    + ". Before responding, first output your reasoning inside <think>...</think end>, analyzing"
    " the user\u2019s words and vocal cues. Then generate a reply with appropriate text and"
    " emotionally matched synthetic speech.",
    "s2s_stream": _YOU.format("a speech-to-speech dialogue assistant")
    + "You analyze speech (content + paralinguistic cues) and respond with interleaved text and"
    " emotionally-matched synthetic speech.",
    "s2s_stream_think": _YOU.format("a speech-to-speech dialogue assistant")
    + "You analyze speech (both content and paralinguistic cues). Before responding, output your"
    " reasoning in <think>...</think end>. Then reply with interleaved text and emotionally"
    " matched synthetic speech.",
    "s2t": _YOU.format("a speech-to-text dialogue assistant") + _BOTH
    + " then respond exclusively with appropriate text.",
    "s2t_think": _YOU.format("a thinking-enabled speech-to-text dialogue assistant")
    + "You not only comprehend the semantic meaning and paralinguistic cues in speech but also"
    " engage in deliberate reasoning to process such information. Based on this thinking process,"
    " you then respond exclusively with appropriate text.",
    "t2t": _YOU.format("a text-to-text dialogue assistant")
    + "You understand user input in text then respond exclusively with appropriate text.",
    "understand": _YOU.format("an audio understanding assistant")
    + "You can transcribe speech accurately and analyze paralinguistic cues to provide precise"
    " text responses.",
    "tts": _YOU.format("a speech synthesis assistant")
    + "You generate natural and fluent speech from text input.",
    "tts_stream": _YOU.format("a speech synthesis assistant")
    + "You generate natural speech from text input and output both audio and the original text in"
    " interleaved format.",
}
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def prompt(task: str, tok, cfg: DecoderConfig, n_audio: int = 0, text: str = "",
           history=()) -> list[int]:
    """Ids of everything before the answer, the same in training and in generation.

    `text`: the user prompt of understanding, the question of t2t, the words of tts. `n_audio`:
    adapter frames of the user's speech, left as AUDIO slots. `history`: earlier turns as
    (n_audio, reply text, reply codes), laid out as the released training code does it (the
    speech unwrapped, `<|im_end|>` twice). Sequences: facts 3.4 of the released code.
    """
    speech = cfg.vocab  # virtual id of speech code 0
    ids = tok.fixed(f"<|im_start|>system\n{SYSTEM[task]}<|im_end|>\n{USER}")
    for frames, reply, reply_codes in history:
        ids = ids + [AUDIO] * frames + tok.fixed(f"<|im_end|>\n{ASSISTANT}") + tok.encode(reply)
        ids = ids + [speech + c for c in reply_codes] + tok.fixed(f"<|im_end|>\n{USER}")
    if text:
        ids = ids + tok.encode(text)
    if n_audio:
        ids = ids + [speech + cfg.codes + 1] + [AUDIO] * n_audio + [speech + cfg.codes + 2]
    ids = ids + tok.fixed(ASSISTANT)
    return ids + [speech + cfg.codes] if task == "tts" else ids  # tts opens speech itself


# What an understanding task may be asked for, its list tags, and how it is asked.
TAGS = {"<TRANSCRIBE>": "asr", "<EMOTION>": "emotion", "<GENDER>": "gender", "<AGE>": "age",
        "<EVENT>": "event", "<CAPTION>": "event"}
ASKED = ("asr", "age", "gender", "emotion", "event")  # the order of question and answer
NATURAL = "Think in your own words."  # asks a think-mode model of ours for the natural think


def user_prompt(wanted: list[str]) -> str:
    """The user prompt of an understanding task, from names among ASKED, in its order."""
    labels = [w for w in ASKED[1:] if w in wanted]
    if "asr" not in wanted:
        return f"Tell the {', '.join(labels)}."
    return "Transcribe the speech" + (f", then tell the {', '.join(labels)}." if labels else ".")


# The label think. Chinese as released (`tag_think`), English for models of our own; both are read.
LABELS = ("age", "gender", "emotion", "event", "reply_emotion")
UNKNOWN = "<&&>"
TEMPLATE = {
    "en": "The user said: {text} Age: {age}, gender: {gender}, emotion: {emotion},"
    " sound event: {event}, reply emotion: {reply_emotion}",
    "zh": "\u7528\u6237\u8bf4\u7684\u8bdd\u662f:{text},\u5e74\u9f84\u4e3a:{age},\u6027\u522b\u4e3a:"
    "{gender},\u60c5\u611f\u4e3a:{emotion},\u58f0\u97f3\u4e8b\u4ef6\u4e3a:{event},\u63a8\u6d4b"
    "\u4f7f\u7528\u7684\u56de\u590d\u60c5\u611f\u4e3a:{reply_emotion},\u6211\u5e94\u8be5\u7efc\u5408"
    "\u7528\u6237\u7684\u8bed\u4e49\u548c\u526f\u8bed\u8a00\u4fe1\u606f\u7ed9\u51fa\u4e13\u4e1a\u4e14"
    "\u5bf9\u5e94\u7684\u56de\u7b54",
}


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
            known = {k: v.strip() for k, v in found.groupdict().items()}
            out.update({k: v for k, v in known.items() if v not in ("", "&&")})
    return out


def think_length(ids: list[int], tok) -> int:
    """How many leading ids belong to the think: up to the token that completes `<think end>`.

    The closing `>` may merge with what follows (`><`), so the marker is sought in the decoded
    text, not among the ids (trap of the released code). 0 if there is no think.
    """
    seen = b""
    for i, token in enumerate(ids):
        seen += tok.bytes_of(token)
        if THINK_END.encode() in seen:
            return i + 1
    return 0


# ---------------------------------------------------------------------------------------------
# Presets

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
    speech: Sampling = field(default_factory=lambda: Sampling(0.8, 20, 0.9))


def mini() -> Config:
    """The committed default: Whisper tiny's encoder, a 10 M Qwen2-shaped decoder, 24 kHz."""
    return Config(adapter=AdapterConfig(384, 320, 4, 4, ffn=512),
                  s3=TokenizerConfig(positions=False))


def small() -> Config:
    """Whisper base + Qwen2.5-0.5B."""
    return Config(
        name="small",
        encoder=EncoderConfig(80, 512, 8, 6),
        adapter=AdapterConfig(d_in=512, d_out=896, n_heads=4, n_layers=4, ffn=1280),
        decoder=DecoderConfig(vocab=151936, dim=896, n_layers=24, n_heads=14, n_kv_heads=2,
                              head_dim=64, ffn=4864, codes=4096),
        s3=TokenizerConfig(d_model=512, n_heads=8, n_layers=3, tail_layers=3, codes=4096),
        flow=FlowConfig(codes=4096))


def paper() -> Config:
    """Whisper medium + Qwen2.5-3B, 3,458.8 M parameters, with the released sampling."""
    return Config(
        name="paper", language="zh",
        encoder=EncoderConfig(80, 1024, 16, 24),
        adapter=AdapterConfig(d_in=1024, d_out=2048, n_heads=4, n_layers=4, ffn=2560),
        decoder=DecoderConfig(vocab=151936, dim=2048, n_layers=36, n_heads=16, n_kv_heads=2,
                              head_dim=128, ffn=11008, codes=4096),
        s3=TokenizerConfig(n_mels=128, d_model=1280, n_heads=20, n_layers=6, conv1_stride=2,
                           pool=1, codes=4096),
        flow=FlowConfig(codes=4096),
        understand=Sampling(1.0, 5, 0.9, 1.05), text=Sampling(1.2, 10, 0.9),
        speech=Sampling(1.2, 10, 0.9))


PRESETS = {"mini": mini, "small": small, "paper": paper}

# ---------------------------------------------------------------------------------------------
# The model


def sample(logits: Tensor, how: Sampling, past: list[int], rng: torch.Generator) -> Tensor:
    """One id from logits (V,): repetition penalty, temperature, top-k, top-p, then a draw."""
    if how.repetition != 1.0 and past:
        ids = torch.tensor(past, device=logits.device)
        seen = logits[ids]
        logits = logits.scatter(0, ids, torch.where(seen > 0, seen / how.repetition,
                                                    seen * how.repetition))
    if how.temperature == 0:
        return logits.argmax()
    logits = logits.float() / how.temperature
    if how.top_k:
        logits = logits.masked_fill(logits < logits.topk(min(how.top_k, len(logits)))[0][-1],
                                    -torch.inf)
    if how.top_p < 1:
        ranked, order = logits.sort(descending=True)
        p = ranked.softmax(-1)
        ranked = ranked.masked_fill(p.cumsum(-1) - p > how.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(0, order, ranked)
    # Gumbel trick with noise from a CPU generator: the same seed gives the same reply anywhere.
    noise = torch.rand(len(logits), generator=rng).clamp_(1e-20).log_().neg_()
    return (logits.softmax(-1) / noise.to(logits.device)).argmax()


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
        """ids (B, L), adapter output (N, S, D) with lengths (N,) -> embeddings (B, L, D).

        The N pieces of audio fill the AUDIO slots in reading order: none, one or (with a history)
        several in a row of ids."""
        x = self.decoder.embed(ids)
        if speech is None:
            return x
        real = torch.arange(speech.shape[1], device=ids.device) < lengths[:, None]  # (N, S)
        return x.masked_scatter((ids == AUDIO)[..., None], speech[real].to(x.dtype))

    def forward(self, ids: Tensor, mel: Tensor | None = None, mel_lengths: Tensor | None = None,
                attend: Tensor | None = None, targets: Tensor | None = None,
                heard: tuple[Tensor, Tensor] | None = None):
        """ids (B, L) -> (logits, loss): joint logits over text and speech (facts 3.4).

        The user's audio: mel (B, T, n_mels) with mel_lengths, or `heard`, what hear() made of it.

        With targets (B, L), -100 = no loss, logits are made only where there is a target, in
        row order (N, V+codes+1), and loss is the cross-entropy of each (N,); else logits are
        (B, L, V+codes+1) and loss None. `attend` (B, L) False masks a key (unknown labels).
        """
        if mel is not None:
            heard = self.hear(mel, mel_lengths)
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
        rows = F.normalize(self.decoder.embed_tokens.weight, dim=-1)
        logits = 20 * F.linear(F.normalize(speech, dim=-1), rows)  # (B, S, V)
        return F.ctc_loss(logits.float().log_softmax(-1).transpose(0, 1), torch.cat(words), lengths,
                          torch.tensor([len(w) for w in words]), blank, zero_infinity=True)

    @staticmethod
    def shared(ids: Tensor, attend: Tensor | None, wanted: Tensor) -> int:
        """Leading positions that are the same in all rows and predict nothing: the prompt."""
        differs = (ids != ids[:1]) | (ids < 0) | (wanted != -100)
        if attend is not None:
            differs |= ~attend
        return int((~differs.any(0)).long().cumprod(0).sum()) if len(ids) > 1 else 0

    @torch.inference_mode()
    def generate(self, ids: list[int], tok, mels: list[Tensor] = (), layout: str = "text",
                 think: bool = False, how: dict[str, Sampling] | None = None, seed: int = 0,
                 max_tokens: int = 1200):
        """Yields ("text", id) and ("speech", code) as they come, after the prompt `ids`.

        mels: a log-mel (T, n_mels) for each run of AUDIO slots, oldest first; how: the sampling
        of "text" and "speech" where it is not the checkpoint's.
        layout: "text" until `<|im_end|>`; "speech" until speech closes (tts); "both", all text
        then all speech; "interleave", 6 text : 18 speech after the think (if `think`), which
        comes whole. Only the head of the current phase is asked, as released (training has one
        softmax over both). `<|im_end|>` and the open and close of speech are yielded too.
        """
        cfg, device = self.cfg.decoder, next(self.parameters()).device
        dtype = self.decoder.embed_tokens.weight.dtype
        how = {"text": self.cfg.text, "speech": self.cfg.speech} | (how or {})
        rng, past = torch.Generator().manual_seed(seed), {"text": [], "speech": []}
        heard = lengths = None
        if mels:
            lengths = torch.tensor([len(m) for m in mels], device=device)
            mel = nn.utils.rnn.pad_sequence(list(mels), batch_first=True)  # (turns, T, n_mels)
            heard, lengths = self.hear(mel.to(device, dtype), lengths)
        x = self.embed(torch.tensor([ids], device=device), heard, lengths)
        cache = KVCache(cfg, 1, len(ids) + max_tokens, dtype, device)
        hidden = self.decoder.prefill(x, cache)
        phase = "speech" if layout == "speech" else "text"
        text_open, speech_open = phase == "text", phase == "speech"
        block, seen = 0, b""  # tokens of this block; bytes of the think so far
        for _ in range(max_tokens):
            logits = self.decoder.logits(hidden[0, -1], phase)
            token = int(sample(logits, how[phase], past[phase], rng))
            past[phase].append(token)
            yield phase, token
            row = token if phase == "text" else cfg.vocab + token
            block += 1
            if phase == "text":
                seen += tok.bytes_of(token) if think else b""
                if token == tok.im_end:
                    if layout == "text":
                        return
                    phase, text_open, block = "speech", False, 0
                elif think:
                    think, block = THINK_END.encode() not in seen, 0
                elif layout == "interleave" and block == TEXT_BLOCK:
                    phase, block = "speech", 0
            elif token == cfg.codes and speech_open:
                return
            else:
                speech_open = True  # the first one is the opening token, 17 codes follow it
                if text_open and block == SPEECH_BLOCK:
                    phase, block = "text", 0
            x = self.decoder.embed(torch.tensor([[row]], device=device))
            hidden = self.decoder.decode(x, cache)

    def answer(self, tok, task: str, mel: Tensor | None = None, text: str = "",
               think: bool = True, interleave: bool = False, history=(),
               how: dict[str, Sampling] | None = None, seed: int = 0, max_tokens: int = 1200):
        """generate() for one of the tasks s2s, s2t, t2t, tts, understand (with its prompt).

        history: earlier turns as (log-mel (T, n_mels), reply text, reply codes)."""
        name = task
        if task in ("s2s", "tts") and interleave:
            name += "_stream"
        think = think and task in ("s2s", "s2t")
        name += "_think" if think else ""
        layout = {"s2s": "both", "tts": "speech"}.get(task, "text")
        layout = "interleave" if interleave and layout != "text" else layout
        frames = 0 if mel is None else self.audio_slots(len(mel))
        turns = [(self.audio_slots(len(m)), reply, codes) for m, reply, codes in history]
        ids = prompt(name, tok, self.cfg.decoder, frames, text, turns)
        mels = [m for m, _, _ in history] + ([] if mel is None else [mel])
        how = ({"text": self.cfg.understand} if task == "understand" else {}) | (how or {})
        return self.generate(ids, tok, mels, layout, think and layout == "interleave", how, seed,
                             max_tokens)


class Token2Wav(nn.Module):
    """Flow and vocoder with the voice they speak in: codes -> 24 kHz wave."""

    def __init__(self, cfg: Config, voice: dict[str, Tensor]):
        super().__init__()
        self.cfg = cfg
        self.voice = {k: v.float() if v.is_floating_point() else v for k, v in voice.items()}
        self.flow, self.vocoder = Flow(cfg.flow), Generator(cfg.vocoder)

    def start(self, seed: int = 0, steps: int = 10):
        """The state before the first code; the flow hears the voice's prompt here."""
        voice = {k: v.to(next(self.parameters()).device) for k, v in self.voice.items()}
        return self.flow.start(voice["spk"], voice["prompt_codes"], voice["prompt_mel"],
                               steps=steps, seed=seed), None

    @torch.inference_mode()
    def stream(self, codes: list[int], state, final: bool = False):
        """More codes -> (the wave (N,) that is certain by now, state). The pieces of a reply join
        to exactly what one call with all codes and `final` gives."""
        mel_state, wave_state = state
        codes = torch.tensor([codes], dtype=torch.long, device=next(self.parameters()).device)
        mel, mel_state = self.flow.stream(codes, mel_state, final)
        wave, wave_state = self.vocoder.stream(mel, wave_state, final)
        return wave[0].cpu(), (mel_state, wave_state)


# ---------------------------------------------------------------------------------------------
# Checkpoint folders: config.json, tokenizer.json and the safetensors files of DESIGN.md

class BadCheckpoint(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message is one clear line."""


def config_from_dict(data: dict, cls=Config):
    """Nested dataclass from parsed JSON; a key the dataclass lacks is an error naming it."""
    known = {f.name: f for f in fields(cls)}
    out = {}
    for key, value in data.items():
        if key not in known:
            raise BadCheckpoint(f"config: unknown key {key!r} for {cls.__name__}")
        default = known[key].default_factory() if callable(known[key].default_factory) else None
        if is_dataclass(default):
            value = config_from_dict(value, type(default))
        out[key] = tuple(map(_tuple, value)) if isinstance(value, list) else value
    return cls(**out)


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def load_config(folder: str) -> Config:
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            return config_from_dict(json.load(f))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise BadCheckpoint(f"{folder}: no readable config.json ({e})") from None


def read_weights(path: str) -> dict[str, Tensor]:
    """A safetensors or .pt file (never unpickling code) as a dict, or BadCheckpoint in one line."""
    try:
        if path.endswith((".pt", ".pth")):
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return weights.get("model_state_dict", weights)  # openai-whisper wraps its weights
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError, UnpicklingError) as e:
        raise BadCheckpoint(f"{path}: not a readable weights file ({e})") from None


def fit(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load `weights` into `module`: every key used, every shape equal, or an error naming it."""
    own = module.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        raise BadCheckpoint(f"{source}: {'missing' if name in own else 'unexpected'} key {name}")
    for name, w in weights.items():
        if w.shape != own[name].shape:
            raise BadCheckpoint(f"{source}: {name} is {tuple(w.shape)}, expected "
                                f"{tuple(own[name].shape)}")
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})


def save_weights(path: str, module_or_dict, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file whole or not at all; floats in `dtype` if given."""
    tensors = module_or_dict if isinstance(module_or_dict, dict) else module_or_dict.state_dict()
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in tensors.items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in cast.items()}, path + ".tmp")
    os.replace(path + ".tmp", path)


def save_config(folder: str, cfg: Config) -> None:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(asdict(cfg), f, indent=1)
    os.replace(path + ".tmp", path)


def load_echat(folder: str, device="cpu", dtype=torch.float32) -> EChat:
    """The model of a checkpoint folder, in eval mode."""
    model = EChat(load_config(folder))
    path = os.path.join(folder, "model.safetensors")
    fit(model, read_weights(path), path)
    return model.to(device, dtype).eval()


def load_voice(path: str, cfg: FlowConfig) -> dict[str, Tensor]:
    """A voice file: spk (1, spk_dim), prompt_codes (1, P), prompt_mel (1, 4P, M)."""
    voice = {k: v.float() if v.is_floating_point() else v for k, v in read_weights(path).items()}
    spk, codes, mel = (voice.get(k, torch.zeros(0)) for k in ("spk", "prompt_codes", "prompt_mel"))
    fits = codes.dim() == 2 and len(codes) == 1 and not codes.is_floating_point()
    fits = fits and bool(((codes >= 0) & (codes < cfg.codes)).all()) and mel.dim() == 3
    fits = fits and mel.shape[::2] == (1, cfg.mel) and spk.shape == (1, cfg.spk_dim)
    spare = 0 if cfg.causal else 6  # a prompt that is stretched may lack a few frames
    if not fits or mel.shape[1] < cfg.frames(codes.shape[1]) - spare:
        raise BadCheckpoint(f"{path}: not a voice for this model (spk, prompt_codes, prompt_mel)")
    return voice


def load_token2wav(folder: str, voice: str | None = None, device="cpu") -> Token2Wav:
    """Flow and vocoder of a checkpoint folder, speaking in its voice or in the file `voice`."""
    cfg = load_config(folder)
    model = Token2Wav(cfg, load_voice(voice or os.path.join(folder, "voice.safetensors"), cfg.flow))
    path = os.path.join(folder, "token2wav.safetensors")
    fit(model, read_weights(path), path)
    return model.to(device).eval()


def load_s3(folder: str, device="cpu") -> SpeechTokenizer:
    """The speech tokenizer of a checkpoint folder, in eval mode."""
    model = SpeechTokenizer(load_config(folder).s3)
    path = os.path.join(folder, "tokenizer_s3.safetensors")
    fit(model, read_weights(path), path)
    return model.to(device).eval()


def export(run: str, out: str) -> None:
    """A run's checkpoint folder without what only training needs, in fp16: `python model.py RUN OUT`."""
    save_config(out, load_config(run))
    for name in ("model", "token2wav", "tokenizer_s3", "voice"):
        if os.path.exists(path := os.path.join(run, f"{name}.safetensors")):
            save_weights(os.path.join(out, f"{name}.safetensors"), read_weights(path), torch.float16)
    shutil.copy(os.path.join(run, "tokenizer.json"), os.path.join(out, "tokenizer.json"))


if __name__ == "__main__":
    export(*sys.argv[1:])
