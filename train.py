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
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as tree
from torch.utils.checkpoint import checkpoint

import data
import model as echat
from data import TAG, BadInput, Mixture, Source, Tokenizer, positive
from decoder import rotate
from encoder import SpeechTokenizer, load_whisper
from model import AUDIO, EChat, Token2Wav, label_think, prompt, think_length
from vocoder import Discriminator, discriminator_loss, feature_loss, fold_weights, \
    generator_loss, mel_loss, mel_spectrogram, stft_loss

# ---------------------------------------------------------------------------------------------
# The stages. Paper App. B.1: what is trained in each; `interleave` = share of speech answers in
# 6:18 form in the first epoch and later ones; `think` = share of dialogues that think first;
# `s2t` = share of spoken dialogues that answer in text only; `labels` = whether P is asked for. The
# data of a stage, as they are named with their weights (--data asr.jsonl --data asrp.jsonl:0.1),
# stand behind it; those of its earlier steps stay in.


@dataclass
class Stage:
    trains: tuple[str, ...]
    budget: int = 2800  # computed positions a batch (LLM tokens; frames for flow and vocoder)
    interleave: tuple[float, float] = (0.0, 0.0)
    think: float = 0.0
    s2t: float = 0.0
    epochs: float = math.inf  # without --steps and --minutes; the paper's
    labels: bool = True


STAGES = {
    "text": Stage(("decoder",)),  # T2T; the paper takes Qwen2.5 as given
    "align": Stage(("adapter",), epochs=1),  # 1.1: ASR
    "understand": Stage(("adapter", "encoder"), epochs=1),  # 1.2: + ASR+P
    "paralinguistic": Stage(("adapter", "encoder"), epochs=1),  # 1.3: + only P
    "full-label": Stage(("adapter", "encoder"), epochs=1),  # 1.4: + all labels (pseudo-label)
    # 2.1: TTS, T2T, 0.1 x the data of stage 1. Released freeze list "llm" would freeze the speech
    # embedding and head; here they train. 2.2: + plain S2S.
    "tts": Stage(("decoder",), interleave=(0.0, 0.5), epochs=2),
    "s2s": Stage(("encoder", "adapter", "decoder"), interleave=(0.0, 0.5), epochs=2),
    # 3: + EChat at 0.2; then its direct replies and the model's own ones (data.py answer)
    "empathy": Stage(("encoder", "adapter", "decoder"), interleave=(0.5, 0.5), think=1.0, s2t=0.1,
                     epochs=1),
    "distill": Stage(("encoder", "adapter", "decoder"), interleave=(0.5, 0.5), think=0.5, s2t=0.1,
                     epochs=1),
    "tokenizer": Stage(("s3",), budget=8000),
    "flow": Stage(("flow",), budget=3200),
    "vocoder": Stage(("vocoder",), budget=576),
}

# ---------------------------------------------------------------------------------------------
# The method: a record becomes one sequence, laid out as in the released code.

