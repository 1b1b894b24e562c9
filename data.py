"""Data: tokenizer, manifests, features, batches, and the commands that make a corpus.

Paper sections EChat-200K (Data Pipline), App. A.1 and A.3. A list is JSONL in the released raw
format, one record a line: key, wav (relative to the list), txt, task, extra {...}, start, end.

    python data.py build --out corpus            # the EChat-mini corpus (synthetic labels)
    python data.py tokenizer --text corpus/texts.txt --vocab 2048 --out assets/mini
    python data.py tokens LIST --model assets/mini   # add extra.speech_token to a list
    python data.py voice WAV ... --model assets/mini --out voice.safetensors
    python data.py check LIST                    # lint a list, count hours and labels

Tensor legend: B batch, T mel frames (100 Hz), L tokens, N samples.
"""
import argparse
import json
import math
import os
import random
import sys
from collections import Counter
from functools import lru_cache

import numpy as np
import soundfile as sf
import tiktoken
import torch
from scipy.signal import resample_poly
from torch import Tensor

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


@lru_cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, as used in tokenizer.json files."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {chr(b): b for b in plain}
    return table | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Byte-level BPE of a `tokenizer.json` (Hugging Face layout), run by tiktoken."""

    def __init__(self, folder: str):
        path = os.path.join(folder, "tokenizer.json")
        try:
            with open(path, encoding="utf-8") as f:
                spec = json.load(f)
            vocab, added = spec["model"]["vocab"], spec["added_tokens"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path}: not a readable tokenizer.json ({e})") from None
        special = {t["content"]: t["id"] for t in added}
        ranks = {bytes(map(byte_alphabet().get, w)): i for w, i in vocab.items()
                 if w not in special}
        self.encoder = tiktoken.Encoding("echat", pat_str=PATTERN, mergeable_ranks=ranks,
                                         special_tokens=special)
        self.n_vocab = self.encoder.n_vocab
        self.im_end = special["<|im_end|>"]
        # tokens of the unknown-label placeholder `<&&>`: never a target, never attended
        self.unknown = {i for w, i in ranks.items() if b"&&" in w}
        self.fixed = lru_cache(self.fixed)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids; control tokens inside user text stay text."""
        return self.encoder.encode_ordinary(text)

    def fixed(self, text: str) -> list[int]:
        """A protocol string -> ids, its control tokens read as such; cached, do not modify."""
        return self.encoder.encode(text, allowed_special="all")

    def bytes_of(self, token: int) -> bytes:
        return self.encoder.decode_single_token_bytes(token)

    def decode(self, ids: list[int]) -> str:
        return self.encoder.decode(ids, errors="replace")


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
    bpe.save(os.path.join(out, "tokenizer.json.tmp"))
    os.replace(os.path.join(out, "tokenizer.json.tmp"), os.path.join(out, "tokenizer.json"))


# ---------------------------------------------------------------------------------------------
# Audio

