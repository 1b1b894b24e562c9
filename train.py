"""Training: every stage of the paper, one script. Sections Training, App. A.3 and B.1.

    python train.py --stage align --preset mini --data corpus/asr.train.jsonl --init runs/text \
        --whisper whisper_tiny_en.safetensors --out runs/align
    torchrun --nproc_per_node 8 train.py --stage s2s ...      # CUDA, NPU, or CPU with gloo
    python train.py ... --resume                              # go on after a stop
    python train.py --stage empathy --data LIST --init runs/s2s --show 3    # look at samples

Read it top to bottom: the table of stages, then the method (think, unknown labels, interleave,
label building, the loss of eq. 1-4), then what is trained beside the LLM (S3, flow, vocoder), then
the loop.

Tensor legend: B batch, L tokens, T mel frames, N samples, V text vocabulary.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model as echat
from data import BadInput, Mixture, Source, Tokenizer
from decoder import rotate
from encoder import SpeechTokenizer, load_whisper
from model import ASKED, AUDIO, EChat, Token2Wav, label_think, prompt, think_length
from vocoder import Discriminator, discriminator_loss, feature_loss, fold_weights, \
    generator_loss, mel_loss, mel_spectrogram

# ---------------------------------------------------------------------------------------------
# The stages. Paper App. B.1: what is trained in each; `interleave` = share of speech answers in
# 6:18 form in the first epoch and later ones; `think` = share of dialogues that think first;
# `s2t` = share of spoken dialogues that answer in text only. Data of earlier steps stay in: name
# every list with its weight, e.g. --data asr.jsonl:1 --data asrp.jsonl:1.


@dataclass
class Stage:
    trains: tuple[str, ...]
    budget: int = 2800  # computed positions a batch (LLM tokens; frames for flow and vocoder)
    interleave: tuple[float, float] = (0.0, 0.0)
    think: float = 0.0
    s2t: float = 0.0


STAGES = {
    "text": Stage(("decoder",)),  # the paper takes Qwen2.5 as given
    "align": Stage(("adapter",)),  # 1.1: ASR only
    "understand": Stage(("adapter", "encoder")),  # 1.2: ASR+P
    "paralinguistic": Stage(("adapter", "encoder")),  # 1.3: + only P
    "full-label": Stage(("adapter", "encoder")),  # 1.4: + all labels at once
    # Released freeze list "llm" would freeze the speech embedding and head; here they train.
    "tts": Stage(("decoder",), interleave=(0.0, 0.5)),  # 2.1
    "s2s": Stage(("encoder", "adapter", "decoder"), interleave=(0.0, 0.5)),  # 2.2
    "empathy": Stage(("encoder", "adapter", "decoder"), interleave=(0.5, 0.5), think=1.0, s2t=0.1),
    "distill": Stage(("encoder", "adapter", "decoder"), interleave=(0.5, 0.5), think=0.5, s2t=0.1),
    "tokenizer": Stage(("s3",), budget=8000),
    "flow": Stage(("flow",), budget=3200),
    "vocoder": Stage(("vocoder",), budget=544),
}

# ---------------------------------------------------------------------------------------------
# The method: a record becomes one sequence. Facts 3.3-3.6 of the released code.

PARTS = ("asr", "p", "think", "text", "speech")  # whose losses eq. 1-4 add up
TAG = re.compile(r"<[A-Z_]+>")
# --guide: how near in seconds the text must be to the code, and the user's speech to the word,
# which its pauses displace; the time of what has none; a shift that keeps the two apart
NEAR, FAR, NEVER, ELSEWHERE = 0.25, 0.7, -1e9, 1e4
PAUSE = {ord(c): n for c, n in ((",", 3), (".", 6), ("!", 6), ("?", 6))}


@dataclass
class Sample:
    """ids with AUDIO slots; targets -100 where there is no loss; part: index into PARTS.

    kind: what its prompt is. A batch is of one kind: its rows share the prompt, computed once.
    """
    kind: str
    cues: list[int] = field(default_factory=lambda: [-100] * len(data.LABELS))  # known labels
    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    attend: list[bool] = field(default_factory=list)
    key: list[float] = field(default_factory=list)  # for --guide: when an id is said, or NEVER
    query: list[float] = field(default_factory=list)  # ... and when what follows it is
    audio: list[tuple] = field(default_factory=list)  # path, start, end in seconds; oldest first

    @property
    def length(self) -> int:
        return len(self.ids)

    def add(self, ids: list[int], part: str | None = None, unknown: set = frozenset()) -> None:
        """Append ids, with loss if they belong to a part.

        Structured sparse learning (eq. 4): the placeholder of an unknown label is no target, is
        attended by nobody, and its embedding is row 0; what stands around it trains as usual.
        """
        seen = [i not in unknown for i in ids]
        self.ids += [i if s else 0 for i, s in zip(ids, seen)]
        self.targets += [i if s and part else -100 for i, s in zip(ids, seen)]
        self.part += [PARTS.index(part) if part else -1] * len(ids)
        self.attend += seen
        self.key += [NEVER] * len(ids)
        self.query += [NEVER] * len(ids)

    def say(self, first: int, times: list[float], vocab: int) -> None:
        """From position `first` on: text is said at `times`, codes are 1/25 s apart."""
        turn, code = iter(times), itertools.count()
        for i in range(first, self.length):
            if self.ids[i] >= vocab:
                self.query[i - 1] = next(code) / 25 / NEAR
            else:
                self.key[i] = next(turn, NEVER) / NEAR

    def listen(self, first: int, times: list[float], slots: int) -> None:
        """The latest speech of the user, `slots` long, is written down from `first` on."""
        begin = first - 1 - self.ids[:first][::-1].index(AUDIO)  # of its last slot
        for i in range(slots):
            self.key[begin - i] = ELSEWHERE + 0.08 * (slots - i) / FAR
        for i, time in enumerate(times):
            self.query[first - 1 + i] = ELSEWHERE + time / FAR if time > NEVER else NEVER


def said_at(ids: list[int], tok: Tokenizer, seconds: float, begin: int, end: int) -> list[float]:
    """The second at which the middle of each id is said, if every character of bytes begin:end
    takes as long, and a mark some more; NEVER outside of them."""
    sizes = [len(tok.bytes_of(i)) for i in ids]
    said = b"".join(map(tok.bytes_of, ids))
    cost = [PAUSE.get(c, 1) if begin <= i < end else 0 for i, c in enumerate(said)]
    ends = list(itertools.accumulate(cost, initial=0))
    edges = [ends[n] for n in itertools.accumulate(sizes, initial=0)]
    return [(a + b) / 2 * seconds / ends[-1] if b > a else NEVER for a, b in zip(edges, edges[1:])]


def tagless(txt: str) -> tuple[int, int]:
    """First and last byte of what is spoken: all but the emotion tag in front."""
    tag = TAG.match(txt)
    return tag.end() if tag else 0, len(txt.encode())


def interleave(text: list[int], speech: list[int]) -> list[tuple[str, list[int]]]:
    """6 text tokens, 18 speech tokens, and so on; when the text (its end counts) is out, all the
    speech that is left. `speech` has its open and close; 3 x text <= speech, or text lags."""
    out = []
    while text:
        out += [("text", text[:echat.TEXT_BLOCK])]
        text = text[echat.TEXT_BLOCK:]
        take = echat.SPEECH_BLOCK if text else len(speech)
        out += [("speech", speech[:take])]
        speech = speech[take:]
    return out


def sequence(record: dict, epoch: int, rng: random.Random, stage: Stage, tok: Tokenizer,
             cfg: echat.Config) -> Sample | str:
    """One record of a list -> the sequence it trains, or the reason why it is rejected."""
    task, extra, txt = record["task"], record["extra"], record["txt"].replace("\n", " ")
    V, close = cfg.decoder.vocab, cfg.decoder.codes
    slots, past, clips = [], [], []
    if task.startswith("<TEXT2T"):
        kind = "t2t" if task == "<TEXT2TEXT>" else "tts"
    else:
        kind = "understand" if "<S2TCHAT" not in task else \
            "s2s" if "<TEXT2TOKEN>" in task else "s2t"
        past = extra.get("history", []) if kind != "understand" else []  # wav, txt, speech_token
        for turn in [*past, record]:
            if not turn.get("wav") or not os.path.exists(turn["wav"]):
                return "no wav"
            clips.append((turn["wav"], turn.get("start", 0.0), turn.get("end")))
            frames = data.frames_of(*clips[-1])
            if not 20 <= frames <= 20000:
                return "audio shorter than 0.2 s or longer than 200 s"
            slots.append(echat.EChat.audio_slots(frames))
    speaks = kind in ("tts", "s2s")
    codes = extra.get("speech_token") or []
    if speaks and not codes:
        return "no speech_token"
    if speaks and max(codes) >= close:
        return "speech code out of range"
    speech = [V + close, *(V + c for c in codes), V + close]

    if kind == "t2t":
        if not extra.get("question"):
            return "no question"
        sample = Sample("t2t")
        sample.add(prompt("t2t", tok, cfg.decoder, text=extra["question"]))
        sample.add([*tok.encode(txt), tok.im_end], "text")
        return sample
    if kind == "understand":  # eq. 1: the words, then the labels
        wanted = [echat.TAGS[t] for t in TAG.findall(task) if t in echat.TAGS]
        user = echat.user_prompt(wanted)
        sample = Sample(user, audio=clips)
        sample.add(prompt("understand", tok, cfg.decoder, slots[-1], user))
        given = [t[1:-1] for t in TAG.findall(txt)]
        for name, value in zip([w for w in ASKED if w in wanted and w != "asr"], given):
            if value in data.LABELS[name]:
                sample.cues[ASKED.index(name) - 1] = data.LABELS[name].index(value)
        words = len(TAG.split(txt)[0].encode())
        at, first = 0, sample.length
        for token in tok.encode(txt):
            sample.add([token], "asr" if at < words else "p", tok.unknown)
            at += len(tok.bytes_of(token))
        if words:
            sample.listen(first, said_at(tok.encode(txt), tok, 0.08 * slots[-1], 0, words), slots[-1])
        if not txt.endswith(echat.UNKNOWN):
            sample.add([tok.im_end], "p" if at > words else "asr")
        return sample

    if kind == "s2s" and rng.random() < stage.s2t:
        kind, speaks = "s2t", False
    stream = "<STREAMING>" in task or rng.random() < stage.interleave[min(epoch, 1)]
    if kind == "tts":  # eq. 2
        text = [*tok.encode(txt), tok.im_end]
        stream = stream and 3 * len(text) <= len(speech)
        sample = Sample("tts_stream" if stream else "tts")
        asked = prompt(sample.kind, tok, cfg.decoder, text=txt)
        sample.add(asked)
        if not stream:
            sample.add(speech[1:], "speech")  # the prompt has opened it
        for part, ids in interleave(text, speech) if stream else ():
            sample.add(ids, part)
        spoken = said_at(text, tok, len(codes) / 25, *tagless(txt))
        first = len(asked) if stream else len(asked) - len(tok.fixed(echat.ASSISTANT)) - len(text)
        sample.say(first, spoken, V)
        return sample

    # Spoken dialogue, eq. 3; with the think of eq. 4 in front.
    history = [(n, t["txt"], t.get("speech_token") or []) for n, t in zip(slots, past)]
    think, user = "", ""
    if rng.random() < stage.think:
        if "think_str" in extra and rng.random() < 0.25:
            think = echat.THINK + extra["think_str"] + echat.THINK_END
            user = echat.NATURAL if cfg.language == "en" else ""
            txt = re.sub("^<[^<>]+>", "", txt)  # the reply's emotion belongs to the label think
        else:
            labels = {"age": extra.get("age"), "gender": extra.get("gender"),
                      "emotion": extra.get("q_emotion"), "event": extra.get("caption"),
                      "reply_emotion": extra.get("emotion")}
            think = label_think(cfg.language, extra.get("q_txt") or extra.get("question", ""),
                                labels)
    answer = [*tok.encode(think + txt), tok.im_end]  # one string: `>` may merge with what follows
    thought = think_length(answer, tok)
    text = answer[thought:]
    stream = speaks and stream and 3 * len(text) <= len(speech)
    name = kind + ("_stream" if stream else "") + ("_think" if think else "")
    sample = Sample(name + user, audio=clips)
    sample.add(prompt(name, tok, cfg.decoder, slots[-1], user, history))
    sample.add(answer[:thought], "think", tok.unknown)
    first, heard = sample.length, think.find(said := extra.get("q_txt") or "")
    if said and heard > 0:
        heard = len(think[:heard].encode())
        sample.listen(first - thought, said_at(answer[:thought], tok, 0.08 * slots[-1], heard,
                                               heard + len(said.encode())), slots[-1])
    if stream:
        for part, ids in interleave(text, speech):
            sample.add(ids, part)
    else:
        sample.add(text, "text")
        sample.add(speech if speaks else [], "speech")
    if speaks:
        sample.say(first, said_at(text, tok, len(codes) / 25, *tagless(txt)), V)
    return sample


class Dialogue:
    """What the LLM stages train: EChat with the dual-think masked loss, eq. 1-4."""

    turns, whisper = ("model",), "encoder."

    def __init__(self, args, cfg, stage):
        self.cfg, self.args = cfg, args
        self.tok = Tokenizer(args.init or args.out)
        self.module = EChat(cfg)
        load_if_there(self.module, args.init, "model.safetensors")
        if args.whisper:
            self.module.encoder.load_state_dict(load_whisper(echat.read_weights(args.whisper)))
            self.module.adapter.start_open(self.module.encoder.ln_post)
        self.parameters = {"model": trainable(self.module, stage.trains)}
        if args.ear:
            values = sum(map(len, data.LABELS.values()))
            self.module.cues = nn.Linear(cfg.adapter.d_out, values)
            D = cfg.adapter.d_in
            self.module.letters = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * 256))
            self.module.adapter.embed.register_forward_pre_hook(
                lambda _, inputs: setattr(self, "convolved", inputs[0]))
            self.parameters["model"] += [*self.module.cues.parameters(),
                                         *self.module.letters.parameters()]
        self.make = partial(sequence, stage=stage, tok=self.tok, cfg=cfg)
        if args.guide:
            layers = self.module.decoder.layers
            self.guided = layers[(len(layers) - 1) // 2].self_attn
            self.guided.register_forward_pre_hook(lambda _, context: setattr(self, "watched", context))
        self.step = 0  # the loop's
        self.heard = {}  # clip -> what a frozen encoder makes of it: a constant, in half precision

    def collate(self, samples: list[Sample], seed: str) -> dict:
        rng = random.Random(seed)
        batch = {"ids": data.pad_stack([torch.tensor(s.ids) for s in samples]),
                 "targets": data.pad_stack([torch.tensor(s.targets) for s in samples], -100),
                 "part": data.pad_stack([torch.tensor(s.part) for s in samples], -1),
                 "key": data.pad_stack([torch.tensor(s.key) for s in samples], NEVER),
                 "query": data.pad_stack([torch.tensor(s.query) for s in samples], NEVER),
                 "cues": torch.tensor([s.cues for s in samples])}
        if not all(all(s.attend) for s in samples):  # pads come last: causality hides them
            batch["attend"] = data.pad_stack([torch.tensor(s.attend) for s in samples], True)
        if clips := [clip for s in samples for clip in s.audio]:
            mels = [data.features(path, self.cfg.encoder.n_mels, *span) for path, *span in clips]
            batch["mel_lengths"] = torch.tensor([len(m) for m in mels])
            if self.args.augment and self.module.training:
                mels = [data.spec_augment(m, rng) for m in mels]
            batch["mel"], batch["clips"] = data.pad_stack(mels), [str(clip) for clip in clips]
        return batch

    def hear(self, batch: dict) -> tuple[Tensor, Tensor] | None:
        """The adapter's output of a batch's audio; a frozen encoder hears a clip only once."""
        if "mel" not in batch:
            return None
        net, mel, lengths = self.module, batch["mel"], batch["mel_lengths"]
        if self.args.augment or not net.training or net.encoder.conv1.weight.requires_grad:
            return net.hear(mel, lengths)
        if new := [i for i, clip in enumerate(batch["clips"]) if clip not in self.heard]:
            for i, x, n in zip(new, *net.encoder(mel[new], lengths[new])):
                self.heard[batch["clips"][i]] = x[:n].half()
        hidden = [self.heard[clip] for clip in batch["clips"]]
        return net.adapter(data.pad_stack(hidden).to(mel.dtype), (lengths + 1) // 2)

    def weight(self, batch: dict) -> int:
        """Target tokens, over which the loss is a mean: short and long samples weigh each alike."""
        return int((batch["targets"] != -100).sum())

    def loss(self, turn: str, batch: dict) -> tuple[Tensor, dict]:
        """Eq. 1-4: cross-entropy over text and speech together, the sum of its parts."""
        heard = self.hear(batch)
        extra, stats = self.ear(*heard, batch) if heard and self.args.ear else (0.0, {})
        if stats and self.step <= self.args.ear_first:
            return extra, stats
        _, each = self.module(batch["ids"], attend=batch.get("attend"), targets=batch["targets"],
                              heard=heard)  # (n,)
        part = batch["part"][batch["targets"] != -100]  # the same order as the targets'
        if self.args.guide and (batch["query"] > NEVER).any():
            loss, stats["guide"] = self.guide(batch)
            extra = extra + self.args.guide * loss
        stats |= {name: (each.detach()[part == i].sum(), (part == i).sum())
                  for i, name in enumerate(PARTS)}
        return each.sum() / len(each) + extra, stats

    def guide(self, batch: dict) -> tuple[Tensor, tuple]:
        """One head looks at the text that is said while it predicts a code, and at the speech that
        it writes down: minus the log of its attention nearby (guided attention, Tachibana et al.
        2018). Not in the paper: what days of training let a head find, this shows it at once."""
        x, cos, sin, mask, cache, index = self.watched  # of the latest forward: all but the prompt
        layer = self.guided
        E, W, b = layer.width, layer.qkv.weight, layer.qkv.bias
        q, k = (rotate(F.linear(x, W[i:i + E], b[i:i + E])[:, :, None], cos, sin)[:, :, 0]
                for i in (0, layer.heads * E))  # (B, T, E), the first of the query and key heads
        if cache:
            k = torch.cat([cache.kv[index][0][:, 0].expand(len(k), -1, -1), k], 1)  # (B, S, E)
        T, S = q.shape[1], k.shape[1]
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if mask is None \
            else mask.squeeze(1) if mask.dim() == 4 else mask  # (B, T, S) or (T, S)
        attention = (q @ k.transpose(1, 2) / E ** 0.5).masked_fill(~seen, -1e9).log_softmax(-1)
        now, at = batch["query"][:, S - T:], batch["key"][:, None]  # (B, T), (B, 1, S)
        loss = -(attention - (now[..., None] - at) ** 2 / 2).logsumexp(-1)[now > NEVER]
        return loss.mean(), (loss.detach().sum(), len(loss))

    def ear(self, speech: Tensor, lengths: Tensor, batch: dict) -> tuple[Tensor, dict]:
        """What the adapter's output must tell by itself: the words by CTC, the labels by a linear
        layer on its mean over time. Not in the paper: a decoder that is no real LLM learns from
        its own loss to listen only after very many examples."""
        ids, here = batch["ids"], batch["part"] == PARTS.index("asr")
        here &= ids != self.tok.im_end
        extra, stats, said = 0.0, {}, here.any(1)  # (B,)
        if said.any():
            words = [row[mask] for row, mask in zip(ids[said], here[said])]
            ctc = self.module.ctc(speech[said], lengths[said], words,
                                  self.tok.fixed("<|endoftext|>")[0])
            extra, stats["ctc"] = ctc, (ctc.detach(), 1)
            spelt = [torch.tensor(list(b"".join(map(self.tok.bytes_of, w.tolist())).lower()))
                     for w in words]
            logits = self.module.letters(self.convolved[said]).unflatten(2, (4, 256)).flatten(1, 2)
            loss = F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), torch.cat(spelt),
                              4 * lengths[said], torch.tensor([len(w) for w in spelt]),
                              zero_infinity=True)
            extra, stats["letters"] = extra + loss, (loss.detach(), 1)
        real = torch.arange(speech.shape[1], device=speech.device) < lengths[:, None]  # (B, S)
        mean = (speech * real[..., None]).sum(1) / lengths[:, None]
        logits = self.module.cues(F.rms_norm(mean, mean.shape[1:]))  # (B, 20)
        for i, part in enumerate(logits.split([len(v) for v in data.LABELS.values()], 1)):
            if (known := batch["cues"][:, i] >= 0).any():
                loss = F.cross_entropy(part[known], batch["cues"][known, i])
                extra, name = extra + loss, f"cue_{ASKED[i + 1]}"
                stats[name] = (loss.detach() * known.sum(), known.sum())
        return self.args.ear * extra, stats

    def save(self, folder: str) -> None:
        kept = {k: v for k, v in self.module.state_dict().items() if not k.startswith(("cues.", "letters."))}
        echat.save_weights(os.path.join(folder, "model.safetensors"), kept)


# ---------------------------------------------------------------------------------------------
# What the paper takes as given: the S3 tokenizer, and token2wav (pre-trained from scratch)


@dataclass
class Clip:
    """A piece of audio: path, first second, frames (100 Hz), and what belongs to it."""
    path: str
    start: float
    length: int
    text: str = ""
    kind: str = "clip"
    codes: list[int] = field(default_factory=list)
    voice: str = ""  # a voice file, if it is not the checkpoint's own voice


class S3:
    """Supervised speech tokenizer: recognise the text through the codes (CTC over its bytes)."""

    turns, whisper = ("model",), ("conv", "blocks.", "tail.", "ln_post.")

    def __init__(self, args, cfg, stage):
        self.cfg, self.args = replace(cfg.s3, vocab=256), args
        self.module = SpeechTokenizer(self.cfg)
        if args.whisper:
            self.module.init_from_encoder(load_whisper(echat.read_weights(args.whisper)))
        self.parameters = {"model": list(self.module.parameters())}
        self.step, self.recent = 0, []  # the loop's step; features of the latest batches

    def make(self, record: dict, epoch: int, rng: random.Random) -> Clip | str:
        text = TAG.sub("", record["txt"]).lower()
        seconds = data.seconds_of(record["wav"])
        if not 0.3 <= seconds <= 20 or not text:
            return "no text, or audio outside 0.3 .. 20 s"
        return Clip(record["wav"], 0, int(seconds * 100), text)

    def collate(self, clips: list[Clip], seed: str) -> dict:
        mels = [data.features(c.path, self.cfg.n_mels) for c in clips]
        texts = [torch.tensor(list(c.text.encode())) for c in clips]
        return {"mel": data.pad_stack(mels), "mel_lengths": torch.tensor([len(m) for m in mels]),
                "text": data.pad_stack(texts), "text_lengths": torch.tensor([*map(len, texts)])}

    def weight(self, batch: dict) -> int:
        return len(batch["mel"])

    def loss(self, turn: str, batch: dict) -> tuple[Tensor, dict]:
        """CTC alone until the recogniser works, then k-means on its features, then by codes."""
        if self.module.training and not self.module.codebook.fitted:
            after = self.args.quantise_after
            if self.step > after - 40:
                with torch.no_grad():
                    x, lengths = self.module.features(batch["mel"], batch["mel_lengths"])
                self.recent.append(torch.cat([row[:n] for row, n in zip(x, lengths)]))
            if self.step > after and len(self.recent) > min(40, after):
                self.module.codebook.fit(torch.cat(self.recent))
                self.recent = []
        _, loss, stats = self.module(batch["mel"], batch["mel_lengths"], batch["text"],
                                     batch["text_lengths"])
        return loss, {k: (torch.tensor(float(v)), 1) for k, v in stats.items()}

    def save(self, folder: str) -> None:
        """What encode() needs; the tail and the CTC head were only the teacher."""
        kept = {k: v for k, v in self.module.state_dict().items()
                if not k.startswith(("tail.", "ln_post.", "head."))}
        echat.save_weights(os.path.join(folder, "tokenizer_s3.safetensors"), kept)


class Voice:
    """Common to flow and vocoder: clips of 24 kHz speech, the token2wav file."""

    whisper, needs_codes, longest, shortest = (), True, 240, 40

    def __init__(self, args, cfg, stage):
        self.cfg, self.args = cfg, args
        self.own = os.path.join(args.init or "", "voice.safetensors")
        self.voices, self.begun = {}, {}  # by voice file; the flow's state after its prompt
        self.whole = Token2Wav(cfg, {})
        load_if_there(self.whole, args.init, "token2wav.safetensors")

    def make(self, record: dict, epoch: int, rng: random.Random) -> Clip | str:
        extra = record["extra"]
        path, codes = extra.get("reply_wav") or record["wav"], extra.get("speech_token") or []
        frames = int(data.seconds_of(path) * 100)
        frames = min(frames, 4 * len(codes)) if self.needs_codes else frames
        length = min(frames, self.longest) // 4 * 4
        if length < self.shortest:
            return "too short"
        if self.needs_codes and not 0 <= min(codes) <= max(codes) < self.cfg.flow.codes:
            return "a code outside the codebook"
        first = rng.randint(0, (frames - length) // 4) * 4
        return Clip(path, first / 100, length, codes=codes[first // 4:(first + length) // 4],
                    voice=extra.get("voice") or "")

    def collate(self, clips: list[Clip], seed: str) -> dict:
        rate, hop = self.cfg.vocoder.sample_rate, self.cfg.vocoder.hop
        waves = [data.read_wave(c.path, rate, c.start, c.start + c.length / 100) for c in clips]
        waves = [F.pad(w, (0, c.length * hop - len(w))) for w, c in zip(waves, clips)]
        codes = [torch.tensor(c.codes, dtype=torch.long) for c in clips]
        lengths, voices = torch.tensor([len(c) for c in codes]), [c.voice for c in clips]
        return {"wave": data.pad_stack(waves), "codes": data.pad_stack(codes), "lengths": lengths,
                "voices": voices, "seed": seed}

    def voice(self, path: str) -> dict[str, Tensor]:
        """The voice of a clip: in its own file (extra.voice), or the checkpoint's."""
        if path not in self.voices:
            self.voices[path] = echat.load_voice(path or self.own, self.cfg.flow)
        return self.voices[path]

    def render(self, batch: dict, row: int) -> Tensor:
        """The mel (1, T, M) that the flow makes of a clip's codes, as it does when it talks."""
        path, codes = batch["voices"][row], batch["codes"][row:row + 1, :batch["lengths"][row]]
        flow, rng = self.whole.flow.to(codes.device), random.Random(f"{batch['seed']} {row}")
        if path not in self.begun:
            self.begun[path], _ = self.whole.start(voice=self.voice(path))
        return flow.stream(codes, replace(self.begun[path], seed=rng.getrandbits(32)), True)[0]

    def weight(self, batch: dict) -> int:
        return batch["wave"].shape[0]

    def save(self, folder: str) -> None:
        echat.save_weights(os.path.join(folder, "token2wav.safetensors"),
                           fold_weights(self.whole.state_dict()))