PARTS = ("asr", "p", "think", "text", "speech")  # whose losses eq. 1-4 add up
# --guide: how near in seconds the text must be to the code, and the user's speech to the word,
# which its pauses displace; the time of what has none; a shift that keeps the two apart
NEAR, FAR, NEVER, ELSEWHERE = 0.25, 0.7, -1e9, 1e4
HEARD = 3 * 10**9  # bytes of clips' encodings that are kept: 20,000 of mini's at 4 s
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
        for i, when in enumerate(times):
            self.query[first - 1 + i] = ELSEWHERE + when / FAR if when > NEVER else NEVER


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
    """One record of a list -> the sequence it trains, or the reason why it is rejected. BadInput
    where something in it is missing or wrong."""
    task, extra, txt = record["task"], record["extra"], record["txt"].replace("\n", " ")
    V, close = cfg.decoder.vocab, cfg.decoder.codes
    kind, clips, frames = data.usable(record, close)
    slots = [EChat.audio_slots(n) for n in frames]
    speaks, codes = kind in ("tts", "s2s"), extra.get("speech_token") or []
    speech = [V + close, *(V + c for c in codes), V + close]
    if kind == "t2t":
        sample = Sample("t2t")
        sample.add(prompt("t2t", tok, cfg.decoder, text=extra["question"]))
        sample.add([*tok.encode(txt), tok.im_end], "text")
        return sample
    if kind == "understand":  # eq. 1: the words, then the labels
        if not stage.labels:
            task, txt = "<TRANSCRIBE>", TAG.split(txt)[0]
            if not txt:
                return "only P, left out by --ablate u-driven"
            record = record | {"txt": txt}
        user = echat.user_prompt([data.TAGS[t] for t in TAG.findall(task)], cfg.language)
        sample = Sample(user, audio=clips)
        sample.add(prompt("understand", tok, cfg.decoder, slots[-1], user))
        for name, value in data.known_labels(record).items():
            sample.cues[[*data.LABELS].index(name)] = data.LABELS[name].index(value)
        words, answer = len(TAG.split(txt)[0].encode()), tok.encode(txt)
        at, first = 0, sample.length
        for token in answer:
            sample.add([token], "asr" if at < words else "p", tok.unknown)
            at += len(tok.bytes_of(token))
        if words:
            times = said_at(answer, tok, 0.08 * slots[-1], 0, words)
            sample.listen(first, times, slots[-1])
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
        for part, ids in interleave(text, speech) if stream else [("speech", speech[1:])]:
            sample.add(ids, part)  # without the open of speech, which the prompt has
        spoken = said_at(text, tok, len(codes) / 25, *tagless(txt))
        first = len(asked) if stream else len(asked) - len(tok.fixed(echat.ASSISTANT)) - len(text)
        sample.say(first, spoken, V)
        return sample

    # Spoken dialogue, eq. 3; with the think of eq. 4 in front.
    history = [(n, turn["txt"], turn.get("speech_token") or [])
               for n, turn in zip(slots, extra.get("history", []))]
    think, user, said = "", "", extra.get("q_txt") or extra.get("question") or ""
    if rng.random() < stage.think and "own_think" not in extra:  # that reply fits its own labels
        if extra.get("think_str") and rng.random() < 0.25:
            think = echat.THINK + extra["think_str"] + echat.THINK_END
            user = echat.NATURAL if cfg.language == "en" else ""
            txt = re.sub("^<[^<>]+>", "", txt)  # the reply's emotion belongs to the label think
        else:
            labels = {name: extra.get(key) for name, key in data.IN_EXTRA.items()}
            tone = re.match("<[^<>]+>", txt)  # released lists have it only here
            labels["reply_emotion"] = extra.get("emotion") or (tone and tone[0])
            think = label_think(cfg.language, said or echat.UNKNOWN, labels)
    answer = [*tok.encode(think + txt), tok.im_end]  # one string: `>` may merge with what follows
    thought = think_length(answer, tok)
    text = answer[thought:]
    stream = speaks and stream and 3 * len(text) <= len(speech)
    name = kind + ("_stream" if stream else "") + ("_think" if think else "")
    sample = Sample(name + user, audio=clips)
    sample.add(prompt(name, tok, cfg.decoder, slots[-1], user, history))
    sample.add(answer[:thought], "think", tok.unknown)
    first, heard = sample.length, think.find(said)
    if said and heard > 0:
        heard = len(think[:heard].encode())
        sample.listen(first - thought, said_at(answer[:thought], tok, 0.08 * slots[-1], heard,
                                               heard + len(said.encode())), slots[-1])
    whole = [("text", text), ("speech", speech if speaks else [])]
    for part, ids in interleave(text, speech) if stream else whole:
        sample.add(ids, part)
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
            with echat.expecting("the weights of Whisper", args.whisper):
                weights = load_whisper(echat.read_weights(args.whisper))
            echat.fit(self.module.encoder, weights, args.whisper)
            self.module.adapter.start_open(self.module.encoder.ln_post)
        self.parameters = {"model": trainable(self.module, stage.trains)}
        if args.ear:
            D, labels = cfg.adapter.d_in, sum(map(len, data.LABELS.values()))
            self.module.ear = nn.ModuleDict({  # letters: bytes, 50 a second
                "letters": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * 256)),
                "cues": nn.Linear(cfg.adapter.d_out, labels)})
            load_if_there(self.module.ear, args.init, "ear.safetensors")
            self.parameters["model"] += self.module.ear.parameters()
            self.module.adapter.embed.register_forward_pre_hook(
                lambda _, inputs: setattr(self, "convolved", inputs[0]))
        self.make = partial(sequence, stage=stage, tok=self.tok, cfg=cfg)
        if args.guide:
            layers = self.module.decoder.layers
            self.guided = layers[(len(layers) - 1) // 2].self_attn
            self.guided.register_forward_pre_hook(lambda _, seen: setattr(self, "watched", seen))
        self.step = 0  # the loop's
        self.heard = {}  # clip -> what a frozen encoder makes of it: a constant, in half precision
        self.room = HEARD  # bytes that are left for it

    def shard(self, device: str) -> None:
        """FSDP2: every rank holds its share of the decoder's weights, gradients and optimiser state
        in fp32, and of a layer at a time all weights in bf16; a layer's activations are computed
        again for the gradient. Encoder and adapter, a tenth of the paper's size, are whole on
        every rank: not every batch uses them, and ranks that wait for each other must agree."""
        net = self.module.decoder
        policy = MixedPrecisionPolicy(*(() if device == "cpu" else (torch.bfloat16, torch.float32)))
        for part in (*net.layers, net):
            if part is not net:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)
            fully_shard(part, mp_policy=policy)
            part.set_gradient_divide_factor(1.0)  # a sum over ranks, no mean
            part.set_force_sum_reduction_for_comms(True)
        for name in ("embed", "logits"):
            register_fsdp_forward_method(net, name)
        self.module.shared = lambda *_: 0  # a prefix computed once would not survive twice
        self.parameters = {"model": [p for p in self.module.parameters() if p.requires_grad]}

    def collate(self, samples: list[Sample], seed: str) -> dict:
        rng = random.Random(seed)
        pads = {"ids": 0, "targets": -100, "part": -1, "key": NEVER, "query": NEVER, "cues": -100}
        if not all(all(s.attend) for s in samples):  # pads come last: causality hides them
            pads["attend"] = True
        batch = {name: data.pad_stack([torch.tensor(getattr(s, name)) for s in samples], pad)
                 for name, pad in pads.items()}
        if clips := [clip for s in samples for clip in s.audio]:
            mels, lost = [], Counter()
            for row, sample in enumerate(samples):
                new = self.mels(sample)
                if isinstance(new, str):  # silence, and nothing is learned from it
                    lost[new] += 1
                    new = [torch.zeros(data.frames_of(*clip), self.cfg.encoder.n_mels)
                           for clip in sample.audio]
                    for name in ("targets", "part", "query", "cues"):
                        batch[name][row] = pads[name]
                mels += new
            batch["lost"] = dict(lost)  # torch doubles a Counter when it passes it on
            batch["mel_lengths"] = torch.tensor([len(m) for m in mels])
            if self.args.augment and self.module.training:
                mels = [data.spec_augment(m, rng) for m in mels]
            batch["mel"], batch["clips"] = data.pad_stack(mels), [str(clip) for clip in clips]
        return batch

    def mels(self, sample: Sample) -> list[Tensor] | str:
        """What is heard in a sample, or why it cannot be read: until here only headers were."""
        try:
            mels = [data.features(path, self.cfg.encoder.n_mels, *span)
                    for path, *span in sample.audio]
        except BadInput as e:
            return data.reason(e)
        slots = sum(EChat.audio_slots(len(mel)) for mel in mels)
        return mels if slots == sample.ids.count(AUDIO) else "audio not as long as its header says"

    def flops(self, batch: dict) -> float:
        """Of a training step on what is no pad: per weight and position 2 forward, 2 to pass the
        error on and 2 to learn from it, where that is needed."""
        net = self.module
        frames = int(batch["mel_lengths"].sum()) if "mel" in batch else 0
        parts = ((net.decoder.layers, batch["size"], 4), (net.adapter, frames / 8, 4),
                 (net.decoder.embed_tokens, batch["weight"], 4),  # as the head
                 (net.encoder, frames / 2, 2))
        return sum(positions * (6 if p.requires_grad else frozen) * p.numel()
                   for part, positions, frozen in parts for p in part.parameters())

    def hear(self, batch: dict) -> tuple[Tensor, Tensor] | None:
        """The adapter's output of a batch's audio; a frozen encoder hears a clip only once, as
        far as memory goes."""
        if "mel" not in batch:
            return None
        net, mel, lengths = self.module, batch["mel"], batch["mel_lengths"]
        if self.args.augment or not net.training or net.encoder.conv1.weight.requires_grad:
            return net.hear(mel, lengths)
        rows = []
        for i, clip in enumerate(batch["clips"]):
            if (x := self.heard.get(clip)) is None:  # alone, so that it is the same in any batch
                x = net.encoder(mel[i:i + 1, :lengths[i]], lengths[i:i + 1])[0][0].half()
                if x.nbytes <= self.room:
                    self.heard[clip], self.room = x.cpu(), self.room - x.nbytes
            rows.append(x.to(mel.device))
        return net.adapter(data.pad_stack(rows).to(mel.dtype), (lengths + 1) // 2)

    @torch.no_grad()
    def reply(self, path: str) -> str:
        """What the model answers, greedily, to the first record of a list that can be used."""
        for record in data.records(path):
            asked = data.attempt(self.make, record, 1, random.Random(0))
            mels = self.mels(asked) if isinstance(asked, Sample) else asked
            if not isinstance(mels, str):
                break
        else:
            return ""
        ids = asked.ids[:next(i for i, part in enumerate(asked.part) if part >= 0)]
        layout = "speech" if asked.kind == "tts" else "interleave" if "_stream" in asked.kind \
            else "both" if asked.kind.startswith("s2s") else "text"
        said = {"text": [], "speech": []}
        for phase, token in self.module.generate(
                ids, self.tok, mels, layout, "_think" in asked.kind,
                dict.fromkeys(said, echat.Sampling()), max_tokens=200):
            said[phase].append(token)
        return f"{self.tok.decode(said['text'])} [{len(said['speech'])} codes]"

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
        return each.sum() / max(1, len(each)) + extra, stats

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
            else mask.squeeze(1)  # (B, T, S); of a mask for all rows alike (T, S)
        scores = (q @ k.transpose(1, 2) / E ** 0.5).float().masked_fill(~seen, -1e9)
        attention = scores.log_softmax(-1)
        now = batch["query"][:, S - T:, None]  # (B, T, 1)
        away = ((now - batch["key"][:, None]) ** 2 / 2).masked_fill(~seen, math.inf)  # (B, T, S)
        there = (now[..., 0] > NEVER) & (away.amin(-1) < 50)  # else its text is yet to come
        loss = -(attention - away).logsumexp(-1)[there]
        return loss.sum() / max(1, len(loss)), (loss.detach().sum(), len(loss))

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
            logits = self.module.ear["letters"](self.convolved[said])  # (B, S, 4 * 256)
            loss = echat.ctc_loss(logits.unflatten(2, (4, 256)).flatten(1, 2), 4 * lengths[said],
                                  spelt)
            extra, stats["letters"] = extra + loss, (loss.detach(), 1)
        real = torch.arange(speech.shape[1], device=speech.device) < lengths[:, None]  # (B, S)
        mean = (speech * real[..., None]).sum(1) / lengths[:, None]
        logits = self.module.ear["cues"](F.rms_norm(mean, mean.shape[1:]))  # (B, 20)
        parts = logits.split([len(values) for values in data.LABELS.values()], 1)
        for name, part, cue in zip(data.LABELS, parts, batch["cues"].T):
            if (known := cue >= 0).any():
                loss = F.cross_entropy(part[known], cue[known])
                extra = extra + loss
                stats[f"cue_{name}"] = (loss.detach() * known.sum(), known.sum())
        return self.args.ear * extra, stats

    def save(self, folder: str, state: dict) -> None:
        heads = {k[4:]: v for k, v in state.items() if k.startswith("ear.")}
        if heads:
            echat.save_weights(os.path.join(folder, "ear.safetensors"), heads)
        kept = {k: v for k, v in state.items() if not k.startswith("ear.")}
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


def readable(clips: list[Clip], read) -> tuple[list[Clip], list[Tensor], dict]:
    """The clips whose audio can be read, what is read of them, and why others cannot. BadInput if
    none can."""
    found, lost = data.readable(clips, read)
    if not found:
        raise BadInput(f"{clips[0].path}: {next(iter(lost))}, as all clips of a batch")
    return *map(list, zip(*found)), dict(lost)


def pitch_of(clip: Clip) -> Tensor:
    """Pitch in Hz (frames,) in the middle of each frame of a clip; 0 where unvoiced."""
    before = min(clip.start, 0.1)  # its edges need what is around them
    wave = data.read_wave(clip.path, data.QUERY_SR, clip.start - before,
                          clip.start + clip.length / 100 + 0.1)
    f0 = data.track_f0(wave.numpy())  # every 12.5 ms
    at = ((torch.arange(clip.length) + 0.5) / 100 + before).numpy() / 0.0125
    voiced = np.flatnonzero(f0)
    between = np.interp(at, voiced, f0[voiced]) if len(voiced) else 0 * at
    near = f0[at.round().astype(int).clip(0, len(f0) - 1)] > 0
    return torch.from_numpy((between * near).astype(np.float32))


class S3:
    """Supervised speech tokenizer: recognise the text through the codes (CTC over its bytes)."""

    turns, whisper = ("model",), ("conv", "blocks.", "tail.", "ln_post.")

    def __init__(self, args, cfg, stage):
        self.cfg, self.args = replace(cfg.s3, vocab=256), args
        self.module = SpeechTokenizer(self.cfg)
        if args.whisper:
            with echat.expecting("the weights of Whisper", args.whisper):
                self.module.init_from_encoder(load_whisper(echat.read_weights(args.whisper)))
        self.parameters = {"model": list(self.module.parameters())}
        self.step, self.recent = 0, []  # the loop's step; features of the latest batches

    def make(self, record: dict, epoch: int, rng: random.Random) -> Clip | str:
        text, clip = TAG.sub("", record["txt"]).lower(), data.place(record)
        frames = data.frames_of(*clip)
        if not 30 <= frames <= 2000 or not text:
            return "no text, or audio outside 0.3 .. 20 s"
        return Clip(clip[0], clip[1], frames, text)

    def collate(self, clips: list[Clip], seed: str) -> dict:
        clips, mels, lost = readable(clips, lambda clip: data.features(
            clip.path, self.cfg.n_mels, clip.start, clip.start + clip.length / 100))
        texts = [torch.tensor(list(c.text.encode())) for c in clips]
        return {"mel": data.pad_stack(mels), "mel_lengths": torch.tensor([len(m) for m in mels]),
                "text": data.pad_stack(texts), "text_lengths": torch.tensor([*map(len, texts)]),
                "clips": clips, "lost": lost}

    def loss(self, turn: str, batch: dict) -> tuple[Tensor, dict]:
        """CTC alone until the recogniser works, then k-means on its features, then by codes."""
        if self.module.training and not self.module.codebook.fitted:
            after = self.args.quantise_after
            if self.step > after - 40:
                with torch.no_grad():
                    x, lengths = self.module.features(batch["mel"], batch["mel_lengths"])
                self.recent.append(torch.cat([row[:n] for row, n in zip(x, lengths)]))
            if self.step > after and len(self.recent) > min(40, after):
                found = torch.cat(self.recent)
                if len(found) < self.cfg.codes:
                    raise BadInput(f"{len(found)} features for k-means of {self.cfg.codes} codes: "
                                   "--quantise-after or --batch-tokens is too small")
                self.module.codebook.fit(found)
                self.recent = []
        _, loss, stats = self.module(batch["mel"], batch["mel_lengths"], batch["text"],
                                     batch["text_lengths"])
        return loss, {k: (torch.tensor(float(v)), 1) for k, v in stats.items()}

    def save(self, folder: str, state: dict) -> None:
        """What encode() needs; the tail and the CTC head were only the teacher."""
        kept = {k: v for k, v in state.items()
                if not k.startswith(("tail.", "ln_post.", "head."))}
        echat.save_weights(os.path.join(folder, "tokenizer_s3.safetensors"), kept)


class Voice:
    """Common to flow and vocoder: clips of 24 kHz speech, the token2wav file."""

    whisper, needs_codes, longest, shortest = (), True, 240, 40

    def __init__(self, args, cfg, stage):
        self.cfg, self.args = cfg, args
        if cfg.vocoder.hop * 100 != cfg.vocoder.sample_rate:
            raise BadInput("flow and vocoder train on clips of 100 frames a second, not of "
                           f"{cfg.vocoder.sample_rate} / {cfg.vocoder.hop}")
        self.own = os.path.join(args.init or "", "voice.safetensors")
        self.voices, self.begun = {}, {}  # by voice file; the flow's state after its prompt
        self.whole = Token2Wav(cfg, {})
        load_if_there(self.whole, args.init, "token2wav.safetensors")

    def make(self, record: dict, epoch: int, rng: random.Random) -> Clip | str:
        extra, said = record["extra"], data.spoken(record)
        if not said:
            return "no speech to say"
        (path, start, end), codes = said, extra.get("speech_token") or []
        frames = int(data.seconds_of(path, start, end) * 100)
        frames = min(frames, 4 * len(codes)) if self.needs_codes else frames
        length = min(frames, self.longest) // 4 * 4
        if length < self.shortest:
            return "too short"
        if self.needs_codes and not 0 <= min(codes) <= max(codes) < self.cfg.flow.codes:
            return "a code outside the codebook"
        first = rng.randint(0, (frames - length) // 4) * 4
        return Clip(path, start + first / 100, length, voice=extra.get("voice") or "",
                    codes=codes[first // 4:(first + length) // 4])

    def collate(self, clips: list[Clip], seed: str) -> dict:
        rate, hop = self.cfg.vocoder.sample_rate, self.cfg.vocoder.hop
        clips, waves, lost = readable(clips, lambda clip: data.read_wave(
            clip.path, rate, clip.start, clip.start + clip.length / 100))
        waves = [F.pad(w, (0, c.length * hop - len(w))) for w, c in zip(waves, clips)]
        codes = [torch.tensor(c.codes, dtype=torch.long) for c in clips]
        lengths, voices = torch.tensor([len(c) for c in codes]), [c.voice for c in clips]
        return {"wave": data.pad_stack(waves), "codes": data.pad_stack(codes), "lengths": lengths,
                "voices": voices, "seed": seed, "clips": clips, "lost": lost}

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

    def save(self, folder: str, state: dict) -> None:
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
    """As HiFi-GAN: least squares GAN, feature matching, 45 x mel. A source brings 10 x
    multi-resolution STFT and what teaches the pitch; it sings at the true one."""

    turns = ("discriminator", "generator")

    def __init__(self, args, cfg, stage):
        super().__init__(args, cfg, stage)
        generator = self.whole.vocoder
        if cfg.vocoder.kind == "hifigan":
            generator.unfold()
        self.module = nn.ModuleDict(dict(generator=generator,
                                         discriminator=Discriminator(cfg.vocoder)))
        self.parameters = {t: list(self.module[t].parameters()) for t in self.turns}
        self.step, self.needs_codes = 0, args.on_flow  # the loop's
        self.longest = self.shortest = 128 if args.on_flow else 96  # most have their context

    def collate(self, clips: list[Clip], seed: str) -> dict:
        batch = super().collate(clips, seed)
        if self.cfg.vocoder.kind != "hifigan":
            batch["f0"] = torch.stack([pitch_of(clip) for clip in batch["clips"]])  # (B, T)
        return batch

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
            batch["heard"] = self.heard(batch)
            batch["fake"] = G(batch["heard"], batch.get("f0"), self.step)
        fake = batch["fake"]
        if turn == "discriminator":
            if alone:
                return sum(p.sum() for p in D.parameters()) * 0, {}
            loss = discriminator_loss(D(real)[0], D(fake.detach())[0])
            return loss, {"d": (loss.detach(), 1)}
        loss = mel_loss(real, fake, self.cfg.vocoder)
        stats = {"mel": (loss.detach() / 45, 1)}  # L1 of natural-log mels
        if "f0" in batch:
            parts = {"stft": stft_loss(real, fake),
                     "f0": F.l1_loss(G.pitch(batch["heard"]), batch["f0"]) / 100}
            loss = loss + 10 * sum(parts.values())
            stats |= {k: (v.detach(), 1) for k, v in parts.items()}
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


def load_if_there(module: nn.Module, folder: str | None, name: str) -> None:
    path = os.path.join(folder or "", name)
    if folder and os.path.exists(path):
        echat.fit(module, echat.read_weights(path), path)


def trainable(module: EChat, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Freeze all but the named components; returns what is left to train."""
    for name, part in module.named_children():
        part.requires_grad_(name in names)
    return [p for p in module.parameters() if p.requires_grad]


def weighted(item: str) -> tuple[str, float]:
    """LIST[:WEIGHT] -> path, weight. BadInput where it is 0."""
    found = re.fullmatch(r"(.+):(\d*\.?\d+)", item)
    if found and not float(found[2]):
        raise BadInput(f"{item}: a weight of 0")
    return (found[1], float(found[2])) if found else (item, 1.0)


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then inverse square root (Vaswani et al. 2017), step from 1; the last
    --cooldown steps fall to 0."""
    warmup, left = max(1, args.warmup), (args.steps + 1 - step) / max(1, args.cooldown)
    return args.lr * min(step / warmup, math.sqrt(warmup / step)) * min(1.0, left)


def all_reduce(tensors: list[Tensor]) -> None:
    """Sum over ranks, if there are several, in one message."""
    if not (dist.is_initialized() and tensors):
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, new in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(new.view_as(t))


def clip(gradients: list[Tensor], limit: float) -> float:
    """Scale gradients, sharded or not, to a common norm of at most `limit` -> the norm before."""
    kinds = [[g for g in gradients if isinstance(g, DTensor) == kind] for kind in (False, True)]
    norms = [nn.utils.get_total_norm(kind) for kind in kinds if kind]
    norm = math.hypot(*(float(n.full_tensor() if isinstance(n, DTensor) else n) for n in norms))
    if math.isfinite(norm) and norm > limit:
        for kind in filter(None, kinds):
            torch._foreach_mul_(kind, limit / norm)
    return norm


def orthogonal(x: Tensor) -> Tensor:
    """x with all its singular values moved to about 1, by Newton and Schulz's iteration of degree 5
    (on its longer side, so that s is small). It bears autocast: s is made anew each time."""
    x = x / (x.norm() + 1e-7)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(5):
        s = x @ x.T
        x = torch.addmm(x, torch.addmm(s, s, s, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).float()


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices inside the blocks of adapter and decoder move by orthogonal steps
    (Jordan et al. 2024), as long as Adam's usually are (Liu et al. 2025). torch.optim.Muon always
    computes in bfloat16, at which some CPUs are slow. Ranks share the work."""

    @torch.no_grad()
    def step(self) -> None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        turned = [(p, group) for group in self.param_groups if group["turned"]
                  for p in group["params"]]
        steps = [torch.zeros_like(p) for p, _ in turned]
        for i, (p, group) in enumerate(turned):
            if p not in self.state:  # AdamW reads no state that is without a step
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            mean = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            if i % world == rank:
                steps[i] = orthogonal(p.grad.lerp(mean, 0.95))
            p.grad = None  # AdamW passes over it
        all_reduce(steps)
        for (p, group), step in zip(turned, steps):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
        super().step()


def gathered(state: dict) -> dict:
    """A nested state with all shards put together, on the CPU of rank 0."""
    def whole(shard: DTensor) -> Tensor | None:
        full = shard.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None
    return tree.tree_map_only(DTensor, whole, state)


def add(sums: dict, stats: dict) -> None:
    """name -> (value, count), summed up."""
    for name, pair in stats.items():
        sums[name] = tuple(map(sum, zip(pair, sums.get(name, (0, 0)))))


def to(batch: dict, device: str) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in batch.items()}


class Trainer:
    """Batches -> steps -> log and checkpoint; one process or many."""

    def __init__(self, args):
        self.args, stage = args, STAGES[args.stage]
        self.stage = replace(
            stage, trains=tuple(args.trains or stage.trains), labels="u-driven" not in args.ablate,
            think=0.0 if "dual-think" in args.ablate else stage.think)
        if args.init and not os.path.isdir(args.init):
            raise BadInput(f"{args.init}: no such folder")
        if args.resume and not args.init:  # the state has not what a stage leaves as it is
            args.init = args.out
        self.rank, self.world, self.device, self.patient = setup(args.device)
        self.kind = self.device.split(":")[0]
        torch.manual_seed(args.seed)
        known = [folder for folder in (args.out if args.resume else None, args.init)
                 if folder and os.path.exists(os.path.join(folder, "config.json"))]
        self.cfg = echat.load_config(known[0]) if known else \
            echat.PRESETS[args.preset or "mini"]()
        if args.preset not in (None, self.cfg.name):
            raise BadInput(f"{known[0]}: {self.cfg.name}, not --preset {args.preset}")
        self.trainee = KINDS.get(args.stage, Dialogue)(args, self.cfg, self.stage)
        self.talks = isinstance(self.trainee, Dialogue)
        if self.rank:  # the weights are the same on all ranks, the dropout is not
            torch.manual_seed(args.seed + self.rank)
        self.step, self.data_state, self.best, self.lr = 0, None, math.inf, 0.0
        self.bad, self.skipped, self.lost = 0, 0, Counter()  # steps in a row, in all; samples
        state = self.saved() if args.resume else None
        if state:
            if state["data"] and len(state["data"]["sources"]) != len(args.data):
                raise BadInput(f"{args.out}: was trained on {len(state['data']['sources'])} lists, "
                               f"--data names {len(args.data)}")
            try:
                self.trainee.module.load_state_dict(state["module"])
            except RuntimeError:
                raise BadInput(f"{args.out}: {OTHER}") from None
        self.bf16 = args.bf16 or args.shard and self.kind != "cpu"
        if args.shard:
            self.shard()
        self.trainee.module.to(self.device)
        optimizer = Muon if args.muon else torch.optim.AdamW
        self.optimizers = {turn: optimizer(
            self.groups(p), args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay,
            fused=self.device != "mps") for turn, p in self.trainee.parameters.items()}
        if state:
            self.restore(state)

    @contextmanager
    def computed(self):
        """In bfloat16 with --bf16; there a CPU's fused attention is slower than its parts."""
        parts = self.bf16 and self.kind == "cpu"
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(parts)  # the CPU's, too
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.bf16), \
                sdpa_kernel(SDPBackend.MATH) if parts else nullcontext():
            yield

    def shard(self) -> None:
        if not dist.is_initialized() or not self.talks:
            raise BadInput("--shard is for the LLM's stages, run by torchrun")
        if self.args.ear or self.args.guide or self.args.muon:
            raise BadInput("--ear, --guide and --muon are for small models, not for --shard")
        self.trainee.shard(self.kind)

    def groups(self, parameters: list[nn.Parameter]) -> list[dict]:
        """Parameter groups: what comes from Whisper may learn at a share of the rate, and what
        the ear spells with at a multiple: before it can, nothing behind it learns much. AdamW
        wants what may be sharded, the decoder, in groups of its own."""
        spells = ("ear.letters.", "adapter.convs.") if self.args.ear else ()
        groups, mine = {}, set(parameters)
        for name, p in self.trainee.module.named_parameters():
            if p in mine:
                scale = self.args.whisper_lr if name.startswith(self.trainee.whisper) else \
                    4.0 if name.startswith(spells) else 1.0
                turned = p.dim() == 2 and name.startswith(("adapter.blocks.", "decoder.layers."))
                groups.setdefault((scale, turned, name.startswith("decoder.")), []).append(p)
        return [{"params": own, "scale": scale, "turned": turned}
                for (scale, turned, _), own in groups.items()]

    def collate(self, samples: list, seed: str) -> dict:
        """A batch with its weight in the loss - target tokens, so that short and long samples weigh
        each alike, or clips - and its positions that are no pad, counted here: on the device they
        would cost a wait each time."""
        batch, size = self.trainee.collate(samples, seed), sum(s.length for s in samples)
        weight = int((batch["targets"] != -100).sum()) if self.talks else len(batch["clips"])
        return batch | {"weight": weight, "size": size}

    def loader(self, lists: list[str], seed: int | str, state=None):
        sources = []
        for item in lists:
            path, weight = weighted(item)
            sources.append(Source(path, weight * data.count(path), self.trainee.make,
                                  self.args.batch_tokens or self.stage.budget, seed))
        mixture = Mixture(sources, self.collate, seed, self.rank, self.world, state)
        # A generator of its own: a loader made anew must not move on the model's random numbers.
        batches = iter(torch.utils.data.DataLoader(
            mixture, None, num_workers=self.args.workers, generator=torch.Generator(),
            multiprocessing_context="fork" if self.args.workers else None))
        first = next(batches)
        self.meet()
        return itertools.chain([first], batches)

    def meet(self) -> None:
        """Wait for all ranks, long if need be: where one may be at its disk for minutes."""
        if self.patient:
            dist.barrier(self.patient)

    def run(self) -> None:
        args = self.args
        batches = self.loader(args.data, f"{args.stage} {args.seed}", self.data_state)
        self.trainee.module.train()
        begun = window = time.time()
        waited, seen, work, sums = 0.0, 0, 0.0, {}
        while self.step < args.steps and not self.late(time.time() - begun):
            start = time.time()
            micro = [next(batches) for _ in range(args.accum)]
            state = micro[-1][1]
            if state["sources"][0]["epoch"] >= args.epochs:
                break
            self.data_state = state
            micro = [to(batch, self.device) for batch, _ in micro]
            for batch in micro:
                self.lost.update(batch.pop("lost", ()))
            waited += time.time() - start
            self.step += 1
            add(sums, self.update(micro))
            seen += sum(batch["size"] for batch in micro)
            if self.talks:
                work += sum(map(self.trainee.flops, micro))
            if self.step % args.log_every == 0:
                took = time.time() - window
                line = {"step": self.step, "epoch": self.data_state["sources"][0]["epoch"],
                        "lr": self.lr, "rate": seen * self.world / took, "wait": waited / took,
                        "minutes": (time.time() - begun) / 60}
                self.log(line | self.hardware(work / took) | self.means(sums))
                window, waited, seen, work, sums = time.time(), 0.0, 0, 0.0, {}
            if args.valid and self.step % args.valid_every == 0:
                self.validate()
            if self.step % args.save_every == 0:
                self.save(f"step-{self.step}" if args.keep else None)
        self.save()

    def late(self, seconds: float) -> bool:
        """Whether --minutes are over for any rank: all must stop at the same step."""
        late = torch.tensor(float(seconds >= self.args.minutes * 60), device=self.device)
        all_reduce([late])
        return bool(late)

    def hardware(self, flops: float) -> dict:
        """The most GB of memory so far, MFU if the device's peak is known, and what was left out:
        steps, and records by reason."""
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        used, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, ""
        if self.kind in ("cuda", "npu"):
            device = torch.get_device_module(self.kind)
            used, name = device.max_memory_allocated(), device.get_device_name()
        line = {"gb": used / 1e9}
        line |= {"mfu": flops / peak for chip, peak in PEAK.items() if chip in name and flops}
        rejected = sum((Counter(s["rejected"]) for s in self.data_state["sources"]),
                       sum(self.everyone(self.lost), Counter()))
        return line | {name: what for name, what in (
            ("skipped", self.skipped), ("rejected", dict(rejected))) if what}

    def update(self, micro: list[dict]) -> dict:
        """One optimiser step over the micro-batches of all ranks; {} if it was skipped."""
        trainee = self.trainee
        trainee.step, out = self.step, {}
        total = torch.tensor(float(sum(batch["weight"] for batch in micro)), device=self.device)
        all_reduce([total])
        total.clamp_(min=1)
        self.lr = learning_rate(self.step, self.args)
        for turn in trainee.turns:
            optimizer, parameters = self.optimizers[turn], trainee.parameters[turn]
            for p in parameters:  # never None: what a batch leaves out steps alike, resumed or not
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            broken = torch.zeros((), device=self.device)
            for batch in micro:
                with self.computed():
                    loss, stats = trainee.loss(turn, batch)
                (loss * (batch["weight"] / total)).backward()
                broken += ~torch.isfinite(loss.detach())
                if turn == trainee.turns[-1]:
                    stats["loss"] = loss.detach() * batch["weight"], batch["weight"]
                add(out, stats)
            gradients = [p.grad for p in parameters]
            all_reduce([broken, *(g for g in gradients if not isinstance(g, DTensor))])
            norm = clip(gradients, self.args.clip)
            if broken or not math.isfinite(norm):
                self.bad, self.skipped = self.bad + 1, self.skipped + 1
                if self.bad >= 10:
                    raise BadInput(f"10 steps in a row without a finite loss, last at {self.step}")
                return {}
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group["scale"]
            with self.computed():  # Muon's products; sums of fp32 stay fp32
                optimizer.step()
        self.bad = 0
        return out

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss and its parts over the first batches of the held-out lists, and a sample reply;
        the best so far is kept."""
        trainee, sums = self.trainee, {}
        trainee.module.eval()
        batches = self.loader(self.args.valid, 1)
        with self.computed():
            for _ in range(self.args.valid_batches):
                batch = to(next(batches)[0], self.device)
                loss, stats = trainee.loss(trainee.turns[-1], batch)
                add(sums, stats | {"loss": (loss * batch["weight"], batch["weight"])})
            reply = {"reply": trainee.reply(weighted(self.args.valid[0])[0])} if self.talks else {}
        trainee.module.train()
        found = {f"valid_{k}": v for k, v in self.means(sums).items()}
        self.log({"step": self.step} | found | reply)
        whole = self.step > max(self.args.ear_first, self.args.mel_only)  # all of the loss is there
        if whole and found.get("valid_loss", math.inf) < self.best:
            self.best = found["valid_loss"]
            self.save("best")

    def everyone(self, mine) -> list:
        """What all ranks have of something."""
        every = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(every, mine)
        return every

    def means(self, sums: dict) -> dict[str, float]:
        """name -> (sum, count) of this rank to name -> mean over all ranks."""
        total = {}  # not every rank has met every part
        for one in self.everyone({k: (float(v), float(n)) for k, (v, n) in sums.items()}):
            add(total, one)
        return {k: v / n for k, (v, n) in total.items() if n > 0}

    def log(self, line: dict) -> None:
        if self.rank:
            return
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                       for k, v in line.items()), file=sys.stderr, flush=True)
        os.makedirs(self.args.out, exist_ok=True)
        with open(os.path.join(self.args.out, "log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": self.args.stage} | line) + "\n")

    def chance(self) -> list:
        """What holds the states of random numbers: the CPU's, and the device's."""
        return [torch] + ([torch.get_device_module(self.kind)] if self.kind != "cpu" else [])

    def save(self, also: str | None = None) -> None:
        """The run's folder is a checkpoint folder: what a stage does not train is carried over.
        `also`: a name to keep it under."""
        rng = self.everyone([source.get_rng_state() for source in self.chance()])
        lost = sum(self.everyone(self.lost), Counter())
        state = gathered({
            "step": self.step, "data": self.data_state, "rng": rng, "best": self.best,
            "skipped": self.skipped, "lost": dict(lost),
            "module": self.trainee.module.state_dict(),
            "recent": getattr(self.trainee, "recent", []),
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()}})
        if self.rank == 0:
            out = self.args.out
            os.makedirs(out, exist_ok=True)
            for name in CARRIED:
                theirs, ours = os.path.join(self.args.init or out, name), os.path.join(out, name)
                if os.path.exists(theirs) and not os.path.exists(ours):
                    with data.replacing(ours, "wb") as f, open(theirs, "rb") as old:
                        shutil.copyfileobj(old, f)
            echat.save_config(out, self.cfg)
            self.trainee.save(out, state["module"])
            with data.replacing(os.path.join(out, "state.pt"), "wb") as f:
                torch.save(state, f)
            if also:
                self.keep(also)
        self.meet()

    def keep(self, name: str) -> None:
        """The run's folder as it is, once more by hard links: they take no room until it changes.
        Of the numbered ones the latest --keep."""
        out = Path(self.args.out)
        made, gone = out / "unfinished", out / "replaced"
        for old in (made, gone):
            shutil.rmtree(old, ignore_errors=True)
        made.mkdir()
        for file in out.iterdir():
            if file.is_file() and file.name != "log.jsonl":
                os.link(file, made / file.name)
        if (out / name).exists():
            (out / name).rename(gone)
        made.rename(out / name)
        shutil.rmtree(gone, ignore_errors=True)
        steps = sorted(out.glob("step-*"), key=lambda folder: int(folder.name[5:]))
        for old in steps[:-self.args.keep] if self.args.keep else ():
            shutil.rmtree(old)

    def saved(self) -> dict:
        path = os.path.join(self.args.out, "state.pt")
        try:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            return state | {"best": state["best"]}
        except (OSError, RuntimeError, ValueError, KeyError) as e:
            raise BadInput(f"{path}: cannot resume ({e})") from None

    def restore(self, state: dict) -> None:
        """All but the weights, which were there before they were sharded."""
        self.step, self.data_state, self.best = state["step"], state["data"], state["best"]
        self.skipped = state["skipped"]
        self.lost.update({} if self.rank else state["lost"])  # of all ranks
        if "recent" in vars(self.trainee):  # of rank 0 on all: they must agree when it is enough
            self.trainee.recent = [x.to(self.device) for x in state["recent"]]
        for turn, optimizer in self.optimizers.items():
            saved = state["optimizers"][turn]
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            for index, p in enumerate(owners):
                if isinstance(p, DTensor):
                    saved["state"][index] = {
                        k: distribute_tensor(v.to(self.device), p.device_mesh, p.placements,
                                             src_data_rank=None) if v.dim() else v
                        for k, v in saved["state"].get(index, {}).items()}
            turned = [i for group in saved["param_groups"] if group["turned"]
                      for i in group["params"] if i in saved["state"]]
            try:
                if any(("momentum" in saved["state"][i]) != self.args.muon for i in turned):
                    raise ValueError  # of another optimiser
                optimizer.load_state_dict(saved)
            except ValueError:
                raise BadInput(f"{self.args.out}: {OTHER}") from None
        if self.rank < len(state["rng"]):  # a rank more than then begins with its own
            for source, rng in zip(self.chance(), state["rng"][self.rank]):
                source.set_rng_state(rng)


# FLOP/s of a device in bf16, without sparsity, by its data sheet
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
        "L40S": 362e12, "4090": 165e12, "910B": 376e12}
CARRIED = ("tokenizer.json", "model.safetensors", "token2wav.safetensors",
           "tokenizer_s3.safetensors", "voice.safetensors", "ear.safetensors")
OTHER = "cannot resume, another stage or other flags made it"


def setup(device: str) -> tuple:
    """rank, world size, device, a group for long waits; starts the process groups of torchrun. A
    rank that is silent for 45 s ends the run on all."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else \
            "npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu"
    kind = device.split(":")[0]
    there = getattr(torch, kind, None)
    if kind != "cpu" and not (there and there.is_available()):
        raise BadInput(f"--device {device}: there is none here")
    if "RANK" not in os.environ:
        return 0, 1, device, None
    backend = {"cuda": "nccl", "npu": "hccl"}.get(kind, "gloo")
    if kind != "cpu":
        device = f"{kind}:{os.environ['LOCAL_RANK']}"
        torch.get_device_module(device).set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=45))
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device, patient


def show(trainer: Trainer, count: int) -> None:
    """Print what samples become: grey without loss, a colour for each part with loss."""
    if not trainer.talks:
        raise BadInput("--show is for the LLM's stages: clips have nothing to print")
    colours = 32, 33, 35, 36, 34, 90  # of PARTS, then of what has no loss
    V, tok = trainer.cfg.decoder.vocab, trainer.trainee.tok
    for item in trainer.args.data:
        rng = random.Random(trainer.args.seed)
        for _, record in zip(range(count), data.records(weighted(item)[0])):
            sample = data.attempt(trainer.trainee.make, record, 1, rng)
            if isinstance(sample, str):
                print(f"rejected: {sample}")
                continue
            for i, t, p, a in zip(sample.ids, sample.targets, sample.part, sample.attend):
                word = "~" if i == AUDIO else f"[{i - V}]" if i >= V else tok.decode([i])
                print(f"\033[{colours[p if t != -100 else -1]}m{word if a else '<&&>'}", end="")
            print("\033[0m\n")


LOST = "(?i)connection|timed out|timeout|aborted|remote process"  # in a collective's error


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--stage", choices=STAGES, required=True)
    p.add_argument("--preset", choices=echat.PRESETS, help="mini, or what --init is")
    p.add_argument("--data", nargs="+", action="extend", required=True, metavar="LIST[:WEIGHT]")
    p.add_argument("--out", default="runs/out", help="folder of the run, itself a checkpoint")
    p.add_argument("--init", help="checkpoint folder to start from")
    p.add_argument("--whisper", help="Whisper weights for the encoder")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--show", type=int, default=0, help="print N samples and stop")
    p.add_argument("--steps", type=int)
    p.add_argument("--epochs", type=int, help="passes over the first list; the paper's, where "
                   "neither this nor --steps nor --minutes is given")
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    p.add_argument("--lr", type=float, default=5e-6)
    p.add_argument("--warmup", type=int, default=8000)
    p.add_argument("--cooldown", type=int, default=0, help="last steps, over which lr falls to 0")
    p.add_argument("--whisper-lr", type=float, default=1.0,
                   help="rate of the encoder, or of the tokenizer's blocks, x --lr")
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--muon", action="store_true",
                   help="orthogonal steps for the blocks of adapter and decoder")
    p.add_argument("--clip", type=float, default=5.0)
    p.add_argument("--accum", type=positive, default=4)
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
    p.add_argument("--ablate", nargs="+", choices=("u-driven", "dual-think"), default=[],
                   help="Table 2: in all stages, understanding is ASR alone (leave out lists of "
                   "only P); no think")
    p.add_argument("--valid", nargs="+", action="extend", default=[], metavar="LIST[:WEIGHT]")
    p.add_argument("--valid-every", type=positive, default=500)
    p.add_argument("--valid-batches", type=positive, default=10)
    p.add_argument("--log-every", type=positive, default=1)
    p.add_argument("--save-every", type=positive, default=500)
    p.add_argument("--keep", type=int, default=0, help="also the latest N of these, as step-N")
    p.add_argument("--bf16", action="store_true",
                   help="products of matrices in bfloat16, weights and sums in fp32; slow on a CPU "
                   "without AVX512-BF16 or AMX")
    p.add_argument("--shard", action="store_true",
                   help="FSDP2 with activation checkpointing, bf16 on a GPU: for the paper preset")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--seed", type=int, default=777)
    p.add_argument("--device", default="auto")
    p.error = lambda message: p.exit(2, f"train.py: {message}\n")  # one line, without the usage
    args = p.parse_args()
    if args.epochs is None:
        endless = args.steps is None and args.minutes == math.inf
        args.epochs = STAGES[args.stage].epochs if endless else math.inf
    args.steps = 10**9 if args.steps is None else args.steps
    try:
        trainer = Trainer(args)
        show(trainer, args.show) if args.show else trainer.run()
    except (BadInput, echat.BadCheckpoint, OSError) as e:
        # from a worker process it comes with the traceback of that one
        print("train.py:", str(e).strip().splitlines()[-1].removeprefix("data.BadInput: "),
              file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if "RANK" not in os.environ or not re.search(LOST, str(e)):
            raise
        sys.exit(f"train.py: rank {os.environ['RANK']} stops, another one is gone or has been "
                 f"silent for 45 s ({str(e).strip().splitlines()[0][:150]})")


if __name__ == "__main__":
    main()