def read_wave(source, rate: int = SAMPLE_RATE, start: float = 0.0, end: float | None = None
              ) -> Tensor:
    """Any file soundfile reads -> mono float32 (N,) at `rate`, [start, end) in seconds.

    Raises BadInput for a missing, damaged, empty, too long or non-finite file.
    """
    name = source if isinstance(source, str) else "audio"
    try:
        with sf.SoundFile(source) as f:
            last = len(f) if end is None else min(len(f), int(end * f.samplerate))
            first = int(start * f.samplerate)
            if last - first > MAX_SECONDS * f.samplerate:
                raise BadInput(f"{name}: {(last - first) / f.samplerate:.0f} s of audio, the "
                               f"limit is {MAX_SECONDS} s")
            f.seek(first)
            wave, own_rate = f.read(max(0, last - first), dtype="float32", always_2d=True), \
                f.samplerate
    except (OSError, RuntimeError, TypeError) as e:
        if isinstance(source, str) and not os.path.exists(source):
            raise BadInput(f"{name}: no such file") from None
        raise BadInput(f"{name}: not a readable audio file ({str(e).strip()})") from None
    wave = wave.mean(1)  # (N,)
    if not len(wave):
        raise BadInput(f"{name}: no samples")
    if not np.isfinite(wave).all():
        raise BadInput(f"{name}: holds samples that are not numbers")
    if own_rate != rate:
        common = math.gcd(own_rate, rate)
        wave = resample_poly(wave, rate // common, own_rate // common).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(wave))


def seconds_of(path: str) -> float:
    """Duration from the file's header only."""
    try:
        return sf.info(path).duration
    except (OSError, RuntimeError) as e:
        raise BadInput(f"{path}: not a readable audio file ({e})") from None


def write_wave(path: str, wave: Tensor, rate: int) -> None:
    """16-bit PCM, written whole or not at all."""
    sf.write(path + ".tmp", wave.clamp(-1, 1).numpy(), rate, subtype="PCM_16", format="WAV")
    os.replace(path + ".tmp", path)


def spec_augment(mel: Tensor, rng: random.Random) -> Tensor:
    """As released: 2 time masks <= 50, 2 mel masks <= 10, then 3 spans <= 30 copied from the past."""
    mel = mel.clone()
    frames, bins = mel.shape
    for _ in range(2):
        width = rng.randint(0, min(50, frames // 4))
        at = rng.randint(0, frames - width)
        mel[at:at + width] = 0
        width = rng.randint(0, 10)
        at = rng.randint(0, bins - width)
        mel[:, at:at + width] = 0
    for _ in range(3):
        width = rng.randint(0, min(30, frames // 4))
        at = rng.randint(0, frames - width)
        back = rng.randint(0, at)
        mel[at:at + width] = mel[at - back:at - back + width].clone()
    return mel


# ---------------------------------------------------------------------------------------------
# Lists and batches

def records(path: str):
    """Yields the records of a JSONL list, wav paths made absolute; BadInput names a bad line."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    record = json.loads(line)
                    record["task"], record["txt"]
                except (ValueError, KeyError, TypeError):
                    raise BadInput(f"{path}:{number}: not a JSON record with task and txt") \
                        from None
                extra = record.setdefault("extra", {})
                for home, name in ((record, "wav"), (extra, "reply_wav")):
                    if home.get(name):
                        home[name] = os.path.join(folder, home[name])
                yield record
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from None


class Source:
    """One weighted list as an endless stream of batches, every step a function of the seed.

    A window of records is read, turned into samples, sorted by length, cut into batches of at
    most `budget` computed positions (longest x count) and the batches shuffled. `state` is all
    there is to resume: which epoch, which window, how many of its batches are used.
    """

    def __init__(self, path: str, weight: float, make, budget: int, seed: int, window: int = 4000):
        self.path, self.weight, self.make = path, weight, make
        self.budget, self.seed, self.window = budget, seed, window
        self.state, self.rejected = {"epoch": 0, "window": 0, "used": 0}, Counter()

    def windows(self):
        """Lists of samples of the current epoch, from the state's window on."""
        stream, index = records(self.path), 0
        while chunk := [r for r, _ in zip(stream, range(self.window))]:
            if index >= self.state["window"]:
                yield index, chunk
            index += 1

    def batches(self):
        while True:
            empty = True
            for index, chunk in self.windows():
                rng = random.Random(f"{self.seed} {self.state['epoch']} {index}")
                samples = []
                for record in chunk:
                    made = self.make(record, self.state["epoch"], rng)
                    if isinstance(made, str):
                        self.rejected[made] += 1
                    else:
                        samples.append(made)
                cut = cut_batches(samples, self.budget)
                rng.shuffle(cut)
                for batch in cut[self.state["used"]:]:
                    empty = False
                    self.state["used"] += 1
                    yield batch
                self.state.update(window=index + 1, used=0)
            if empty and self.state["window"] == 0:
                raise BadInput(f"{self.path}: no usable record, rejected: {dict(self.rejected)}")
            self.state.update(epoch=self.state["epoch"] + 1, window=0, used=0)


def cut_batches(samples: list, budget: int) -> list[list]:
    """Sorted by length, grouped so that longest x count <= budget (at least one a batch)."""
    samples, batches = sorted(samples, key=lambda s: s.length), []
    for s in samples:
        if batches and s.length * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(s)
        else:
            batches.append([s])
    return batches


class Mixture(torch.utils.data.IterableDataset):
    """Draws the next source by weight x size, its next batch, and collates it.

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
                source.state = dict(saved)

    def __iter__(self):
        torch.set_num_threads(1)
        streams = [s.batches() for s in self.sources]
        weights = [s.weight for s in self.sources]
        while True:
            rng = random.Random(f"{self.seed} mix {self.drawn}")
            stream = rng.choices(streams, weights)[0]
            share = [next(stream) for _ in range(self.world)]
            self.drawn += 1
            state = {"drawn": self.drawn, "sources": [dict(s.state) for s in self.sources]}
            yield self.collate(share[self.rank], f"{self.seed} {self.drawn}"), state


def features(path: str, n_mels: int, start: float = 0.0, end: float | None = None) -> Tensor:
    """wav file -> log-mel (T, n_mels)."""
    return log_mel(read_wave(path, start=start, end=end), n_mels)


def pad_stack(rows: list[Tensor], value: float = 0) -> Tensor:
    """Tensors (n_i, ...) -> (B, max n, ...), padded at the end."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
