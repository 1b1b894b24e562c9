"""Tokenizer, audio files, lists, batches and mixing, and the commands on lists."""

import itertools
import json
import multiprocessing.dummy
import os
import random
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import soundfile as sf
import tokenizers
import torch
from conftest import copy_of, tone, write_list

import data
from data import PATTERN, BadInput, Mixture, Source, Tokenizer, cut_batches, read_wave
from encoder import SpeechTokenizer, TokenizerConfig
from model import EChat, load_echat, load_s3, prompt, read_weights, save_weights, user_prompt

GOLDEN = Path(__file__).parent / "golden"
TEXTS = [
    "", " ", "Hello, world!", "the user said hello  twice\n\n and   left ", "don't WE'LL i'm",
    "2024-11-05 3.14159", "\u4f60\u597d\uff0c\u4e16\u754c\u3002Hello\u4e2d",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok\ufe0f", "na\u00efve cafe\u0301 \u00a0\u2003x",
    "\x00\x07\ttab\r\nline\u2028",
    "<|im_end|>\n<|im_start|>assistant", "<|endoftext|><think>&&<&&></think end><SAD>a><b",
    "a && b&&c &&&& && ", "\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "aaaaaaaaaa thethethe " * 3]


# ---- tokenizer ---------------------------------------------------------------------------------

def test_ids_are_those_of_the_tokenizers_library(tokenizer_folder, tok):
    full = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    rng = random.Random(0)
    alphabet = "ethus r&<>\n'\u4f60\u00e9\U0001f600 1"
    texts = TEXTS + ["".join(rng.choices(alphabet, k=40)) for _ in range(100)]
    for text in texts:
        assert tok.encode(text) == plain.encode(text).ids, text  # control tokens stay text
        assert tok.fixed(text) == full.encode(text).ids, text  # and are control tokens here
        assert tok.decode(tok.encode(text)) == text
    assert tok.n_vocab == 303 and tok.im_end == full.token_to_id("<|im_end|>") == 302
    assert tok.unknown and all(b"&&" in tok.bytes_of(i) for i in tok.unknown)


def test_qwen2_texts_are_composed(tokenizer_folder, tmp_path, tok):
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "NFC"}}))
    qwen = Tokenizer(str(tmp_path))
    assert qwen.encode("cafe\u0301") == tok.encode("caf\u00e9") != tok.encode("cafe\u0301")
    assert qwen.fixed("cafe\u0301<|im_end|>\u0338") == [  # a control token is not composed with
        *tok.encode("caf\u00e9"), tok.im_end, *tok.encode("\u0338")]


def test_the_split_is_the_one_of_the_file(tokenizer_folder, tmp_path, tok):
    text = (tokenizer_folder / "tokenizer.json").read_text()
    assert text.count(r"|\\p{N}|") == 1
    (tmp_path / "tokenizer.json").write_text(text.replace(r"|\\p{N}|", r"|\\p{N}{1,3}|"))
    assert Tokenizer(str(tmp_path)).encoder._pat_str == PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")


def older_files(spec: dict, folder: Path, kind: str = "Qwen2Tokenizer") -> Path:
    """The tokenizer as vocab.json, merges.txt and tokenizer_config.json."""
    added = {t["id"]: {"content": t["content"]} for t in spec["added_tokens"]}
    vocab = {w: i for w, i in spec["model"]["vocab"].items() if i not in added}
    merges = ["#version: 0.2", *map(" ".join, spec["model"]["merges"])]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": kind, "added_tokens_decoder": added}))
    return folder


def test_older_files_make_the_same_tokenizer(tokenizer_folder, tmp_path, tok):
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    old = Tokenizer(str(older_files(spec, tmp_path)))
    assert old.n_vocab == tok.n_vocab and old.im_end == tok.im_end
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text)
        assert old.encode(text) == tok.encode(text) and old.fixed(text) == tok.fixed(text)
    older_files(spec, tmp_path, "GPT2Tokenizer")
    with pytest.raises(BadInput, match="tokenizer_class GPT2Tokenizer, expected Qwen2Tokenizer"):
        Tokenizer(str(tmp_path))


def test_an_engine_needs_all_its_parts(monkeypatch, capsys):
    needs = {"hibari": "json", "espeak": "sh", "festival": "sh /none/*/such", "kokoro": "json none"}
    monkeypatch.setattr(data, "packages", lambda: [
        {"name": name, "by": "pip", "package": name, "part": part} for name, part in needs.items()])
    assert data.find_engines() == {"hibari", "espeak"}
    assert "pip install festival kokoro" in capsys.readouterr().err


def test_part_of_the_real_vocabulary(tmp_path):
    """Some of Qwen2.5's tokens, with what `tokenizers` makes of lines in many scripts."""
    golden = json.loads((GOLDEN / "qwen_tokens.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden["tokenizer"]))
    qwen = Tokenizer(str(tmp_path))
    for text, ids in golden["lines"]:
        assert qwen.fixed(text) == ids, text


def test_merges_that_tiktoken_would_not_follow_are_refused(tokenizer_folder, tmp_path):
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    spec["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput, match="merges are not the vocabulary in its order"):
        Tokenizer(str(tmp_path))


def test_spare_rows_and_broken_characters_decode(tok):
    assert tok.bytes_of(400) == b"" and tok.decode([400, *tok.encode("ok")]) == "ok"
    half = tok.encode("\u4f60")[:1]
    assert tok.decode(half) == "\ufffd" and tok.bytes_of(half[0]) == "\u4f60".encode()[:1]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', '{"added_tokens": []}',
                                  '{"added_tokens": [], "model": {"vocab": {"\u4f60": 0}}}',
                                  '{"added_tokens": [], "model": {"vocab": {"a": 0}}}', None])
def test_broken_tokenizers_are_told_in_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BadInput, match="not a readable tokenizer.json") as error:
        Tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


# ---- audio -------------------------------------------------------------------------------------

@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_every_wav_becomes_16_khz_mono(tmp_path, subtype, rate):
    wave = tone(0.5, rate)
    sf.write(tmp_path / "a.wav", np.stack([wave, wave * 0.5], 1), rate, subtype=subtype)
    got = read_wave(str(tmp_path / "a.wav"))
    want = torch.from_numpy(tone(0.5)).float() * 0.75
    assert got.dtype == torch.float32 and got.shape == (8000,)
    assert (got - want)[200:-200].abs().max() < 0.1 and torch.corrcoef(
        torch.stack([got, want])[:, 200:-200])[0, 1] > 0.99


def test_a_stretch_of_a_file(tmp_path, wav):
    whole = read_wave(wav(1.0))
    part = read_wave(wav(1.0), start=0.29, end=0.57)  # 0.57 * 16000 is 9119.999...
    assert torch.equal(part, whole[4640:9120])
    assert torch.equal(read_wave(wav(1.0), start=0.5, end=9.0), whole[8000:])


def damaged(folder, kind):
    path, wave = folder / "a.wav", tone(0.5)
    if kind == "not numbers":
        wave[100] = np.nan
    if kind == "infinite":
        wave[100] = np.inf
    if kind == "no samples":
        wave = wave[:0]
    if kind == "too long":
        wave = np.zeros(201 * 1000)
    sf.write(path, wave, 1000 if kind == "too long" else 16000, subtype="FLOAT")
    if kind == "corrupt":
        path.write_bytes(b"RIFF" + bytes(range(256)) * 4)
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "text":
        path.write_text("This is not audio.\n" * 20)
    if kind == "missing":
        path.unlink()
    if kind == "a folder":
        path.unlink(), path.mkdir()
    if kind == "rate":
        path.write_bytes(path.read_bytes()[:24] + (3).to_bytes(4, "little")
                         + path.read_bytes()[28:])
    return str(path)


@pytest.mark.parametrize("kind, words", [
    ("not numbers", "not numbers"), ("infinite", "not numbers"), ("no samples", "no samples"),
    ("too long", "201 s of audio, the limit is 200 s"), ("corrupt", "not a readable audio file"),
    ("empty", "not a readable audio file"), ("text", "not a readable audio file"),
    ("missing", "no such file"), ("a folder", "not a readable audio file"), ("rate", "3 Hz")])