class FlowStage(Voice):
    """Conditional flow matching: codes -> mel."""

    turns = ("model",)

    def __init__(self, args, cfg, stage):
        super().__init__(args, cfg, stage)
        self.module = self.whole.flow
        self.parameters = {"model": list(self.module.parameters())}

    def loss(self, turn: str, batch: dict) -> tuple[Tensor, dict]:
        """In training the flow's loss; held out also how far from the real mel a clip of the
        batch comes out of the solver (L1 of natural-log mels)."""
        mel = mel_spectrogram(batch["wave"], self.cfg.vocoder)
        spk = torch.cat([self.voice(path)["spk"] for path in batch["voices"]]).to(mel)
        _, loss = self.module(batch["codes"], batch["lengths"], mel, spk)
        stats = {"flow": (loss.detach(), 1)}
        if self.module.training:
            self.begun.clear()  # of weights that change
        else:
            made = self.render(batch, 0)
            stats["mel"] = F.l1_loss(made, mel[:1, :made.shape[1]]), 1
        return loss, stats


class VocoderStage(Voice):
    """HiFi-GAN: least squares GAN, feature matching, 45 x mel (token2wav facts 2.3)."""

    turns = ("discriminator", "generator")

    def __init__(self, args, cfg, stage):
        super().__init__(args, cfg, stage)
        self.module = nn.ModuleDict(dict(generator=self.whole.vocoder.unfold(),
                                         discriminator=Discriminator(cfg.vocoder)))
        self.parameters = {t: list(self.module[t].parameters()) for t in self.turns}
        self.step, self.needs_codes = 0, args.on_flow  # the loop's
        self.longest = self.shortest = 128 if args.on_flow else 32  # the flow wants context

    def heard(self, batch: dict) -> Tensor:
        """What the generator is given (B, T, M): the real mel or, with --on-flow, what the flow
        makes of the same codes, so that it learns to undo the flow's faults."""
        if not self.args.on_flow:
            return mel_spectrogram(batch["wave"], self.cfg.vocoder)
        return torch.cat([self.render(batch, row) for row in range(len(batch["wave"]))])

    def loss(self, turn: str, batch: dict) -> tuple[Tensor, dict]:
        """The discriminator's turn, then the generator's, on the same made waves."""
        G, D, real = self.module["generator"], self.module["discriminator"], batch["wave"]
        D.requires_grad_(turn == "discriminator")
        alone = self.step <= self.args.mel_only  # mel loss first: a GAN on noise teaches nothing
        if "fake" not in batch:
            batch["fake"] = G(self.heard(batch))
        fake = batch["fake"]
        if turn == "discriminator":
            if alone:
                return sum(p.sum() for p in D.parameters()) * 0, {}
            loss = discriminator_loss(D(real)[0], D(fake.detach())[0])
            return loss, {"d": (loss.detach(), 1)}
        loss = mel_loss(real, fake, self.cfg.vocoder)
        stats = {"mel": (loss.detach() / 45, 1)}  # L1 of natural-log mels
        if not alone:
            with torch.no_grad():
                _, wanted = D(real)
            scores, made = D(fake)
            parts = {"g": generator_loss(scores), "fm": feature_loss(wanted, made)}
            loss = loss + sum(parts.values())
            stats |= {k: (v.detach(), 1) for k, v in parts.items()}
        return loss, stats


