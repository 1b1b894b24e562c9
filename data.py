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


# ---------------------------------------------------------------------------------------------
# Commands on lists

def spoken(record: dict) -> str | None:
    """The 24 kHz speech of a record that the model learns to say."""
    return record["extra"].get("reply_wav") or (
        record["wav"] if record["task"].startswith("<TEXT2TOKEN>") else None)


def write_lines(path: str, rows) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    os.replace(path + ".tmp", path)


def raw_records(path: str) -> list[dict]:
    """The records as written, wav paths untouched."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@torch.inference_mode()
def tokens(lists: list[str], folder: str, batch: int = 16) -> None:
    """Add extra.speech_token (25 codes a second) to the records of lists that are to be spoken."""
    from model import load_s3
    s3, done = load_s3(folder), {}
    wanted = sorted({(seconds_of(w), w) for path in lists for r in records(path)
                     if (w := spoken(r)) and "speech_token" not in r["extra"]})
    for i in tqdm(range(0, len(wanted), batch), unit=" batches", desc="speech codes"):
        paths = [w for _, w in wanted[i:i + batch]]
        mels = [features(w, s3.cfg.n_mels) for w in paths]
        codes, lengths = s3.encode(pad_stack(mels), torch.tensor([len(m) for m in mels]))
        done |= {w: c[:n].tolist() for w, c, n in zip(paths, codes, lengths)}
    for path in lists:
        rows = raw_records(path)
        for row, record in zip(rows, records(path)):
            if spoken(record) in done:
                row["extra"]["speech_token"] = done[spoken(record)]
        write_lines(path, rows)


@torch.inference_mode()
def make_voice(wavs: list[str], folder: str, out: str) -> None:
    """A voice file: a prompt (codes and mel of the first wav) and a speaker vector of all wavs.

    The vector is the mean and the spread of the log-mel over time; CosyVoice has CAM++ here.
    """
    from model import load_config, load_s3, save_weights
    from vocoder import mel_spectrogram
    cfg, s3 = load_config(folder), load_s3(folder)
    rate = cfg.vocoder.sample_rate
    mels = [mel_spectrogram(read_wave(w, rate)[None], cfg.vocoder)[0] for w in wavs]  # (T, 80)
    prompt = features(wavs[0], s3.cfg.n_mels)[None]
    codes, _ = s3.encode(prompt, torch.tensor([prompt.shape[1]]))
    frames = min(codes.shape[1], len(mels[0]) // 4)
    all_frames = torch.cat(mels)
    spk = torch.cat([all_frames.mean(0) + 5, all_frames.std(0)])  # (160,), roughly centred
    spk = torch.nn.functional.pad(spk, (0, cfg.flow.spk_dim - len(spk)))[None]
    save_weights(out, {"spk": spk, "prompt_codes": codes[:, :frames],
                       "prompt_mel": mels[0][None, :4 * frames]})


def protocol_texts(times: int = 300) -> list[str]:
    """Prompts, think template and tags, often enough that the BPE makes short work of them."""
    from model import SYSTEM, TAGS, UNKNOWN, label_think, user_prompt
    every = sorted(set(TAGS.values()))
    tags = ("CHILD ADULT OLD MALE FEMALE LAUGH COUGH CRY SCREAMING SIGH THROAT_CLEARING SNEEZE "
            "OTHER HAPPY SAD SURPRISE FEAR DISGUST ANGER NEUTRAL SORRY").split()
    think = label_think("en", "Hello.", dict.fromkeys(
        ("age", "gender", "emotion", "event", "reply_emotion"), "<SAD>"))
    texts = [*SYSTEM.values(), *map(user_prompt, [[t] for t in every]), user_prompt(every),
             think, UNKNOWN[1:-1], "system\n", "user\n", "assistant\n", *(f"a.<{t}>" for t in tags),
             *(f" <{t}>," for t in tags), *(f"<think end><{t}>A" for t in tags)]
    return texts * times


def check(path: str) -> dict:
    """Lint a list: counts records, hours, tasks and labels, and problems with their reasons."""
    found = {"records": 0, "hours": 0.0, "tasks": Counter(), "labels": Counter(),
             "problems": Counter()}
    for r in records(path):
        found["records"] += 1
        found["tasks"][r["task"]] += 1
        for name in ("age", "gender", "q_emotion", "caption", "emotion"):
            if name in r["extra"]:
                found["labels"][f"{name} {r['extra'][name]}"] += 1
        if not r["txt"].strip():
            found["problems"]["no text"] += 1
        if r.get("wav"):
            try:
                found["hours"] += seconds_of(r["wav"]) / 3600
            except BadInput:
                found["problems"]["unreadable wav"] += 1
        elif r["task"] != "<TEXT2TEXT>":
            found["problems"]["no wav"] += 1
    return found | {"hours": round(found["hours"], 2)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("build", help="make the EChat-mini corpus")
    c.add_argument("--out", required=True)
    c.add_argument("--scenes", nargs="+",
                   default=[os.path.join(os.path.dirname(__file__), "assets", "scenes.jsonl")])
    c.add_argument("--n", type=int, default=10000)
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--jobs", type=int, default=os.cpu_count())
    c = commands.add_parser("tokenizer", help="train the byte-level BPE")
    c.add_argument("--text", required=True, help="file with one text a line")
    c.add_argument("--vocab", type=int, default=2048)
    c.add_argument("--out", required=True)
    c = commands.add_parser("tokens", help="add extra.speech_token to lists")
    c.add_argument("lists", nargs="+")
    c.add_argument("--model", required=True, help="folder with tokenizer_s3.safetensors")
    c = commands.add_parser("voice", help="make a voice file")
    c.add_argument("wavs", nargs="+")
    c.add_argument("--model", required=True)
    c.add_argument("--out", required=True)
    c = commands.add_parser("check", help="lint lists")
    c.add_argument("lists", nargs="+")
    args = p.parse_args()
    try:
        run(args)
    except BadInput as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    if args.command == "build":
        build(args.out, args.scenes, args.n, args.seed, args.jobs)
    elif args.command == "tokenizer":
        with open(args.text, encoding="utf-8") as f:
            train_tokenizer(f.read().splitlines() + protocol_texts(), args.vocab, args.out)
    elif args.command == "tokens":
        tokens(args.lists, args.model)
    elif args.command == "voice":
        make_voice(args.wavs, args.model, args.out)
    elif args.command == "check":
        for path in args.lists:
            print(path, json.dumps(check(path), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