def test_damaged_audio_is_told_in_one_line(tmp_path, kind, words):
    path = damaged(tmp_path, kind)
    with pytest.raises(BadInput, match=words) as error:
        read_wave(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_frames_are_known_from_the_header(tmp_path):
    """Slots are counted from the header, filled from the samples: they must never differ."""
    rng = random.Random(0)
    for rate, odd in itertools.product((8000, 16000, 22050, 24000, 44100, 48000), (0, 1, -1)):
        path = str(tmp_path / f"{rate}{odd}.wav")
        sf.write(path, tone(1, rate)[:rate * 57 // 100 + odd], rate)
        start = rng.randint(0, 20) / 100
        for end in (None, 0.41, 0.3 + rng.random() / 4, 7.0):
            assert data.frames_of(path, start, end) == len(data.features(path, 80, start, end))


def test_a_hundredth_of_a_second_is_too_short(wav):
    assert data.features(wav(0.05), 80).shape == (5, 80)
    with pytest.raises(BadInput, match="too short"):
        data.features(wav(0.012), 80)


def test_written_waves_are_16_bit_and_whole(tmp_path):
    wave = torch.tensor([0.0, 0.5, -0.5, 2.0, -2.0])
    data.write_wave(str(tmp_path / "a.wav"), wave, 24000)
    got, rate = sf.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 24000 and sf.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert np.abs(got - np.array([0, 16384, -16384, 32767, -32768])).max() <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    with pytest.raises(BadInput, match="cannot be written"):
        data.write_wave(str(tmp_path / "no" / "a.wav"), wave, 24000)


def test_spec_augment_masks_little_and_copies_the_past():
    mel = torch.arange(1.0, 301)[:, None].repeat(1, 80)
    for seed in range(20):
        got = data.spec_augment(mel, random.Random(seed))
        assert torch.equal(got, data.spec_augment(mel, random.Random(seed)))
        rows = (got == 0).all(1).sum()
        assert rows <= 100 + 60 and (got == 0).all(0).sum() <= 20
        assert (got <= mel).all()  # what is not masked is as it was, or from earlier
    assert mel.min() == 1 and data.spec_augment(mel[:3], random.Random(0)).shape == (3, 80)


# ---- lists and batches -------------------------------------------------------------------------

def test_records(tmp_path):
    path = write_list(tmp_path / "l.jsonl", [
        {"txt": "a", "task": "<TEXT2TEXT>", "extra": None},
        {"txt": "b", "task": "<S2TCHAT>", "wav": "w/1.wav", "extra": {
            "reply_wav": "/abs/r.wav", "history": [{"wav": "w/0.wav", "txt": "c"}]}}])
    with open(path, "a") as f:
        f.write("\n")
    first, second = data.records(path)
    assert first["extra"] == {} and second["wav"] == str(tmp_path / "w/1.wav")
    assert second["extra"]["reply_wav"] == "/abs/r.wav"
    assert second["extra"]["history"][0]["wav"] == str(tmp_path / "w/0.wav")


@pytest.mark.parametrize("line", ["{", "[1]", "3", "null", '"task txt"', "a.tar.gz"])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = write_list(tmp_path / "l.jsonl", [{"txt": "", "task": ""}] * 2)
    with open(path, "a") as f:
        f.write(line + "\n")
    with pytest.raises(BadInput, match=r"l\.jsonl:3: not a JSON record"):
        list(data.records(path))


def test_unreadable_lists(tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b'{"txt": "\xff"}')
    for path, words in ((tmp_path / "l.jsonl", "not UTF-8"), (tmp_path / "no", "No such file")):
        with pytest.raises(BadInput, match=words):
            list(data.records(str(path)))


@pytest.fixture
def dialogues(tmp_path, wav):
    """A raw list of everything that a shard has to carry."""
    return write_list(tmp_path / "raw.jsonl", [
        {"key": "a.1", "txt": "hello", "task": "<TRANSCRIBE>", "wav": wav(0.3)},
        {"key": "b", "txt": "h\u00e9", "task": "<S2TCHAT> <TEXT2TOKEN>", "wav": wav(1.0),
         "start": 0.25, "end": 0.75, "extra": {
             "age": "<OLD>", "reply_wav": wav(0.5), "speech_token": [1, 2], "history": [
                 {"wav": wav(0.3, 100), "txt": "one", "speech_token": [3]},
                 {"wav": wav(0.5), "txt": "two"}]}},
        {"key": "c", "txt": "hi", "task": "<TEXT2TEXT>", "extra": {"question": "hello"}},
        {"key": "d", "txt": "gone", "task": "<TRANSCRIBE>", "wav": "gone.wav"},
        {"key": "e", "txt": "no task"}])


def pcm(turn):
    return read_wave(turn["wav"], start=turn.get("start", 0.0), end=turn.get("end"))


def test_shards_hold_what_the_raw_list_says(tmp_path, dialogues, monkeypatch, capsys):
    command(monkeypatch, "shards", dialogues, "--out", tmp_path / "s", "--size", 2)
    assert json.loads(capsys.readouterr().out) == {"written": 3, "no such file": 1, "no task": 1}
    listed = tmp_path / "s" / "shards_list.txt"
    assert listed.read_text().split() == [f"shard_0000{i}.tar" for i in range(3)]
    assert tarfile.open(tmp_path / "s/shard_00000.tar").getnames() == [
        "a.1.task", "a.1.txt", "a.1.wav", "a.1.extra", "b.task", "b.txt", "b.wav", "b.txt_1",
        "b.wav_1", "b.txt_2", "b.wav_2", "b.extra"]
    raw, got = list(data.records(dialogues))[:3], list(data.records(str(listed)))
    assert [(r["key"], r["txt"], r["task"]) for r in raw] == [
        (r["key"], r["txt"], r["task"]) for r in got]
    for a, b in zip(raw[:2], got):
        assert torch.equal(pcm(a), pcm(b)) and "start" not in b
        assert data.frames_of(b["wav"]) == len(data.features(b["wav"], 80))
    assert os.path.samefile(got[1]["extra"]["reply_wav"], raw[1]["extra"]["reply_wav"])
    for a, b in zip(raw[1]["extra"].pop("history"), got[1]["extra"].pop("history"), strict=True):
        assert a["txt"] == b["txt"] and torch.equal(pcm(a), pcm(b))
        assert b["speech_token"] == a.get("speech_token", [])
    del raw[1]["extra"]["reply_wav"], got[1]["extra"]["reply_wav"]
    assert [r["extra"] for r in raw] == [r["extra"] for r in got]
    assert data.count(str(listed)) == 6  # three shards, as long as the first
    assert len(list(data.records(str(tmp_path / "s/shard_00000.tar"), skip=1))) == 1


def test_shards_of_floats_of_nothing_and_of_one_key(tmp_path, wav, monkeypatch, capsys):
    wave = read_wave(wav(0.5))
    sf.write(tmp_path / "float.wav", wave.numpy(), 16000, "FLOAT")
    row = {"key": "a", "txt": "hi", "task": "<TRANSCRIBE>", "wav": "float.wav"}
    path = write_list(tmp_path / "l.jsonl", [
        row, row | {"txt": "ho"}, row | {"key": "b", "start": 0.4, "end": 0.1}])
    command(monkeypatch, "shards", path, "--out", tmp_path / "s")
    assert json.loads(capsys.readouterr().out) == {"written": 3}
    one, other, empty = data.records(str(tmp_path / "s/shard_00000.tar"))
    assert [r["txt"] for r in (one, other)] == ["hi", "ho"] and len({one["key"], other["key"]}) == 2
    assert (read_wave(other["wav"]) - wave).abs().max() < 1e-3 and wave.abs().max() > 0.1
    with pytest.raises(BadInput):
        data.usable(empty)


def test_an_epoch_of_shards_begins_with_any_of_them(tmp_path, wav, monkeypatch):
    path = write_list(tmp_path / "l.jsonl", [
        {"key": f"{i}", "txt": "hi", "task": "<TRANSCRIBE>", "wav": wav(0.3)} for i in range(12)])
    command(monkeypatch, "shards", path, "--out", tmp_path / "s", "--size", 2)
    listed, starts = str(tmp_path / "s/shards_list.txt"), set()
    for seed in range(9):
        source = Source(listed, 1.0, lambda r, *_: SimpleNamespace(
            kind="", length=1, key=r["key"]), 4, seed, window=4)
        window = [s.key for batch in itertools.islice(source.batches(), 1) for s in batch]
        starts.add(min(map(int, window)))
        assert sorted(map(int, window)) == [*range(min(map(int, window)), max(map(int, window)) + 1)]
    assert len(starts) > 1 and starts <= {0, 4, 8}


def test_combine_lists_take_the_words_of_the_jsonl(tmp_path, dialogues, monkeypatch):
    command(monkeypatch, "shards", dialogues, "--out", tmp_path)
    labels = write_list(tmp_path / "labels.jsonl", [
        {"key": "a.1", "txt": "new", "task": "<AGE>", "wav": "elsewhere.wav", "extra": {"age": 1}},
        {"key": "b", "txt": "as in fake_data, without a task"}])
    combine = tmp_path / "combine.txt"
    combine.write_text(f"labels.jsonl|shard_00000.tar\n-|{tmp_path}/shard_00000.tar\ngone.tar\n")
    got = list(data.records(str(combine)))
    own = list(data.records(str(tmp_path / "shard_00000.tar")))
    assert got[0] == {"key": "a.1", "txt": "new", "task": "<AGE>", "extra": {"age": 1},
                      "wav": own[0]["wav"]}
    assert [r.get("bad") for r in got] == [None, "no task", "not in the jsonl", None, None, None,
                                           "no such shard"]
    assert got[3:6] == own and labels  # "-": the tar's own words
    monkeypatch.chdir(tmp_path)  # released lists are relative to where one is
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/list.txt").write_text("shard_00000.tar\n")
    assert len(list(data.records("conf/list.txt"))) == 3
    for name in ("conf/list.txt", "shard_00000.tar"):  # and their audio is found
        assert all(data.frames_of(r["wav"]) > 0 for r in data.records(name) if r.get("wav"))


def test_a_name_that_is_no_utf8_is_told(tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/bad\xff.wav")
    open(name, "wb").close()
    with pytest.raises(BadInput, match="not a readable audio file"):
        read_wave(name)


def test_damaged_shards_are_rejects(tmp_path, dialogues, monkeypatch):
    command(monkeypatch, "shards", dialogues, "--out", tmp_path)
    whole = (tmp_path / "shard_00000.tar").read_bytes()
    at = whole.index(b"a.1.extra") + 512
    (tmp_path / "shard_00000.tar").write_bytes(whole[:at] + b"3 " + whole[at + 2:])
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "list.txt").write_text("shard_00000.tar\ncut.tar\n")
    one = Source(str(tmp_path / "list.txt"), 1, lambda r, *_: sample(1, r["key"]), 9, 0)
    assert [s.name for s in next(one.batches())] == ["b", "c"]
    assert one.state["rejected"] == {"extra is not JSON": 1, "damaged shard": 1}


def test_a_long_list_is_counted_by_parts_of_it(tmp_path):
    with open(tmp_path / "l", "w") as f:
        f.writelines(" " * (i % 200) + "\n" for i in range(1_000_000))  # 100 MB
    assert abs(data.count(str(tmp_path / "l")) / 1e6 - 1) < 0.02
    short = write_list(tmp_path / "s", [{"a": i} for i in range(1000)])
    assert data.count(short) == 1000


def sample(length, name=None, kind="tts"):
    return SimpleNamespace(length=length, name=name, kind=kind)


def test_batches_keep_to_the_budget():
    rng = random.Random(0)
    samples = [sample(rng.randint(1, 60), i, "ab"[i % 2]) for i in range(300)]
    samples += [sample(500, 300)]
    batches = cut_batches(samples, 200)
    assert sorted(s.name for b in batches for s in b) == list(range(301))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(s.length for s in batch) <= 200
        assert len({s.kind for s in batch}) == 1
    used = sum(s.length for s in samples) / sum(
        len(b) * max(s.length for s in b) for b in batches)
    assert used > 0.92  # pads are under 8 % of what is computed
    assert cut_batches([], 200) == []


def make(record, epoch, rng):
    n = record["n"]
    return "a seven" if n % 10 == 7 else sample(2 + n % 5, f"{record['txt']}{n} {epoch}")


def source(folder, name, n=23, weight=1.0, window=10):
    path = write_list(folder / name, [{"txt": name, "task": "t", "n": i} for i in range(n)])
    return Source(path, weight, make, 12, 5, window)


def collate(batch, seed):
    return tuple(s.name for s in batch), seed


def take(mixture, n):
    return list(itertools.islice(mixture, n))


def test_an_epoch_has_every_record_once_and_counts_the_rest(tmp_path):
    one = source(tmp_path, "a")
    names = []
    for batch in one.batches():
        if one.state["epoch"] == 3:
            break
        names += [s.name for s in batch]
    want = [f"a{i} {epoch}" for epoch in range(3) for i in range(23) if i % 10 != 7]
    assert sorted(names) == sorted(want) and names != want
    assert one.state["rejected"]["a seven"] >= 6  # records 7 and 17, three times


def test_an_epoch_begins_anywhere(tmp_path):
    """A short run of one stage and of the next do not meet the same records of a long list."""
    path = write_list(tmp_path / "l", [{"txt": "a", "task": "t", "n": 10 * i} for i in range(40)])
    begun, sizes = set(), []
    for seed in range(12):
        one, names = Source(path, 1, make, 12, seed, window=10), []
        for batch in one.batches():
            if one.state["epoch"]:
                break
            names += [int(s.name[1:-2]) // 100 for s in batch]  # the window of each
        begun.add(names[0])
        sizes.append(Counter(names))
        assert names == sorted(names, key=lambda n: (n - names[0]) % 4)
    assert len(begun) == 4 and all(size == dict.fromkeys(range(4), 10) for size in sizes)


def test_the_same_seed_gives_the_same_batches_and_another_one_others(tmp_path):
    def run(seed):
        return take(Mixture([source(tmp_path, "a"), source(tmp_path, "b", 7)], collate, seed), 40)
    assert run(1) == run(1) != run(2)


def test_a_mixture_goes_on_from_any_state(tmp_path):
    def fresh(state=None):
        return Mixture([source(tmp_path, "a"), source(tmp_path, "b", 7, 2.0)], collate, 3,
                       state=state)
    whole = take(fresh(), 60)
    for at in (0, 1, 7, 20, 44):
        state = json.loads(json.dumps(whole[at][1]))
        assert take(fresh(state), 60 - at - 1) == whole[at + 1:]


def test_ranks_share_the_batches_of_one_source(tmp_path):
    def run(rank, world, n, state=None):
        sources = [source(tmp_path, "a"), source(tmp_path, "b")]
        return take(Mixture(sources, collate, 3, rank, world, state), n)
    ranks = [run(rank, 3, 40) for rank in range(3)]
    for row in zip(*ranks):
        assert len({batch[0][0][0] for (batch, _) in row}) == 1  # the same list at the same time
        assert row[0][1] == row[1][1] == row[2][1]  # the state does not depend on the rank
    names = Counter(name for rank in ranks for (batch, _), _ in rank for name in batch)
    assert max(names.values()) == 1  # nothing twice, in any epoch
    # Going on with another number of ranks repeats nothing and leaves nothing out.
    state = ranks[0][4][1]
    seen = {n for rank in ranks for (batch, _), _ in rank[:5] for n in batch}
    later = [n for (batch, _), _ in run(0, 1, 30, state) for n in batch]
    assert not seen & set(later) and len(later) == len(set(later))


def test_ranks_draw_one_kind(tmp_path):
    """But for what a window leaves over; what is drawn does not repeat or drop a record, also if
    it goes on with another number of ranks."""
    def fresh(rank, world, state=None):
        one = source(tmp_path, "a", 200, window=100)
        one.make = lambda r, epoch, rng: sample(3, r["n"], "abc"[r["n"] % 3])
        return Mixture([one], lambda batch, seed: ([s.name for s in batch], batch[0].kind), 3, rank,
                       world, state)
    ranks = [take(fresh(rank, 3), 16) for rank in range(3)]  # 48 of the 51 batches
    alike = [len({kind for (_, kind), _ in row}) == 1 for row in zip(*ranks)]
    assert sum(alike) >= 12 and len({kind for (_, kind), _ in ranks[0]}) == 3
    seen = [n for rank in ranks for (names, _), _ in rank[:7] for n in names]
    rest = [n for (names, _), state in take(fresh(0, 1, ranks[0][6][1]), 60) for n in names
            if not state["sources"][0]["epoch"]]
    assert sorted(seen + rest) == list(range(200))


def test_mixing_keeps_its_weights_when_an_epoch_ends(tmp_path):
    mixture = Mixture([source(tmp_path, "a", 40, 3.0), source(tmp_path, "b", 5, 1.0)], collate, 0)
    lists = [batch[0][0] for (batch, _), _ in take(mixture, 800)]
    for part in (lists[:400], lists[400:]):  # b ends after 2 batches, a after 10: many times
        assert 0.19 < part.count("b") / 400 < 0.31


def test_workers_do_not_change_the_order(tmp_path):
    def run(workers):
        mixture = Mixture([source(tmp_path, "a"), source(tmp_path, "b")], collate, 3)
        loader = torch.utils.data.DataLoader(mixture, None, num_workers=workers)
        return list(itertools.islice(loader, 25))
    assert run(0) == run(2)


def test_a_list_of_nothing_is_an_error(tmp_path):
    for n in (0, 1):
        path = write_list(tmp_path / "l", [{"txt": "a", "task": "t", "n": 7}] * n)
        with pytest.raises(BadInput, match="no usable record"):
            next(Source(path, 1, make, 12, 0).batches())


def test_an_unreadable_file_is_a_reject(tmp_path):
    def picky(record, epoch, rng):
        if record["n"] < 3:
            data.seconds_of(str(tmp_path / "none.wav"))
        return sample(3, record["n"])
    one = source(tmp_path, "a", 6)
    one.make = picky
    assert sorted(s.name for s in next(one.batches())) == [3, 4, 5]
    assert one.state["rejected"] == {"no such file": 3}


# ---- commands ----------------------------------------------------------------------------------

def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
    data.main()


def test_tokens(tmp_path, wav, checkpoint, monkeypatch):
    rows = [{"txt": "hello", "task": "<TEXT2TOKEN>", "wav": wav(0.3)},
            {"txt": "hello", "task": "<S2TCHAT> <TEXT2TOKEN>", "wav": wav(0.5),
             "extra": {"reply_wav": wav(0.41, 150, 24000), "age": "<OLD>"}},
            {"txt": "hello", "task": "<TRANSCRIBE>", "wav": wav(0.5)},
            {"txt": "hello", "task": "<TEXT2TOKEN>", "wav": wav(0.5),
             "extra": {"speech_token": [1]}},
            {"txt": "hello", "task": "<TEXT2TEXT>", "extra": {"question": "hi"}}]
    path = write_list(tmp_path / "l.jsonl", rows)
    command(monkeypatch, "tokens", path, "--model", checkpoint)
    got, s3 = [json.loads(line) for line in open(path)], load_s3(str(checkpoint))
    for row, spoken in ((0, wav(0.3)), (1, wav(0.41, 150, 24000))):
        mel = data.features(spoken, 80)
        codes = got[row]["extra"].pop("speech_token")
        assert codes == s3.encode(mel[None], torch.tensor([len(mel)]))[0][0].tolist()
        assert len(codes) == -(-len(mel) // 4)
    assert got == [rows[0] | {"extra": {}}] + rows[1:]  # and nothing else has changed
    assert [p.name for p in tmp_path.iterdir()] == ["l.jsonl"]


def test_tokens_of_a_part_of_a_file_and_of_earlier_turns(tmp_path, wav, checkpoint, monkeypatch,
                                                         capsys):
    past = [{"wav": wav(0.5), "txt": "hi", "reply_wav": wav(0.41, 150, 24000)}]
    path = write_list(tmp_path / "l.jsonl", [
        {"txt": "a", "task": "<TEXT2TOKEN>", "wav": wav(1.0), "start": 0.2, "end": 0.6},
        {"txt": "a", "task": "<S2TCHAT>", "wav": wav(0.5), "extra": {"history": past}},
        {"txt": "a", "task": "<TEXT2TOKEN>", "wav": "gone.wav"}])
    command(monkeypatch, "tokens", path, "--model", checkpoint)
    assert json.loads(capsys.readouterr().out) == {"no such file": 1, "written": 2}
    part, old, gone = data.records(path)
    s3 = load_s3(str(checkpoint))
    for said, clip in ((part["extra"], (wav(1.0), 0.2, 0.6)),
                       (old["extra"]["history"][0], (wav(0.41, 150, 24000), 0, None))):
        mel = data.features(clip[0], 80, *clip[1:])
        want = s3.encode(mel[None], torch.tensor([len(mel)]))[0][0].tolist()
        assert said["speech_token"] == want
    assert len(part["extra"]["speech_token"]) == 10 and "speech_token" not in gone["extra"]
    command(monkeypatch, "tokens", path, "--model", checkpoint)  # once more: all is there
    assert json.loads(capsys.readouterr().out) == {"no such file": 1, "were there": 2}


def test_tokens_leave_what_they_cannot_read(tmp_path, wav, checkpoint, monkeypatch, capsys):
    path = tmp_path / "l.jsonl"
    rows = [{"txt": "a", "task": "<TEXT2TOKEN>", "wav": wav(0.3), "extra": "{"},
            {"txt": "a", "task": "<TEXT2TOKEN>", "wav": wav(0.3), "end": float("inf")},
            {"txt": "a", "task": "<TEXT2TOKEN>", "wav": wav(0.3), "turns": 2},
            {"txt": "a", "task": "<TEXT2TOKEN>", "wav": wav(0.3), "start": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(monkeypatch, "tokens", path, "--model", checkpoint)
    assert json.loads(capsys.readouterr().out) == {"not a readable audio file": 1, "written": 2}
    got = [json.loads(line) for line in open(path)]
    assert got[:2] == rows[:2] and all(len(r["extra"]["speech_token"]) == 8 for r in got[2:])


@pytest.mark.parametrize("words", [["answer", "x", "--model", "m", "--batch", 0],
                                   ["shards", "x", "--size", 0], ["build", "--jobs", "-1"]])
def test_nothing_at_a_time_is_one_line(words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *words, "--out", tmp_path / "out")
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokens_go_on_after_a_stop(tmp_path, wav, checkpoint, monkeypatch):
    rows = [{"txt": "a", "task": "<TEXT2TOKEN>", "wav": wav(0.3 + i / 20)} for i in range(20)]
    path, whole = (write_list(tmp_path / name, rows) for name in ("l.jsonl", "whole.jsonl"))
    command(monkeypatch, "tokens", whole, "--model", checkpoint)
    encode, seen = data.pad_stack, []

    def stack(mels, *more):
        if seen and not resumed:
            raise KeyboardInterrupt
        seen.extend(mels)
        return encode(mels, *more)
    monkeypatch.setattr(data, "pad_stack", stack)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, "tokens", path, "--model", checkpoint)
    assert open(path).read() == "".join(json.dumps(r) + "\n" for r in rows) and len(seen) == 16
    resumed = True
    command(monkeypatch, "tokens", path, "--model", checkpoint)
    assert len(seen) == 20 and open(path).read() == open(whole).read()
    assert not list(tmp_path.glob("*.part"))


def test_voice(tmp_path, wav, checkpoint, monkeypatch):
    import model
    cfg = model.load_config(str(checkpoint))
    out = tmp_path / "v.safetensors"
    command(monkeypatch, "voice", wav(0.5, rate=24000), wav(0.3), "--model", checkpoint,
            "--out", out)
    voice = read_weights(str(out))
    assert voice["prompt_codes"].shape == (1, 12) and voice["prompt_mel"].shape == (1, 48, 80)
    assert voice["spk"].shape == (1, cfg.flow.spk_dim) and voice["spk"].isfinite().all()
    wave, _ = (speaker := model.load_token2wav(str(checkpoint), str(out))).stream(
        [1, 2, 3], speaker.start(), final=True)
    assert wave.shape == (3 * 960,)


def test_pseudo_labels(tmp_path, wav, checkpoint, monkeypatch, capsys):
    """What is known stays; what is not is what the model writes when asked for it alone."""
    rows = [{"txt": "hello<OLD>", "task": "<TRANSCRIBE> <AGE>", "wav": wav(0.5)},
            {"txt": "<SORRY>hi", "task": "<S2TCHAT>", "wav": wav(1.0), "start": 0.2, "end": 0.8,
             "extra": {"age": "<CHILD>", "gender": None, "emotion": "<SORRY>"}},
            {"txt": "<SAD>", "task": "<EMOTION>", "wav": wav(0.4, 300)},
            {"txt": "hi", "task": "<TEXT2TEXT>", "extra": {"question": "hello"}},
            {"txt": "hi", "task": "<TRANSCRIBE>", "wav": "gone.wav"},
            {"txt": "hi", "task": "<TRANSCRIBE>"}]
    path, out = write_list(tmp_path / "l.jsonl", rows), tmp_path / "new" / "out.jsonl"
    out.parent.mkdir()

    def run(threshold):
        command(monkeypatch, "pseudo-label", path, "--model", checkpoint, "--out", out,
                "--threshold", threshold)
        return json.loads(capsys.readouterr().out), list(data.records(str(out)))
    counts, (asr, chat, only, text) = run(0)
    assert counts == {"age kept": 1, "gender kept": 3, "emotion kept": 2, "event kept": 3,
                      "written": 4, "no such file": 1, "no wav": 1}
    model, tok = load_echat(str(checkpoint)), Tokenizer(str(checkpoint))
    mel = data.features(wav(0.5), 80)
    sure = asr["extra"]["confidence"]
    assert list(sure) == ["gender", "emotion", "event"]
    for name in sure:  # by the slow way: the probability of each answer, one forward each
        ask = prompt("understand", tok, model.cfg.decoder, 7, user_prompt([name]))
        ends = [[*tok.encode(f"<{v}>"), tok.im_end] for v in data.LABELS[name]]
        heard = model.hear(mel[None], torch.tensor([len(mel)]))
        each = torch.stack([-model(torch.tensor([ask + end]), heard,
                                   targets=torch.tensor([[-100] * len(ask) + end]))[1].sum()
                            for end in ends]).softmax(0)
        assert sure[name] == pytest.approx(each.max().item(), abs=1e-3)
        assert f"<{data.LABELS[name][each.argmax()]}>" in asr["txt"]
    assert asr["txt"].startswith("hello<OLD><") and os.path.samefile(asr["wav"], wav(0.5))
    assert asr["task"] == "<TRANSCRIBE> <AGE> <GENDER> <EMOTION> <EVENT>"
    assert chat["txt"] == "<SORRY>hi" and chat["extra"]["age"] == "<CHILD>"
    assert chat["extra"]["q_emotion"][1:-1] in data.LABELS["emotion"] and chat["start"] == 0.2
    assert only["task"] == "<AGE> <GENDER> <EMOTION> <EVENT>" and "<SAD>" in only["txt"]
    assert text == rows[3]
    _, (asr, chat, *_) = run(1.1)  # sure of nothing: unknown, to be left out of the loss
    assert asr["txt"] == "hello<OLD><&&><&&><&&>" and chat["extra"]["gender"] == "<&&>"


@pytest.fixture
def speaker(monkeypatch, tok):
    """EChat.answers of a model that says what it is told to: by the length of what it hears, the
    text (whether it ends, too) and the codes. `asked` keeps the questions of every batch."""
    says, asked = {}, []

    def answers(self, own, task, questions, **options):
        assert not options  # thinks, all text first, with the sampling of the checkpoint
        asked.append((task, questions))
        for row, (mel, _, _) in enumerate(questions):
            text, codes = says[len(mel)]
            for token in [*tok.encode(text), tok.im_end]:
                yield row, "text", token
            for code in [40, *codes, 40] if task == "s2s" and codes is not None else ():
                yield row, "speech", code
    monkeypatch.setattr(EChat, "answers", answers)
    return says, asked


def test_answers_of_the_model_itself(tmp_path, wav, checkpoint, monkeypatch, capsys, speaker):
    """Text and codes are what it says after its think, in batches, and go to the same stage as the
    list it comes from; all else is counted; a stopped run goes on where it was."""
    says, asked = speaker
    says |= {50: ("<think>a<think end><SAD>oh dear", [1, 2]), 30: ("<think>b<think end>hi", None),
             40: ("hm", [1]), 60: ("<think><think end><SAD> ", [1]), 70: ("<think end>a", []),
             80: ("<think end>a", None)}
    old = {"q_txt": "hm", "age": "<OLD>", "emotion": "<HAPPY>", "reply_wav": wav(1.0),
           "think_str": "so", "speech_token": [7]}
    spoken = [{"key": str(s), "txt": "x", "task": "<S2TCHAT> <TEXT2TOKEN>", "wav": wav(s),
               "extra": old} for s in (0.5, 0.4, 0.6, 0.7, 0.8)]
    written = {"txt": "x", "task": "<S2TCHAT>", "wav": wav(1.0), "start": 0.2, "end": 0.5,
               "extra": {"history": [{"wav": wav(0.5), "txt": "yes", "speech_token": [3]}]}}
    rows = [*spoken, written, {"txt": "x", "task": "<TRANSCRIBE>", "wav": wav(0.5)},
            {"txt": "x", "task": "<S2TCHAT>"}, {"txt": "x", "task": "<S2TCHAT>", "wav": "gone.wav"}]
    path, out = write_list(tmp_path / "l.jsonl", rows), tmp_path / "own.jsonl"
    words = ["answer", path, "--model", checkpoint, "--out", out, "--batch", 6]
    command(monkeypatch, *words)
    whole, counts = out.read_text(), json.loads(capsys.readouterr().out)
    assert counts == {"written": 2, "no think": 1, "an empty reply": 2, "a reply without end": 1,
                      "no spoken dialogue": 1, "no wav": 1, "no such file": 1}
    assert [(task, len(questions)) for task, questions in asked] == [("s2s", 5), ("s2t", 1)]
    (mel, text, [turn]), = asked[1][1]
    assert text == "" and turn[1:] == ("yes", [3]) and len(turn[0]) == 50 and len(mel) == 30
    one, two = data.records(str(out))
    assert one["txt"] == "<SAD>oh dear" and one["key"] == "0.5" and two["txt"] == "hi"
    assert os.path.samefile(one["wav"], wav(0.5)) and two["start"] == 0.2
    assert one["extra"] == {"q_txt": "hm", "age": "<OLD>", "emotion": "<SAD>",
                            "own_think": "<think>a<think end>", "speech_token": [1, 2]}
    assert "speech_token" not in two["extra"] and two["extra"]["emotion"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.jsonl", "own.jsonl"]

    def dies(*given):  # in the second batch: the first and half a line of the next remain
        if asked:
            raise KeyboardInterrupt
        yield from answers(*given)
    answers = EChat.answers
    asked.clear()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(EChat, "answers", dies)
        command(monkeypatch, *words[:-1], 5)
    part, = tmp_path.glob("own.jsonl.*.part")
    with open(part, "a") as f:
        f.write('[["wri')
    asked.clear()
    command(monkeypatch, *words[:-1], 5)
    assert [len(questions) for _, questions in asked] == [1]  # only the one that was not written
    assert out.read_text() == whole and not part.exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == counts
    part.write_text('[["written"], {}]\n')  # of a list that was another one
    os.utime(path, (1, 1))
    command(monkeypatch, *words)
    assert out.read_text() == whole


def test_random_weights_answer_nothing(tmp_path, wav, checkpoint, monkeypatch, capsys):
    rows = [{"txt": "x", "task": "<S2TCHAT> <TEXT2TOKEN>", "wav": wav(s)} for s in (0.5, 0.7)]
    path, out = write_list(tmp_path / "l.jsonl", rows), tmp_path / "own.jsonl"
    command(monkeypatch, "answer", path, "--model", checkpoint, "--out", out)
    assert json.loads(capsys.readouterr().out) == {"no think": 2} and out.read_text() == ""


def fake_onnxruntime(monkeypatch, seen: list):
    """A speaker model that says 192 numbers and keeps what it heard."""
    def run(names, feed):
        seen.append(feed["feats"])
        return [np.arange(192.0, dtype=np.float32)[None]]

    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="feats")], run=run)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(
        InferenceSession=lambda path, providers: session))


def test_voice_for_the_released_weights(tmp_path, wav, monkeypatch):
    s3, s3_file, seen = SpeechTokenizer(TokenizerConfig(8, 64, 1, 1, 2, 1, codes=40)), \
        str(tmp_path / "s3.safetensors"), []
    state = {f"encoder.{k}": v for k, v in s3.state_dict().items() if "codebook" not in k}
    book = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1)
    save_weights(s3_file, state | {"quantizer._codebook.embed": book})
    fake_onnxruntime(monkeypatch, seen)
    speaker, out = tmp_path / "campplus.onnx", str(tmp_path / "voice.safetensors")
    speaker.write_bytes(b"onnx")
    command = ["data.py", "voice", wav(2.0, rate=22050), "--s3", s3_file, "--speaker",
               str(speaker), "--out", out]
    for rate, codes in ((25, 50), (50, 100)):
        monkeypatch.setattr(sys, "argv", command + ["--rate", str(rate)])
        data.main()
        voice = read_weights(out)
        assert voice["prompt_codes"].shape == (1, codes) and voice["prompt_codes"].max() < 40
        assert voice["prompt_mel"].shape == (1, 44100 // 256, 80)
        assert voice["spk"].tolist() == [list(range(192))]
    assert seen[0].shape == (1, 198, 80) and abs(seen[0].mean()) < 1e-4


def test_voice_of_our_own_for_the_released_codes(tmp_path, wav, checkpoint, monkeypatch):
    """As for small: its codes are S3 v1's, its flow and vocoder may be ours."""
    s3, out = SpeechTokenizer(TokenizerConfig(8, 64, 1, 1, 2, 1, codes=40)), tmp_path / "v"
    state = {f"encoder.{k}": v for k, v in s3.state_dict().items() if "codebook" not in k}
    book = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1)
    save_weights(str(tmp_path / "s3.safetensors"), state | {"quantizer._codebook.embed": book})
    bare = copy_of(checkpoint, tmp_path / "bare")
    (bare / "tokenizer_s3.safetensors").unlink()
    command(monkeypatch, "voice", wav(2.0), "--model", bare, "--s3", tmp_path / "s3.safetensors",
            "--out", out)
    voice = read_weights(str(out))
    assert voice["prompt_codes"].shape == (1, 50) and voice["prompt_mel"].shape == (1, 200, 80)
    assert voice["spk"].shape == (1, 8)


def test_released_voice_ends_with_one_line(tmp_path, wav, monkeypatch, capsys):
    good, speaker, html = wav(2.0), tmp_path / "campplus.onnx", tmp_path / "s3.pt"
    speaker.write_bytes(b"onnx")
    html.write_text("<html>")
    out = ["--out", str(tmp_path / "voice.safetensors")]
    files = ["--s3", str(html), "--speaker", str(speaker)]
    cases = [([good, *out], "or one wav and --s3 and --speaker"),
             ([good, good, *files, *out], "or one wav and --s3 and --speaker"),
             ([wav(31.0), *files, *out], "31.00 s, a prompt has 0.1 to 30 s"),
             ([good, *files, *out], "s3.pt: "),
             ([good, "--s3", str(html), "--speaker", "gone.onnx", *out], "gone.onnx: no such file")]
    fake_onnxruntime(monkeypatch, [])
    for arguments, words in cases + [([good, *files, *out], "install onnxruntime")]:
        if "onnxruntime" in words:
            monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(sys, "argv", ["data.py", "voice", *arguments])
        with pytest.raises(SystemExit) as e:
            data.main()
        error = capsys.readouterr().err
        assert e.value.code == 2 and words in error and error.count("\n") == 1


def test_tokenizer_knows_the_protocol(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("Hello there.\nHow are you?\n")
    command(monkeypatch, "tokenizer", "--text", tmp_path / "t.txt", "--vocab", 600, "--out",
            tmp_path)
    tok = Tokenizer(str(tmp_path))
    assert tok.n_vocab <= 600 and b"&&" in map(tok.bytes_of, tok.unknown)
    assert len(tok.encode("<think end>")) < 6
    data.train_tokenizer(["hello"], 280, str(tmp_path))  # too few merges for `&&`
    tok = Tokenizer(str(tmp_path))
    assert tok.decode([i for i in tok.encode("a <&&> b") if i in tok.unknown]) == "&&"


def test_check(tmp_path, wav, monkeypatch, capsys):
    """It says what training would: the same reasons, the hours of what is used."""
    path = write_list(tmp_path / "l.jsonl", [
        {"txt": "a<OLD><&&>", "task": "<TRANSCRIBE> <AGE> <EMOTION>", "wav": wav(0.5)},
        {"txt": "a", "task": "<S2TCHAT>", "wav": wav(60.0), "start": 1, "end": 37,
         "extra": {"q_emotion": "<ANGRY>"}},
        {"txt": "a", "task": "<TRANSCRIBE>", "wav": "none.wav"},
        {"txt": "a", "task": "<S2TCHAT> <TEXT2TOKEN>", "wav": wav(0.5)},
        {"txt": "a", "task": "<STYLE>", "wav": wav(0.5)},
        {"txt": "a", "task": "<S2TCHAT>", "wav": wav(0.5), "extra": {"history": [1]}},
        {"txt": "a", "task": "<TRANSCRIBE>"}, {"txt": " ", "task": "<TEXT2TEXT>"}])
    command(monkeypatch, "check", path)
    found = json.loads(capsys.readouterr().out.removeprefix(path))
    assert found["records"] == 8 and found["hours"] == 0.01 and found["tasks"]["<TRANSCRIBE>"] == 2
    assert found["problems"] == {
        "no txt": 1, "no such file": 1, "no wav": 1, "no speech_token": 1,
        "unknown task <STYLE>": 1,
        "a path or the history is malformed": 1}
    assert found["labels"] == {"age OLD": 1, "emotion ANGER": 1}


def test_commands_end_with_one_line(tmp_path, wav, checkpoint, monkeypatch, capsys):
    path = write_list(tmp_path / "l.jsonl", [{"txt": "a", "task": "<TEXT2TOKEN>", "wav": "no.wav"}])
    broken = copy_of(checkpoint, tmp_path / "c")
    (broken / "tokenizer_s3.safetensors").write_bytes(b"")
    shards = tmp_path / "shards.txt"
    shards.write_text("gone.tar\n")
    for words in (["tokens", path, "--model", checkpoint], ["tokens", path, "--model", broken],
                  ["tokens", shards, "--model", checkpoint], ["shards", "no", "--out", tmp_path],
                  ["pseudo-label", path, "--model", tmp_path, "--out", tmp_path / "n"],
                  ["answer", tmp_path / "no", "--model", checkpoint, "--out", tmp_path / "n"],
                  ["tokens", tmp_path / "none", "--model", checkpoint], ["check", tmp_path / "no"],
                  ["voice", tmp_path / "no.wav", "--model", checkpoint, "--out", tmp_path / "v"],
                  ["tokenizer", "--text", tmp_path / "no", "--out", tmp_path]):
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, *words)
        assert end.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1, words


# ---- preparation of texts (App. A.3) -----------------------------------------------------------

def text_row(question: str, answer: str, **more) -> dict:
    return {"key": question[:9], "txt": answer, "task": "<TEXT2TEXT>",
            "extra": {"question": question}} | more


def test_filter_keeps_what_can_be_said(tmp_path, monkeypatch, capsys):
    good = [text_row("How are you?", "Fine, thank you."), text_row("a " * 149 + "b", "Yes, no."),
            text_row("Really?", "wonderful, " * 150), text_row("Well?", "\u597d\uff0c" * 150),
            text_row("Which one?", "Wait - no; yes (in fact), don't." + "g" * 5000)]
    bad = {"code": ("What does it do?", "for (i = 0; i < 3; i++) {"),
           "link": ("[a](b.md)?", "Yes."),
           "URL": ("Where?", "See https://a.b/c"), "e-mail": ("Whom?", "Write to me@home.org"),
           "over 150 words": ("Why?", "don't " * 151)}
    path = write_list(tmp_path / "l.jsonl", good + [text_row(*pair) for pair in bad.values()])
    command(monkeypatch, "filter", path, "--out", tmp_path / "new.jsonl")
    assert [r["txt"] for r in data.records(str(tmp_path / "new.jsonl"))] == [r["txt"] for r in good]
    assert set(capsys.readouterr().out.split("\n")) == {"written: 5", "", *(f"{k}: 1" for k in bad)}


MULTI = json.dumps({"txt": "My tower fell.", "age": "child", "gender": "male", "caption": "cry",
                    "emotion": "sad", "answer": "<SORRY>Shall we build it again, little one?"})


@pytest.mark.parametrize("what, row, answers, txt, extra", [
    ("answers", {"txt": "I lost my cat.", "task": "<TRANSCRIBE>", "wav": "q.wav"},
     ["I am sorry."], "I am sorry.", {"q_txt": "I lost my cat."}),
    ("questions", {"txt": "He came back.", "task": "<TRANSCRIBE>", "wav": "q.wav"},
     ["Where is your cat?"], "He came back.", {"question": "Where is your cat?"}),
    ("emotion", {"txt": "I lost my cat.<SAD>", "task": "<TRANSCRIBE> <EMOTION>", "wav": "q.wav"},
     ["what?", "[sorry I feel with you.]"], "<SORRY>I feel with you.",
     {"q_emotion": "<SAD>", "emotion": "<SORRY>", "q_txt": "I lost my cat."}),
    ("age", {"txt": "Which book?<OLD>", "task": "<TRANSCRIBE> <AGE>", "wav": "q.wav"},
     ["<NEUTRAL>One in large print."], "<NEUTRAL>One in large print.", {"age": "<OLD>"}),
    ("gender", {"txt": "a wedding", "task": "<TEXT2TEXT>"},
     ["What do I wear?", "<HAPPY>Something light."], "<HAPPY>Something light.",
     {"question": "What do I wear?", "emotion": "<HAPPY>"}),
    ("multi", {"txt": "toys", "task": "<TEXT2TEXT>"}, [MULTI],
     "<SORRY>Shall we build it again, little one?",
     {"question": "My tower fell.", "age": "<CHILD>", "gender": "<MALE>", "caption": "<CRY>",
      "q_emotion": "<SAD>"})])
def test_ask_makes_dialogues(tmp_path, monkeypatch, server, what, row, answers, txt, extra):
    path, out = write_list(tmp_path / "l.jsonl", [{"key": "k"} | row]), tmp_path / "new.jsonl"
    server.script[:] = answers
    words = ("ask", path, "--what", what, "--judge", server.url, "--judge-model", "m", "--out", out)
    command(monkeypatch, *words)
    made, = data.records(str(out))
    assert made["txt"] == txt and extra.items() <= made["extra"].items()
    if what in ("questions", "gender", "multi"):  # no recording of such a question
        assert made["task"] == "<TEXT2TEXT>" and not made["wav"]
    else:
        assert made["task"].startswith("<S2TCHAT>") and made["wav"] == str(tmp_path / "q.wav")
    assert not server.script
    command(monkeypatch, *words)  # once more: all is known, nothing is sent
    assert len(server.seen) == len(answers) and next(data.records(str(out))) == made


def test_ask_keeps_good_pairs(tmp_path, monkeypatch, server, capsys):
    path = write_list(tmp_path / "l.jsonl", [text_row("Good?", "Yes."), text_row("Bad?", "Blue.")])
    server.script[:] = ["5", "2"]
    command(monkeypatch, "ask", path, "--what", "scores", "--judge", server.url, "--judge-model",
            "m", "--out", tmp_path / "new.jsonl", "--jobs", 1)
    kept, = data.records(str(tmp_path / "new.jsonl"))
    assert kept["extra"] == {"question": "Good?", "score": 5}
    assert "below the threshold: 1" in capsys.readouterr().out


def test_ask_with_a_wrong_key_is_one_line(tmp_path, monkeypatch, server, capsys):
    path = write_list(tmp_path / "l.jsonl", [text_row("Good?", "Yes.")])
    monkeypatch.setenv("ECHAT_JUDGE_KEY", "my secret")
    server.script[:] = [401]
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "ask", path, "--what", "scores", "--judge", server.url,
                "--judge-model", "m", "--out", tmp_path / "new.jsonl", "--jobs", 1)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.py")]
    assert end.value.code == 2 and "HTTP 401" in told[0] and "secret" not in "".join(told)
    assert not (tmp_path / "new.jsonl").exists()


def test_ask_goes_on_where_it_failed(tmp_path, monkeypatch, server, capsys):
    path = write_list(tmp_path / "l.jsonl", [text_row("One?", "Yes."), text_row("Two?", "No.")])
    words = ("ask", path, "--what", "scores", "--judge", server.url, "--judge-model", "m", "--out",
             tmp_path / "new.jsonl", "--jobs", 1)
    server.script[:] = ["5", 400]
    command(monkeypatch, *words)
    assert "HTTP 400 Bad Request: 1" in capsys.readouterr().out
    with open(tmp_path / "new.jsonl.asked", "a") as f:
        f.write('{"key": "ha')  # killed while it wrote
    server.script[:] = ["4"]
    command(monkeypatch, *words)
    assert [r["extra"]["score"] for r in data.records(str(tmp_path / "new.jsonl"))] == [5, 4]
    assert [body["messages"][1]["content"][10:13] for *_, body in server.seen] == [
        "One", "Two", "Two"]


def test_an_endpoint_has_an_address(tmp_path, monkeypatch, capsys):
    path = write_list(tmp_path / "l.jsonl", [text_row("Good?", "Yes.")])
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "ask", path, "--what", "scores", "--judge", "localhost:80",
                "--judge-model", "m", "--out", tmp_path / "new.jsonl")
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["l.jsonl"]