KINDS = {"tokenizer": S3, "flow": FlowStage, "vocoder": VocoderStage}

# ---------------------------------------------------------------------------------------------
# The loop


def load_if_there(module: nn.Module, folder: str | None, name: str) -> bool:
    path = os.path.join(folder or "", name)
    if folder and os.path.exists(path):
        echat.fit(module, {k: v.float() for k, v in echat.read_weights(path).items()}, path)
        return True
    return False


def trainable(module: EChat, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Freeze all but the named components; returns what is left to train."""
    for name, part in module.named_children():
        part.requires_grad_(name in names)
    return [p for p in module.parameters() if p.requires_grad]


def weighted(item: str) -> tuple[str, float]:
    """LIST[:WEIGHT] -> path, weight."""
    found = re.fullmatch(r"(.+):(\d*\.?\d+)", item)
    return (found[1], float(found[2])) if found else (item, 1.0)


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then inverse square root (Vaswani et al. 2017), step from 1; the last
    --cooldown steps fall to 0."""
    warmup, left = max(1, args.warmup), (args.steps + 1 - step) / max(1, args.cooldown)
    return args.lr * min(step / warmup, math.sqrt(warmup / step)) * min(1.0, left)


def all_reduce(tensors: list[Tensor]) -> None:
    """Sum over ranks in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, new in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(new.view_as(t))


def to(batch: dict, device: str) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in batch.items()}


class Trainer:
    """Batches -> steps -> log and checkpoint; one process or many."""

    def __init__(self, args):
        self.args, self.stage = args, STAGES[args.stage]
        self.rank, self.world, self.device = setup(args.device)
        torch.manual_seed(args.seed)
        cfg = self.config()
        self.trainee = KINDS.get(args.stage, Dialogue)(args, cfg, self.stage)
        self.cfg = cfg
        self.trainee.module.to(self.device)
        self.optimizers = {turn: torch.optim.AdamW(
            self.groups(p), args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay,
            fused=self.device != "mps") for turn, p in self.trainee.parameters.items()}
        self.step, self.data_state, self.bad, self.best = 0, None, 0, math.inf

    def groups(self, parameters: list[nn.Parameter]) -> list[dict]:
        """Parameter groups: what comes from Whisper may learn at a share of the rate, and what
        the ear spells with at a multiple: before it can, nothing behind it learns much."""
        scales = {self.trainee.whisper: self.args.whisper_lr,
                  ("letters.", "adapter.convs.") if self.args.ear else (): 4.0}
        groups = {}
        names = {p: name for name, p in self.trainee.module.named_parameters()}
        for p in parameters:
            scale = next((v for k, v in scales.items() if names[p].startswith(k)), 1.0)
            groups.setdefault(scale, []).append(p)
        return [{"params": p, "scale": scale} for scale, p in groups.items()]

    def config(self) -> echat.Config:
        args = self.args
        if args.init and os.path.exists(os.path.join(args.init, "config.json")):
            return echat.load_config(args.init)
        return echat.PRESETS[args.preset]()

    def loader(self, lists: list[str], seed: int, state=None):
        sources = []
        for item in lists:
            path, weight = weighted(item)
            if not os.path.exists(path):
                raise BadInput(f"{path}: no such list")
            size = sum(1 for _ in open(path, "rb"))
            sources.append(Source(path, weight * size, self.trainee.make,
                                  self.args.batch_tokens or self.stage.budget, seed))
        mixture = Mixture(sources, self.trainee.collate, seed, self.rank, self.world, state)
        # A generator of its own: a loader made anew must not move on the model's random numbers.
        return iter(torch.utils.data.DataLoader(
            mixture, None, num_workers=self.args.workers, generator=torch.Generator(),
            multiprocessing_context="fork" if self.args.workers else None))

    def run(self) -> None:
        args, trainee = self.args, self.trainee
        if args.resume:
            self.restore()
        batches = self.loader(args.data, args.seed, self.data_state)
        trainee.module.train()
        begun = window = time.time()
        waited, seen, sums = 0.0, 0, {}
        while self.step < args.steps and time.time() - begun < args.minutes * 60:
            start = time.time()
            micro = [next(batches) for _ in range(args.accum)]
            self.data_state = micro[-1][1]
            micro = [to(batch, self.device) for batch, _ in micro]
            waited += time.time() - start
            self.step += 1
            if stats := self.update(micro):
                for name, (value, count) in stats.items():
                    old = sums.get(name, (0, 0))
                    sums[name] = (old[0] + value, old[1] + count)
            seen += sum(b[k].numel() for b in micro for k in ("ids", "wave", "mel")
                        if k in b and (k != "mel" or "ids" not in b))
            if self.step % args.log_every == 0:
                line = {"step": self.step, "lr": self.lr, "rate": seen / (time.time() - window),
                        "wait": waited / (time.time() - window),
                        "minutes": (time.time() - begun) / 60}
                self.log(line | self.means(sums))
                window, waited, seen, sums = time.time(), 0.0, 0, {}
            if args.valid and self.step % args.valid_every == 0:
                self.log({"step": self.step} | self.validate())
            if self.step % args.save_every == 0:
                self.save()
        self.save()

    def update(self, micro: list[dict]) -> dict | None:
        """One optimiser step over the micro-batches of all ranks; None if it was skipped."""
        self.trainee.step = self.step
        total = torch.tensor([float(sum(self.trainee.weight(b) for b in micro))],
                             device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        self.lr = learning_rate(self.step, self.args)
        out = {}
        for turn in self.trainee.turns:
            optimizer, parameters = self.optimizers[turn], self.trainee.parameters[turn]
            for p in parameters:  # never None: what a batch leaves out steps alike, resumed or not
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            finite = True
            for batch in micro:
                loss, stats = self.trainee.loss(turn, batch)
                (loss * (self.trainee.weight(batch) / total.item())).backward()
                finite = finite and bool(torch.isfinite(loss))
                for name, (value, count) in stats.items():
                    old = out.get(name, (0, 0))
                    out[name] = (old[0] + value, old[1] + count)
            if self.world > 1:
                all_reduce([p.grad for p in parameters])
            norm = nn.utils.clip_grad_norm_(parameters, self.args.clip)
            if not finite or not bool(torch.isfinite(norm)):
                self.bad += 1
                if self.bad >= 10:
                    raise BadInput(f"10 steps in a row without a finite loss, last at {self.step}")
                return None
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group["scale"]
            optimizer.step()
        self.bad = 0
        return out

    @torch.no_grad()
    def validate(self) -> dict:
        """Mean loss parts over the first batches of the held-out lists."""
        module, sums = self.trainee.module.eval(), {}
        batches = self.loader(self.args.valid, 1)
        for _ in range(self.args.valid_batches):
            batch = to(next(batches)[0], self.device)
            for name, (value, count) in self.trainee.loss(self.trainee.turns[-1], batch)[1].items():
                old = sums.get(name, (0, 0))
                sums[name] = (old[0] + value, old[1] + count)
        module.train()
        return {f"valid_{k}": v for k, v in self.means(sums).items()}

    def means(self, sums: dict) -> dict[str, float]:
        """name -> (sum, count) of this rank to name -> mean over all ranks."""
        pairs = [torch.tensor([float(v), float(n)], device=self.device) for v, n in sums.values()]
        if self.world > 1 and pairs:
            all_reduce(pairs)
        return {k: float(v / n) for k, (v, n) in zip(sums, pairs) if n > 0}

    def log(self, line: dict) -> None:
        if self.rank:
            return
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                       for k, v in line.items()), file=sys.stderr, flush=True)
        os.makedirs(self.args.out, exist_ok=True)
        with open(os.path.join(self.args.out, "log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": self.args.stage} | line) + "\n")

    def save(self) -> None:
        """The run's folder is a checkpoint folder: what a stage does not train is carried over."""
        if self.rank:
            return
        out, init = self.args.out, self.args.init
        os.makedirs(out, exist_ok=True)
        for name in CARRIED:
            if init and os.path.exists(os.path.join(init, name)) \
                    and not os.path.exists(os.path.join(out, name)):
                shutil.copy(os.path.join(init, name), os.path.join(out, name))
        echat.save_config(out, self.cfg)
        self.trainee.save(out)
        state = {"step": self.step, "data": self.data_state, "rng": torch.get_rng_state(),
                 "module": self.trainee.module.state_dict(),
                 "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()}}
        torch.save(state, os.path.join(out, "state.pt.tmp"))
        os.replace(os.path.join(out, "state.pt.tmp"), os.path.join(out, "state.pt"))

    def restore(self) -> None:
        path = os.path.join(self.args.out, "state.pt")
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, ValueError) as e:
            raise BadInput(f"{path}: cannot resume ({e})") from None
        self.step, self.data_state = state["step"], state["data"]
        self.trainee.module.load_state_dict(state["module"])
        for turn, saved in state["optimizers"].items():
            self.optimizers[turn].load_state_dict(saved)
        torch.set_rng_state(state["rng"])


CARRIED = ("tokenizer.json", "model.safetensors", "token2wav.safetensors",
           "tokenizer_s3.safetensors", "voice.safetensors")


def setup(device: str) -> tuple[int, int, str]:
    """rank, world size, device; starts the process group under torchrun."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else \
            "npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu"
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group({"cuda": "nccl", "npu": "hccl"}.get(device, "gloo"))
    if device != "cpu":
        device = f"{device}:{os.environ['LOCAL_RANK']}"
    return dist.get_rank(), dist.get_world_size(), device


def show(trainer: Trainer, count: int) -> None:
    """Print what samples become: grey without loss, a colour for each part with loss."""
    colours = {-1: "\033[90m", 0: "\033[32m", 1: "\033[33m", 2: "\033[35m", 3: "\033[36m",
               4: "\033[34m"}
    V, tok = trainer.cfg.decoder.vocab, trainer.trainee.tok
    for item in trainer.args.data:
        rng = random.Random(trainer.args.seed)
        for _, record in zip(range(count), data.records(weighted(item)[0])):
            sample = trainer.trainee.make(record, 1, rng)
            if isinstance(sample, str):
                print(f"rejected: {sample}")
                continue
            for i, t, p, a in zip(sample.ids, sample.targets, sample.part, sample.attend):
                word = "~" if i == AUDIO else f"[{i - V}]" if i >= V else tok.decode([i])
                print(f"{colours[p if t != -100 else -1]}{word if a else '<&&>'}", end="")
            print("\033[0m\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--stage", choices=STAGES, required=True)
    p.add_argument("--preset", choices=echat.PRESETS, default="mini")
    p.add_argument("--data", action="append", required=True, help="LIST[:WEIGHT], repeatable")
    p.add_argument("--out", default="runs/out", help="folder of the run, itself a checkpoint")
    p.add_argument("--init", help="checkpoint folder to start from")
    p.add_argument("--whisper", help="Whisper weights for the encoder")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--show", type=int, default=0, help="print N samples and stop")
    p.add_argument("--steps", type=int, default=10**9)
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    p.add_argument("--lr", type=float, default=5e-6)
    p.add_argument("--warmup", type=int, default=8000)
    p.add_argument("--cooldown", type=int, default=0, help="last steps, over which lr falls to 0")
    p.add_argument("--whisper-lr", type=float, default=1.0,
                   help="rate of the encoder, or of the tokenizer's blocks, x --lr")
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--clip", type=float, default=5.0)
    p.add_argument("--accum", type=int, default=4)
    p.add_argument("--batch-tokens", type=int, default=0, help="0: the stage's own (2,800)")
    p.add_argument("--augment", action="store_true", help="SpecAugment on the user's speech")
    p.add_argument("--ear", type=float, default=0.0,
                   help="weight of the words and labels that the adapter's output tells by itself")
    p.add_argument("--ear-first", type=int, default=0, help="first steps on that alone")
    p.add_argument("--guide", type=float, default=0.0,
                   help="weight of one head's attention to what is being said")
    p.add_argument("--mel-only", type=int, default=0, help="vocoder: first steps without the GAN")
    p.add_argument("--on-flow", action="store_true", help="vocoder: on the flow's mels")
    p.add_argument("--quantise-after", type=int, default=300, help="tokenizer: first steps without")
    p.add_argument("--trains", nargs="+", choices=("encoder", "adapter", "decoder"),
                   help="LLM stages: what trains, in place of the paper's list (a decoder that is "
                   "no real LLM has to learn to listen in stage 1, too)")
    p.add_argument("--valid", action="append", default=[])
    p.add_argument("--valid-every", type=int, default=500)
    p.add_argument("--valid-batches", type=int, default=10)
    p.add_argument("--log-every", type=int, default=20)
    p.add_argument("--save-every", type=int, default=500)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--seed", type=int, default=777)
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    if args.trains:
        STAGES[args.stage] = replace(STAGES[args.stage], trains=tuple(args.trains))
    try:
        trainer = Trainer(args)
        show(trainer, args.show) if args.show else trainer.run()
    except (BadInput, echat.BadCheckpoint) as e:
        # from a worker process it comes with the traceback of that one
        message = str(e).strip().splitlines()[-1].removeprefix("data.BadInput: ")
        sys.exit(f"train.py: {message}") if "RANK" in os.environ else fail(message)


def fail(message: str) -> None:
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