def test_a_reply_needs_its_emotion():
    for text in ("[happy Good for you.]", "<HAPPY>Good for you.", "happy: Good for you."):
        assert data.toned(text) == {"tone": "HAPPY", "reply": "Good for you."}
    for text in ("Happy birthday!", "Sorry to hear that.", "[bored] Oh.", "<HAPPY>", ""):
        assert not data.toned(text)


# ---- the corpus: what a recipe does to a voice -------------------------------------------------

@pytest.fixture
def buzz(monkeypatch):
    """A stand-in for the engines: 1.6 s of syllables at about 120 Hz, whatever the text."""
    t = np.arange(int(1.6 * 22050)) / 22050
    f0 = 120 * 2 ** (0.1 * np.sin(2 * np.pi * 1.5 * t))
    wave = sum(np.sin(k * 2 * np.pi * np.cumsum(f0) / 22050) / k for k in range(1, 20))
    wave *= 0.1 * np.clip(np.sin(2 * np.pi * 2.5 * t), 0.05, 1)
    monkeypatch.setattr(data, "speak_command", lambda text, engine, name: (wave, 22050))
    monkeypatch.setattr(data, "babble", lambda: np.random.default_rng(0).standard_normal(99999))
    monkeypatch.setattr(data, "event_bank", lambda: {kind: [] for kind in data.LABELS["event"]})


def an_item(**labels):
    return {"index": 3, "split": "train", "query": "one two three four", "labels": dict(
        age="ADULT", gender="MALE", emotion="NEUTRAL", event="OTHER") | labels, "voice": {
            "name": "espeak:en", "engine": "espeak", "gender": labels.get("gender", "MALE"),
            "age": None, "pitch": 1.0, "formant": 1.0}}


@pytest.mark.parametrize("hertz", [187.7, 223.4, 301.9])
def test_pitch_is_exact_between_samples(hertz):
    """Whole periods of 16 kHz samples would be 1.5 Hz off at 220 Hz: harmonics would not fit."""
    turned = 2 * np.pi * hertz * np.arange(16000) / 16000
    f0 = data.track_f0(np.sin(turned) + 0.5 * np.sin(2 * turned))
    assert np.abs(f0[5:-5] - hertz).max() < 0.05


def test_recipes_can_be_measured(buzz):
    """Pitch, rate and level of a voice follow age, gender and emotion."""
    def spoken(**labels):
        item, rng = an_item(**labels), np.random.default_rng(0)
        x = data.speak(item["query"], item["voice"], item["labels"], rng)
        f0 = data.track_f0(x)
        return np.median(f0[f0 > 0]), len(x) / 16000, float(np.sqrt((x ** 2).mean()))
    plain, sad, angry, afraid, child, woman, old = (
        spoken(**labels) for labels in ({}, {"emotion": "SAD"}, {"emotion": "ANGER"},
                                        {"emotion": "FEAR"}, {"age": "CHILD"}, {"gender": "FEMALE"},
                                        {"age": "OLD"}))
    assert plain[0] == pytest.approx(108, rel=0.08) and child[0] == pytest.approx(250, rel=0.1)
    assert woman[0] == pytest.approx(192, rel=0.2) and afraid[0] > 1.1 * plain[0] > 1.1 * sad[0]
    assert sad[1] > 1.2 * plain[1] and old[1] > 1.1 * plain[1] and angry[1] < 0.9 * plain[1]
    assert sad[2] < 0.8 * plain[2] < plain[2] < angry[2]


def test_a_query_is_the_same_for_the_same_seed_and_made_once(buzz, tmp_path):
    def made(name, seed, **labels):
        done = data.run_job((data.make_query, tmp_path / name, an_item(**labels), seed))
        assert done[2] == "" and done[1] == pytest.approx(sf.info(tmp_path / name).duration)
        return (tmp_path / name).read_bytes(), done[1]
    first, seconds = made("a.wav", 0)
    assert made("b.wav", 0)[0] == first != made("c.wav", 1)[0]
    assert made("a.wav", 7)[0] == first  # is there, is left as it is
    assert made("cough.wav", 0, event="COUGH")[1] > seconds
    item = an_item() | {"query": "word " * 60}
    assert "implausible length" in data.run_job((data.make_query, tmp_path / "d", item, 0))[2]
    assert not (tmp_path / "d").exists()


def test_a_corpus_with_more_drills(tmp_path, monkeypatch, capsys):
    spoken = []
    monkeypatch.setattr(data, "find_engines", lambda: {"hibari", "espeak"})
    monkeypatch.setattr(data.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    monkeypatch.setattr(data, "run_job", lambda job: spoken.append(job[1]) or (job[1], 1.0, ""))
    lists = {}
    for drills in (0, 5):
        out = tmp_path / str(drills)
        command(monkeypatch, "build", "--n", 4, "--out", out, "--drills", drills, "--jobs", 1)
        lists[drills] = {p.name: p.read_text().splitlines() for p in out.glob("*.jsonl")}
    more = {name: len(rows) - len(lists[0][name]) for name, rows in lists[5].items()}
    assert {name: n for name, n in more.items() if n} == {
        "asr.train.jsonl": 5, "asrp.train.jsonl": 20, "full.train.jsonl": 5, "onlyp.train.jsonl": 5}
    assert all(set(lists[0][name]) <= set(rows) for name, rows in lists[5].items())
    alike = [{str(path.relative_to(tmp_path / n)) for path in spoken
              if path.is_relative_to(tmp_path / n)} for n in "05"]
    assert alike[0] < alike[1] and len(alike[1] - alike[0]) == 5  # heard, not said
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "build", "--n", 4, "--out", out, "--jobs", 1)
    assert stop.value.code == 2 and "other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "build", "--n", 0, "--out", tmp_path / "0", "--drills", 1)
    assert stop.value.code == 2 and "there are none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [k for k in data.LABELS["event"] if k != "OTHER"])
def test_an_event_is_spliced_in_and_the_words_stay(buzz, kind):
    x = np.concatenate([tone(0.5), np.zeros(4000), tone(0.7)]).astype(np.float64)
    for seed in range(6):  # before, after, or in the pause
        y = data.splice(x, kind, an_item()["voice"], "ADULT", "train", np.random.default_rng(seed))
        assert np.isfinite(y).all() and len(y) > len(x) + 1000
        words = [np.abs(scipy.signal.fftconvolve(y, part[::-1])).max() / (part ** 2).sum()
                 for part in (x[1000:7000], x[-9000:-1000])]
        assert min(words) > 0.9


def test_splice_of_very_short_speech(buzz):
    for seed in range(9):
        y = data.splice(0.1 * np.ones(500, np.float32), "COUGH", an_item()["voice"], "ADULT",
                        "train", np.random.default_rng(seed))
        assert np.isfinite(y).all() and len(y) > 1500


def test_splice_puts_the_labelled_event_into_a_list(buzz, tmp_path, wav, monkeypatch, capsys):
    rows = [{"txt": "<SAD>hi", "task": "<S2TCHAT>", "wav": wav(1.0), "start": 0.2, "end": 0.8,
             "extra": {"caption": "<COUGH>"}},
            {"txt": "hi<OTHER>", "task": "<TRANSCRIBE> <EVENT>", "wav": wav(0.5)},
            {"txt": "hi<SIGH>", "task": "<TRANSCRIBE> <EVENT>", "wav": "gone.wav"}]
    path, out = write_list(tmp_path / "l.jsonl", rows), str(tmp_path / "out.jsonl")
    made = []
    for seed in (0, 0, 1):
        command(monkeypatch, "splice", path, "--out", out, "--seed", seed)
        made.append((read_wave(out + ".wavs/000000.wav"), open(out).read()))
    told = capsys.readouterr().out.splitlines()[:3]
    assert sorted(told) == ["no event: 1", "no such file: 1", "spliced: 1"]
    cough, plain = data.records(out)
    assert data.usable(cough)[2][0] > 70 and os.path.samefile(plain["wav"], wav(0.5))
    assert made[0][1] == made[1][1] and torch.equal(made[0][0], made[1][0])
    assert made[0][0].shape != made[2][0].shape or not torch.equal(made[0][0], made[2][0])


def test_turns_are_conversations(tmp_path):
    talks = [{"key": f"{i}", "wav": f"{i}.wav", "txt": f"<SAD>hi {i}", "task": "<S2TCHAT>",
              "extra": {"reply_wav": f"r{i}.wav"}} for i in range(9)]
    made = data.turns(talks, 0)
    assert [t["key"] for t in made] == ["turns_0", "turns_4", "turns_8"]
    assert made == data.turns(talks, 0)
    for talk in made:
        past = talk["extra"]["history"]
        assert 1 <= len(past) <= 2 and all(turn["txt"] == f"hi {turn['wav'][0]}" for turn in past)
        assert all(turn["reply_wav"] == "r" + turn["wav"] for turn in past)
    assert "history" not in talks[0]["extra"] and data.turns(talks[:1], 0) == []
