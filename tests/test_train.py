"""The method (sequences, label masks, losses) and the loop (stages, resume, ranks, bad steps)."""

import json
import math
import multiprocessing
import os
import random
import re
import socket
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import CODES, copy_of, some_codes, tiny_config, write_list

import train
from model import (AUDIO, NATURAL, UNKNOWN, Token2Wav, label_think, load_token2wav, prompt,
                   read_weights, save_config, save_weights, think_length, user_prompt)
from train import (NEVER, PARTS, STAGES, Clip, Dialogue, Sample, Stage, interleave, learning_rate,
                   orthogonal, pitch_of, said_at, sequence, tagless)
from vocoder import VocoderConfig

V = 303
SPEECH = V + CODES  # opens and closes speech
CFG = tiny_config()


def speech_of(codes):
    return [SPEECH, *(V + c for c in codes), SPEECH]


# ---- interleave --------------------------------------------------------------------------------

@pytest.mark.parametrize("text, speech, want", [
    (13, 60, "6 18 6 18 1 24"), (7, 60, "6 18 1 42"), (6, 60, "6 60"), (12, 36, "6 18 6 18"),
    (1, 3, "1 3")])
def test_interleave_has_the_tails_of_the_released_code(text, speech, want):
    words, codes = list(range(text)), list(range(100, 100 + speech))
    blocks = interleave(words, codes)
    assert [part for part, _ in blocks] == ["text", "speech"] * (len(blocks) // 2)
    assert " ".join(str(len(ids)) for _, ids in blocks) == want
    for part, ids in (("text", words), ("speech", codes)):
        assert [i for p, block in blocks if p == part for i in block] == ids


# ---- sequences: ids, targets, parts and attention of every task --------------------------------

def made(record, tok, stage=Stage(()), epoch=0, seed=0) -> Sample:
    out = sequence({"txt": "", "extra": {}} | record, epoch, random.Random(seed), stage, tok, CFG)
    assert not isinstance(out, str), out
    return out


def check(got: Sample, *blocks, unknown=frozenset()):
    """blocks: (ids, part) in order, part None where there is no loss."""
    ids = [i for block, _ in blocks for i in block]
    parts = [part for block, part in blocks for _ in block]
    assert got.ids == [0 if part and i in unknown else i for i, part in zip(ids, parts)]
    assert got.targets == [i if part and i not in unknown else -100 for i, part in zip(ids, parts)]
    assert got.part == [PARTS.index(part) if part else -1 for part in parts]
    assert got.attend == [not (part and i in unknown) for i, part in zip(ids, parts)]
    assert got.length == len(ids)


def counts(got: Sample) -> Counter:
    """How many targets each part has."""
    return Counter(PARTS[p] for t, p in zip(got.targets, got.part) if t != -100)


def test_understanding(tok, wav):
    record = {"task": "<TRANSCRIBE> <EMOTION> <AGE>", "wav": wav(1.0), "txt": "the user<SAD><OLD>"}
    words, labels = tok.encode("the user"), tok.encode("<SAD><OLD>")
    assert tok.encode(record["txt"]) == words + labels
    head = prompt("understand", tok, CFG.decoder, 13, user_prompt(["asr", "emotion", "age"]))
    got = made(record, tok)
    check(got, (head, None), (words, "asr"), ([*labels, tok.im_end], "p"))
    assert counts(got) == {"asr": 2, "p": len(labels) + 1} and got.ids.count(AUDIO) == 13
    assert got.audio == [(wav(1.0), 0.0, None)]
    part = made(record | {"start": 0.1, "end": 0.5}, tok)  # 40 frames
    assert part.ids.count(AUDIO) == 5 and part.audio == [(wav(1.0), 0.1, 0.5)]

    head = prompt("understand", tok, CFG.decoder, 13, user_prompt(["asr"]))
    check(made(record | {"task": "<TRANSCRIBE>", "txt": "the user"}, tok),
          (head, None), ([*words, tok.im_end], "asr"))
    head = prompt("understand", tok, CFG.decoder, 13, user_prompt(["event"]))
    check(made(record | {"task": "<CAPTION>", "txt": "<SAD>"}, tok),
          (head, None), ([*tok.encode("<SAD>"), tok.im_end], "p"))


def test_unknown_at_the_end_of_understanding_has_no_end_either(tok, wav):
    record = {"task": "<TRANSCRIBE> <EMOTION>", "wav": wav(1.0), "txt": "the user" + UNKNOWN}
    head = prompt("understand", tok, CFG.decoder, 13, user_prompt(["asr", "emotion"]))
    got = made(record, tok)
    words, mark = tok.encode("the user"), tok.encode(UNKNOWN)
    assert tok.encode(record["txt"]) == words + mark and len(mark) == 3  # < && >
    assert got.ids == head + words + [mark[0], 0, mark[2]] and tok.im_end not in got.targets
    assert got.targets[len(head):] == words + [mark[0], -100, mark[2]]
    assert got.attend == [True] * len(head + words) + [True, False, True]


def test_understanding_without_labels_is_the_words_alone(tok, wav):
    """--ablate u-driven: no P in the question, the answer, or what the ear is asked."""
    record = {"task": "<TRANSCRIBE> <EMOTION> <AGE>", "wav": wav(1.0), "txt": "the user<SAD><OLD>"}
    stage = Stage((), labels=False)
    got = made(record, tok, stage)
    head = prompt("understand", tok, CFG.decoder, 13, user_prompt(["asr"]))
    check(got, (head, None), ([*tok.encode("the user"), tok.im_end], "asr"))
    assert got.cues == [-100] * 4
    out = sequence(record | {"task": "<AGE>", "txt": "<OLD>", "extra": {}}, 0, random.Random(0),
                   stage, tok, CFG)
    assert out == "only P, left out by --ablate u-driven"


def test_ablations(run, lists):
    for names in (["u-driven"], ["dual-think"], ["u-driven", "dual-think"], []):
        trainer = run("empathy", of(lists, "s2s"), ablate=names, steps=0) if names else \
            run("empathy", of(lists, "s2s"), steps=0)
        assert trainer.stage == replace(STAGES["empathy"], labels="u-driven" not in names,
                                        think=float("dual-think" not in names))
        part = next(trainer.loader(trainer.args.data, 0))[0]["part"]
        assert (part == PARTS.index("think")).any() == ("dual-think" not in names)


def test_text_to_text(tok):
    record = {"task": "<TEXT2TEXT>", "txt": "the user\nsaid", "extra": {"question": "hello"}}
    check(made(record, tok), (prompt("t2t", tok, CFG.decoder, text="hello"), None),
          ([*tok.encode("the user said"), tok.im_end], "text"))


def test_speech_synthesis(tok):
    codes = some_codes(58)
    record = {"task": "<TEXT2TOKEN>", "txt": "hello", "extra": {"speech_token": codes}}
    head = prompt("tts", tok, CFG.decoder, text="hello")
    got = made(record, tok)
    check(got, (head, None), (speech_of(codes)[1:], "speech"))
    assert head[-1] == SPEECH and counts(got) == {"speech": 59}  # the open one is given

    record |= {"task": "<TEXT2TOKEN> <STREAMING>", "txt": "0123456789ab"}  # 13 with the end
    text, speech = [*tok.encode(record["txt"]), tok.im_end], speech_of(codes)  # 13 and 60
    assert len(text) == 13
    head = prompt("tts_stream", tok, CFG.decoder, text=record["txt"])
    got = made(record, tok)
    check(got, (head, None), (text[:6], "text"), (speech[:18], "speech"), (text[6:12], "text"),
          (speech[18:36], "speech"), (text[12:], "text"), (speech[36:], "speech"))
    assert counts(got) == {"text": 13, "speech": 60}
    short = record | {"extra": {"speech_token": codes[:36]}}  # 38 < 3 x 13: text would lag behind
    check(made(short, tok), (prompt("tts", tok, CFG.decoder, text=record["txt"]), None),
          (speech_of(codes[:36])[1:], "speech"))


def dialogue(wav, task="<S2TCHAT> <TEXT2TOKEN>", n=40, **extra):
    labels = {"age": "<OLD>", "gender": "<MALE>", "q_emotion": "<SAD>", "caption": "<COUGH>",
              "emotion": "<SORRY>"}
    return {"task": task, "wav": wav(1.0), "txt": "<SORRY>hello", "extra": {
        "speech_token": some_codes(n), "q_txt": "how are you", **labels, **extra}}


def test_spoken_dialogue(tok, wav):
    record = dialogue(wav)
    head = prompt("s2s", tok, CFG.decoder, 13)
    text, speech = [*tok.encode("<SORRY>hello"), tok.im_end], speech_of(some_codes(40))
    got = made(record, tok)
    check(got, (head, None), (text, "text"), (speech, "speech"))
    assert counts(got) == {"text": len(text), "speech": 42}
    for task in (record["task"].replace(" <TEXT2TOKEN>", ""), record["task"]):
        got = made(record | {"task": task}, tok, Stage((), s2t=1.0))  # a reply in text alone
        check(got, (prompt("s2t", tok, CFG.decoder, 13), None), (text, "text"))


def test_dialogue_with_a_label_think(tok, wav):
    known = dict(age="<OLD>", gender="<MALE>", emotion="<SAD>", event="<COUGH>",
                 reply_emotion="<SORRY>")
    think = label_think("en", "how are you", known)
    ids = [*tok.encode(think + "<SORRY>hello"), tok.im_end]
    n, speech = think_length(ids, tok), speech_of(some_codes(40))
    assert b"><" in tok.bytes_of(ids[n - 1])  # merged: the reply's `<` belongs to the think
    got = made(dialogue(wav), tok, Stage((), think=1.0))
    check(got, (prompt("s2s_think", tok, CFG.decoder, 13), None), (ids[:n], "think"),
          (ids[n:], "text"), (speech, "speech"))
    assert counts(got) == {"think": n, "text": len(ids) - n, "speech": 42}
    got = made(dialogue(wav, "<S2TCHAT>"), tok, Stage((), think=1.0))
    check(got, (prompt("s2t_think", tok, CFG.decoder, 13), None), (ids[:n], "think"),
          (ids[n:], "text"))


@pytest.mark.parametrize("missing", [["age"], ["gender", "q_emotion", "caption"],
                                     ["age", "gender", "q_emotion", "caption", "emotion"]])
def test_unknown_labels_teach_nothing(tok, wav, missing):
    record, txt = dialogue(wav), "hello" if "emotion" in missing else "<SORRY>hello"
    record["txt"] = txt
    for i, name in enumerate(missing):  # absent, null or the placeholder
        record["extra"][name] = (None, UNKNOWN)[i % 2]
        if i == 0:
            del record["extra"][name]
    names = {"q_emotion": "emotion", "caption": "event", "emotion": "reply_emotion"}
    known = dict(age="<OLD>", gender="<MALE>", emotion="<SAD>", event="<COUGH>",
                 reply_emotion="<SORRY>")
    for name in missing:
        del known[names.get(name, name)]
    ids = [*tok.encode(label_think("en", "how are you", known) + txt), tok.im_end]
    n = think_length(ids, tok)
    got = made(record, tok, Stage((), think=1.0))
    check(got, (prompt("s2s_think", tok, CFG.decoder, 13), None), (ids[:n], "think"),
          (ids[n:], "text"), (speech_of(some_codes(40)), "speech"), unknown=tok.unknown)
    assert got.attend.count(False) == len(missing) == sum(i in tok.unknown for i in ids)
    assert counts(got)["think"] == n - len(missing)  # all around them is trained


def test_released_dialogues_name_the_replys_emotion_only_in_the_reply(tok, wav):
    """And what was said may be unknown, as a label may."""
    record = dialogue(wav, emotion=None, q_txt=None, think_str=None)
    labels = dict(age="<OLD>", gender="<MALE>", emotion="<SAD>", event="<COUGH>")
    ids = tok.encode(label_think("en", UNKNOWN, labels | {"reply_emotion": "<SORRY>"})
                     + "<SORRY>hello")
    got = made(record, tok, Stage((), think=1.0))
    n, first = think_length(ids, tok), len(prompt("s2s_think", tok, CFG.decoder, 13))
    check(got, (got.ids[:first], None), (ids[:n], "think"), ([*ids[n:], tok.im_end], "text"),
          (speech_of(some_codes(40)), "speech"), unknown=tok.unknown)
    assert got.attend.count(False) == 1


def test_dialogue_with_a_natural_think(tok, wav):
    record = dialogue(wav, think_str="The user is old.")
    seeds = {}
    head = prompt("s2s_think", tok, CFG.decoder, 13, NATURAL)
    for seed in range(40):
        got = made(record, tok, Stage((), think=1.0), seed=seed)
        seeds.setdefault(got.ids[:len(head)] == head, []).append(seed)
    assert 4 <= len(seeds[True]) <= 18  # a quarter of them
    ids = [*tok.encode("<think>The user is old.<think end>hello"), tok.im_end]
    n = think_length(ids, tok)
    check(made(record, tok, Stage((), think=1.0), seed=seeds[True][0]),
          (head, None), (ids[:n], "think"),
          (ids[n:], "text"), (speech_of(some_codes(40)), "speech"))


def test_a_reply_of_the_models_own_is_trained_without_a_think(tok, wav):
    """Its labels are what the model took them to be, not those of the record."""
    record = dialogue(wav, own_think="<think>...<think end>", think_str="so")
    text, speech = [*tok.encode("<SORRY>hello"), tok.im_end], speech_of(some_codes(40))
    check(made(record, tok, Stage((), think=1.0)), (prompt("s2s", tok, CFG.decoder, 13), None),
          (text, "text"), (speech, "speech"))


def test_streaming_dialogue(tok, wav):
    record = dialogue(wav, "<S2TCHAT> <TEXT2TOKEN> <STREAMING>", 58) | {"txt": "012345"}
    text, speech = [*tok.encode("012345"), tok.im_end], speech_of(some_codes(58))  # 7 and 60
    blocks = [(text[:6], "text"), (speech[:18], "speech"), (text[6:], "text"),
              (speech[18:], "speech")]
    check(made(record, tok), (prompt("s2s_stream", tok, CFG.decoder, 13), None), *blocks)
    got = made(record | {"txt": "01234"}, tok)
    check(got, (prompt("s2s_stream", tok, CFG.decoder, 13), None),
          ([*text[:5], tok.im_end], "text"), (speech, "speech"))
    record["task"] = "<S2TCHAT> <TEXT2TOKEN>"  # as the stage wants it: not in the first epoch
    stage = Stage((), interleave=(0.0, 1.0))
    assert made(record, tok, stage).ids[:40] == prompt("s2s", tok, CFG.decoder, 13)[:40]
    check(made(record, tok, stage, epoch=3),
          (prompt("s2s_stream", tok, CFG.decoder, 13), None), *blocks)


def test_streaming_think_comes_whole(tok, wav):
    record = dialogue(wav, n=70) | {"txt": "012345"}
    del record["extra"]["age"]
    known = dict(gender="<MALE>", emotion="<SAD>", event="<COUGH>", reply_emotion="<SORRY>")
    ids = [*tok.encode(label_think("en", "how are you", known) + "012345"), tok.im_end]
    n, speech = think_length(ids, tok), speech_of(some_codes(70))
    got = made(record, tok, Stage((), interleave=(1.0, 1.0), think=1.0))
    check(got, (prompt("s2s_stream_think", tok, CFG.decoder, 13), None), (ids[:n], "think"),
          (ids[n:n + 6], "text"), (speech[:18], "speech"), (ids[n + 6:], "text"),
          (speech[18:], "speech"), unknown=tok.unknown)
    assert n > 90 and got.attend.count(False) == 1  # the long think did not forbid it


def test_history_is_read_but_not_trained(tok, wav):
    past = [{"wav": wav(0.5), "txt": "hello", "speech_token": [1, 2]},
            {"wav": wav(1.0), "start": 0.25, "end": 0.5, "txt": "the user"}]
    record = dialogue(wav, history=past)
    turns = [(7, "hello", [1, 2]), (4, "the user", [])]
    head = prompt("s2s", tok, CFG.decoder, 13, history=turns)
    got = made(record, tok)
    check(got, (head, None), ([*tok.encode("<SORRY>hello"), tok.im_end], "text"),
          (speech_of(some_codes(40)), "speech"))
    assert got.ids.count(AUDIO) == 24 and got.audio == [
        (wav(0.5), 0.0, None), (wav(1.0), 0.25, 0.5), (wav(1.0), 0.0, None)]


@pytest.mark.parametrize("change, why", [
    ({"wav": None}, "no wav"), ({"end": 0.15}, "audio shorter than 0.2 s or longer than 200 s"),
    ({"extra": {}}, "no speech_token"), ({"task": "<TEXT2TEXT>", "extra": {}}, "no question"),
    ({"extra": {"speech_token": [CODES]}}, "speech code out of range"),
    ({"extra": {"speech_token": [-1]}}, "speech code out of range"),
    ({"extra": {"speech_token": [1], "history": [{"speech_token": [CODES]}]}},
     "speech code out of range"),
    ({"task": "<TRANSCRIBE> <ALIGN>"}, "unknown task <TRANSCRIBE> <ALIGN>"),
    ({"task": "chat"}, "unknown task chat"), ({"start": "0"}, "not a readable audio file"),
    ({"extra": {"speech_token": "1 2"}}, "malformed"), ({"task": "<S2TCHAT>", "extra": {"history": [
        1]}}, "malformed")])
def test_rejects_have_a_reason(tok, wav, change, why):
    out = train.data.attempt(sequence, dialogue(wav) | change, 0, random.Random(0), Stage(()), tok,
                             CFG)
    assert out.partition(":")[0] == why


# ---- batches and the loss ----------------------------------------------------------------------

@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path):
    """run(stage, lists, **flags) -> the trainer after train.py has done that, in this process."""
    def go(stage, lists, out="out", init=checkpoint, steps=1, **flags):
        kept = []

        class Spy(train.Trainer):
            def __init__(self, args):
                super().__init__(args)
                kept.append(self)
        defaults = dict(lr=0.01, warmup=1, accum=1, workers=0, log_every=1, device="cpu")
        words = ["train.py", "--stage", stage, "--out", str(tmp_path / out)]
        words += ["--steps", str(steps)] if steps is not None else []
        words += ["--data", *lists[:1], *(w for path in lists[1:] for w in ("--data", path))]
        words += ["--init", str(init)] if init else []
        for name, value in (defaults | flags).items():
            value = [] if value is True else value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, value)]
        with monkeypatch.context() as m:
            m.setattr(sys, "argv", words)
            m.setattr(train, "Trainer", Spy)
            train.main()
        return kept[0]
    return go


def log(trainer) -> list[dict]:
    with open(os.path.join(trainer.args.out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


@pytest.fixture
def lists(tmp_path, wav):
    """A tiny list for every kind of stage, and the lists each stage is trained on."""
    asr = [{"txt": t, "task": "<TRANSCRIBE>", "wav": wav(s, p)}
           for t, s, p in (("the user", 0.5, 200), ("hello", 0.4, 300))]
    asrp = [r | {"txt": r["txt"] + "<SAD>", "task": "<TRANSCRIBE> <EMOTION>"} for r in asr]
    p = [r | {"txt": "<SAD>", "task": "<EMOTION>"} for r in asr]
    t2t = [{"txt": t, "task": "<TEXT2TEXT>", "extra": {"question": q}}
           for t, q in (("hello", "the user"), ("how are you", "hello"))]
    tts = [{"txt": t, "task": "<TEXT2TOKEN>", "wav": wav(1.0, p, 24000),
            "extra": {"speech_token": some_codes(25, p)}}
           for t, p in (("hello", 200), ("the user", 300))]
    s2s = [dialogue(wav, n=n) for n in (20, 30)]
    for record in s2s:
        del record["extra"]["age"]
    paths = {k: write_list(tmp_path / f"{k}.jsonl", v) for k, v in dict(
        asr=asr, asrp=asrp, p=p, t2t=t2t, tts=tts, s2s=s2s).items()}
    use = {"text": "t2t", "align": "asr", "understand": "asrp", "paralinguistic": "p",
           "full-label": "asrp", "tts": "tts", "s2s": "s2s", "empathy": "s2s", "distill": "s2s",
           "tokenizer": "tts", "flow": "tts", "vocoder": "tts"}
    return paths | {stage: [paths[name]] for stage, name in use.items() if stage not in paths} | {
        "tts list": [paths["tts"]], "s2s list": [paths["s2s"]]}


def of(lists, stage):
    return lists[stage + " list"] if isinstance(lists[stage], str) else lists[stage]


def test_padded_batch(tok, wav, run, lists):
    """Rows of different length: speech is opened by the end of the text, never by a pad; nothing
    in the pads is a target; and the loss of the batch is that of its rows."""
    trainee = run("s2s", of(lists, "s2s"), steps=0).trainee
    trainee.module.eval()
    samples = [made(dialogue(wav, n=n) | {"txt": t}, tok) for n, t in ((20, "hello"), (35, "hi"))]
    samples.append(made(dialogue(wav, n=9, history=[
        {"wav": wav(0.5), "txt": "hm", "speech_token": [3]}]), tok))
    batch = trainee.collate(samples, "seed")
    assert len(batch["mel"]) == 4 and batch["mel_lengths"].tolist() == [100, 100, 50, 100]
    for row, s in enumerate(samples):
        opens = [i for i, t in enumerate(batch["targets"][row].tolist()) if t == SPEECH]
        assert len(opens) == 2 and batch["ids"][row, opens[0] - 1] == tok.im_end
        assert opens[1] == s.length - 1
        assert (batch["targets"][row, s.length:] == -100).all()
        assert (batch["part"][row, s.length:] == -1).all()
    assert "attend" not in batch and int((batch["targets"] != -100).sum()) == sum(
        sum(counts(s).values()) for s in samples)
    with torch.no_grad():
        loss, stats = trainee.loss("model", batch)
        alone = [trainee.loss("model", trainee.collate([s], "seed"))[0] for s in samples]
    weights = [sum(counts(s).values()) for s in samples]
    want = sum(a * w for a, w in zip(alone, weights)) / sum(weights)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)


def test_a_list_may_mix_text_and_speech(tok, wav, run, lists):
    trainee = run("s2s", of(lists, "s2s"), steps=0).trainee
    trainee.module.eval()
    text = made({"task": "<TEXT2TEXT>", "txt": "hello", "extra": {"question": "the user"}}, tok)
    samples = [text, made(dialogue(wav), tok), text]
    with torch.no_grad():
        both, _ = trainee.loss("model", trainee.collate(samples, ""))
        alone = [trainee.loss("model", trainee.collate([s], "")) for s in samples]
    n = [float(sum(c for _, c in stats.values())) for _, stats in alone]
    want = sum(float(a) * k for (a, _), k in zip(alone, n)) / sum(n)
    assert abs(float(both) - want) < 1e-5


def test_loss_parts_add_up(tok, wav, run, lists):
    """Eq. 1-4: what the parts of the log add up to is the loss that is trained."""
    trainee = run("empathy", of(lists, "s2s"), steps=0).trainee
    understanding = {"task": "<TRANSCRIBE> <EMOTION>", "wav": wav(0.5), "txt": "the user<SAD>"}
    record = dialogue(wav)
    del record["extra"]["age"]
    samples = [made(understanding, tok), made(record, tok, Stage((), think=1.0))]
    batch = trainee.collate(samples, "")
    assert not batch["attend"].all()
    with torch.no_grad():
        loss, stats = trainee.loss("model", batch)
    assert all(float(count) > 0 for _, count in stats.values()) and list(stats) == list(PARTS)
    total = sum(float(value) for value, _ in stats.values())
    assert abs(total / int((batch["targets"] != -100).sum()) - float(loss)) < 1e-5
    want = counts(samples[0]) + counts(samples[1])
    assert {k: int(n) for k, (_, n) in stats.items()} == want


@pytest.fixture
def spoken(tmp_path, wav, checkpoint):
    """A list in two voices, the checkpoint's and that of a file, and the other's vector."""
    other = read_weights(str(checkpoint / "voice.safetensors"))
    other |= {"spk": -other["spk"], "prompt_codes": other["prompt_codes"].flip(1)}
    save_weights(str(tmp_path / "other.safetensors"), other)
    rows = [{"txt": "hello", "task": "<TEXT2TOKEN>", "wav": wav(1.5, p, 24000), "extra": {
        "speech_token": some_codes(37, p), "voice": voice}}
        for p, voice in ((200, ""), (300, str(tmp_path / "other.safetensors")))]
    return write_list(tmp_path / "spoken.jsonl", rows), other["spk"]


def test_the_flow_trains_on_every_voice_and_tells_how_well_it_speaks(run, spoken, monkeypatch):
    path, spk = spoken
    trainer = run("flow", [path], steps=2, batch_tokens=300, valid=[path], valid_every=2,
                  valid_batches=1)
    trainee, seen = trainer.trainee, []
    batch = next(trainer.loader([path], 0))[0]
    monkeypatch.setattr(trainee.module, "forward",
                        lambda codes, lengths, mel, spk: (seen.append((mel, spk)), torch.zeros(2)))
    trainee.module.eval()
    told = trainee.loss("model", batch)[1]["mel"][0]
    (mel, voices), which = seen[0], ["other" in voice for voice in batch["voices"]]
    assert sorted(which) == [False, True] and torch.equal(voices[which.index(True)], spk[0])
    assert torch.equal(voices[which.index(False)], trainee.voice("")["spk"][0])
    made = trainee.render(batch, 0)
    assert told == (made - mel[:1]).abs().mean() and log(trainer)[-1]["valid_mel"] > 0
    batch["voices"].reverse()
    assert not torch.allclose(trainee.render(batch, 0), made, atol=0.01)


def test_the_source_sings_at_the_pitch_of_the_wave(tmp_path):
    """A voice that rises from 100 to 300 Hz, then hisses: Hz at the middle of each frame."""
    at = np.arange(24000) / 24000
    hertz = 100 + 200 * at
    turned = 2 * np.pi * np.cumsum(hertz) / 24000
    wave = 0.1 * sum(np.sin(n * turned) for n in range(1, 6))
    wave[18000:] = 0.1 * np.random.default_rng(0).standard_normal(6000)
    soundfile.write(tmp_path / "rise.wav", wave, 24000)
    f0 = pitch_of(Clip(str(tmp_path / "rise.wav"), 0.3, 48)).numpy()
    want = np.interp(np.arange(48) / 100 + 0.305, at, hertz)
    assert f0.shape == (48,) and (np.abs(f0 - want)[:40] < 0.04 * want[:40]).all()
    assert not pitch_of(Clip(str(tmp_path / "rise.wav"), 0.8, 15)).any()
    assert pitch_of(Clip(str(tmp_path / "rise.wav"), 0.0, 4)).shape == (4,)


def test_hifigan_trains_too(run, spoken, checkpoint, tmp_path):
    """Without a source; weight norm stays in the run, the checkpoint has plain weights."""
    folder = copy_of(checkpoint, tmp_path / "hifigan")
    cfg = tiny_config(vocoder=VocoderConfig(
        "hifigan", channels=16, mrf_kernels=(3,), mrf_dilations=((1,),), periods=(2,), mpd=(4, 4),
        msd=((4, 5, 1, 1), (4, 5, 4, 1))))
    save_config(str(folder), cfg)
    save_weights(str(folder / "token2wav.safetensors"), Token2Wav(cfg, {}))
    trainer = run("vocoder", [spoken[0]], init=folder, steps=4, mel_only=2, batch_tokens=256)
    assert {"mel", "d", "g", "fm"} <= set(log(trainer)[-1]) and "f0" not in log(trainer)[-1]
    voice = load_token2wav(trainer.args.out)
    made = trainer.trainee.module["generator"].eval()
    mel = torch.randn(1, 5, 80)
    torch.testing.assert_close(voice.vocoder(mel), made(mel), atol=1e-5, rtol=0)


def test_vocoder_on_the_flows_own_mels(run, spoken, checkpoint):
    """The generator hears the flow's mel of the codes of that piece of the wave which it makes.
    The flow stays as it is; a resumed run is the uninterrupted one."""
    flags = dict(on_flow=True, mel_only=1, batch_tokens=256)
    whole = run("vocoder", [spoken[0]], "whole", steps=3, **flags)
    run("vocoder", [spoken[0]], "parts", steps=2, **flags)
    parts = run("vocoder", [spoken[0]], "parts", steps=3, resume=True, **flags)
    a, b, was = (read_weights(str(folder) + "/token2wav.safetensors")
                 for folder in (whole.args.out, parts.args.out, checkpoint))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(a[k], was[k]) == k.startswith("flow.") for k in a)
    trainee, batch = whole.trainee, next(whole.loader([spoken[0]], 0))[0]
    mel = trainee.heard(batch)
    assert mel.shape == (2, 128, 80) and batch["wave"].shape == (2, 128 * 240)
    state = replace(trainee.begun[batch["voices"][1]],
                    seed=random.Random(f"{batch['seed']} 1").getrandbits(32))
    want, _ = trainee.whole.flow.stream(batch["codes"][1:], state, final=True)
    assert torch.equal(mel[1:], want) and not torch.equal(mel[:1], want)


def test_a_flow_needs_a_voice_and_its_own_codes(run, lists, wav, checkpoint, tmp_path, capsys):
    mute = copy_of(checkpoint, tmp_path / "mute")
    (mute / "voice.safetensors").unlink()
    other = write_list(tmp_path / "other.jsonl", [{
        "txt": "hello", "task": "<TEXT2TOKEN>", "wav": wav(1.0, 200, 24000), "extra": {
            "speech_token": [CODES] * 25}}])
    for init, path, words in ((mute, lists["tts"], "voice.safetensors"),
                              (checkpoint, other, "{'a code outside the codebook': 1}")):
        with pytest.raises(SystemExit) as end:
            run("flow", [path], init=init)
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and words in said and len(said.splitlines()) == 1


# ---- stages ------------------------------------------------------------------------------------

TRAINED = {"text": "decoder", "align": "adapter", "understand": "adapter encoder",
           "paralinguistic": "adapter encoder", "full-label": "adapter encoder", "tts": "decoder",
           "s2s": "encoder adapter decoder", "empathy": "encoder adapter decoder",
           "distill": "encoder adapter decoder"}
FILES = {"tokenizer": "tokenizer_s3", "flow": "token2wav", "vocoder": "token2wav"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_overfits_and_trains_what_it_should(run, lists, checkpoint, stage):
    """One batch again and again: an LLM that trains knows it nearly by heart; of the others the
    loss falls. What the paper freezes has not moved a bit."""
    learns = "decoder" in TRAINED.get(stage, "")
    flags = {"vocoder": dict(mel_only=20), "tokenizer": dict(quantise_after=3, lr=0.003),
             "flow": dict(lr=0.01)}.get(stage, dict(steps=80, lr=0.02) if learns else {})
    trainer = run(stage, of(lists, stage), batch_tokens=10000,
                  **dict(steps=40, lr=0.05, warmup=20) | flags)
    file = FILES.get(stage, "model") + ".safetensors"
    was, now = (read_weights(os.path.join(f, file)) for f in (checkpoint, trainer.args.out))
    trained = {"flow": ["flow"], "vocoder": ["vocoder"]}.get(stage, TRAINED.get(stage, "").split())
    for name in now:
        if stage == "tokenizer":
            break  # starts afresh, not from the checkpoint's
        moved = not torch.equal(was[name], now[name])
        assert moved == (name.split(".")[0] in trained), name
    lines = log(trainer)
    parts = {"vocoder": ["mel"], "flow": ["flow"], "tokenizer": ["ctc"]}.get(stage, PARTS)

    def loss(line):
        return sum(v for k, v in line.items() if k in parts)
    first, last = (sum(map(loss, lines[i:i + 5])) for i in (0, len(lines) - 5))
    enough = 0.25 if learns else 0.97 if "adapter" in trained else 0.9
    assert last < first * enough, (first, last)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for name in set(os.listdir(checkpoint)) - {file}:  # and the folder is a whole checkpoint
        assert os.path.exists(os.path.join(trainer.args.out, name)), name


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_as_fp32_does(run, lists, checkpoint, stage):
    """Nearly the same losses, the weights and what is saved in fp32; also Muon, ear and guide."""
    flags = {"vocoder": dict(mel_only=2), "tokenizer": dict(quantise_after=1)}.get(
        stage, dict(muon=True, ear=0.5, guide=0.5)) | {"lr": 0.001}
    both = [run(stage, of(lists, stage), f"{n} bits", steps=4, valid=of(lists, stage)[0],
                valid_every=4, valid_batches=1, **flags, **more)
            for n, more in ((32, {}), (16, {"bf16": True}))]
    for line, rough in zip(*map(log, both)):  # later ones drop out other units
        assert line.keys() == rough.keys()
        names = line.keys() & {*PARTS, "mel", "flow"} if line["step"] > 1 else \
            line.keys() - {"stage", "rate", "wait", "minutes", "gb"}
        for name in names:
            assert rough[name] == pytest.approx(line[name], rel=0.1), (line["step"], name)
    exact, rough = (t.trainee.module.state_dict() for t in both)
    assert {v.dtype for v in rough.values()} == {v.dtype for v in exact.values()}
    assert any(not torch.equal(v, exact[k]) for k, v in rough.items())


def test_stage_one_may_train_the_decoder_of_a_small_model(run, lists):
    assert STAGES["align"].trains == ("adapter",)
    trainer = run("align", lists["align"], trains=["adapter", "decoder"], steps=0)
    trained = {n.split(".")[0] for n, p in trainer.trainee.module.named_parameters()
               if p.requires_grad}
    assert trained == {"adapter", "decoder"} and STAGES["align"].trains == ("adapter",)


def test_speech_rows_and_head_train_in_stage_two(run, lists, checkpoint):
    now = read_weights(os.path.join(run("tts", of(lists, "tts"), steps=2).args.out,
                                    "model.safetensors"))
    was = read_weights(str(checkpoint / "model.safetensors"))
    for name in ("speech_embed.weight", "speech_head.weight", "speech_head.bias"):
        assert not torch.equal(now["decoder." + name], was["decoder." + name])


# ---- what is not in the paper: --ear and --guide, and the cache of a frozen encoder ------------

def test_the_ear_learns_words_and_labels(run, lists, checkpoint):
    trainer = run("align", [lists["asrp"]], steps=30, ear=2.0, ear_first=20, lr=0.03, warmup=5)
    lines = log(trainer)
    assert all({"ctc", "letters", "cue_emotion"} <= line.keys() for line in lines)
    assert [("asr" in line, "p" in line) for line in lines] == [(i >= 20,) * 2 for i in range(30)]
    for name in ("ctc", "letters", "cue_emotion"):
        assert lines[19][name] < 0.8 * lines[0][name]
    saved = read_weights(os.path.join(trainer.args.out, "model.safetensors"))
    assert saved.keys() == read_weights(str(checkpoint / "model.safetensors")).keys()
    again = run("align", [lists["asrp"]], init=trainer.args.out, out="again", steps=0, ear=1.0)
    for mine, theirs in zip(*(t.trainee.module.ear.parameters() for t in (trainer, again))):
        assert torch.equal(mine, theirs)  # a later stage goes on with the same heads
    with torch.no_grad():  # the losses add up, the ear's by its weight
        record = next(train.data.records(lists["asrp"]))
        batch = trainer.trainee.collate([made(record, trainer.trainee.tok)], "")
        trainer.trainee.module.eval()
        loss, stats = trainer.trainee.loss("model", batch)
    asr, p, *ear = (float(stats[k][0]) for k in ("asr", "p", "ctc", "letters", "cue_emotion"))
    want = (asr + p) / int((batch["targets"] != -100).sum()) + 2 * sum(ear)
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_unknown_labels_are_no_cue(tok, wav):
    got = made({"task": "<TRANSCRIBE> <AGE> <GENDER> <EMOTION> <EVENT>", "wav": wav(0.5),
                "txt": "the user<OLD><&&><SAD><&&>"}, tok)
    assert got.cues == [2, -100, 1, -100] and counts(got)["asr"] == 2


@pytest.mark.parametrize("stage", ["tts", "empathy"])
def test_the_guided_head_learns_where_to_look(run, lists, stage):
    lines = log(run(stage, of(lists, stage), steps=30, guide=3.0, lr=0.01, batch_tokens=10000))
    # (interleaved, the first 6 tokens may all be a tag: then the first codes have nowhere to look)
    assert lines[-1]["guide"] < 0.9 * lines[0]["guide"] < 9


def test_when_what_is_said(tok):
    ids = tok.encode("<SAD>the user, said")
    times = said_at(ids, tok, 4.0, *tagless("<SAD>the user, said"))
    first = next(i for i, t in enumerate(times) if t > NEVER)
    assert tok.decode(ids[:first]) == "<SAD>" and times[first:] == sorted(times[first:])
    comma = next(i for i in range(len(ids)) if tok.decode(ids[i:i + 1]) == ",")
    # 14 characters and a mark worth 3 in 4 s: 8 before it, 5 after
    assert times[comma] == pytest.approx((8 + 1.5) / 16 * 4) and 0 < times[first] < times[-1] < 4


def test_a_frozen_encoder_hears_a_clip_once_as_far_as_memory_goes(run, lists, monkeypatch):
    heard, encode = [], train.echat.Encoder.forward
    monkeypatch.setattr(train.echat.Encoder, "forward",
                        lambda self, mel, n: heard.append(len(mel)) or encode(self, mel, n))
    runs, rooms = [], [(10**9, 2, 2), (0, 12, 0)]  # bytes, clips encoded in six steps, kept
    for room, times, kept in rooms:
        monkeypatch.setattr(train, "HEARD", room)
        heard.clear()
        runs.append(run("align", lists["align"], f"r{room}", steps=6, batch_tokens=10000))
        assert heard == [1] * times and len(runs[-1].trainee.heard) == kept
        if kept == 2:  # of different lengths: room for either of the two
            rooms.append((max(x.nbytes for x in runs[0].trainee.heard.values()), 1 + 6, 1))
    losses = [[line["asr"] for line in log(r)] for r in runs]
    assert losses[0] == losses[1] == losses[2]
    assert not run("understand", lists["understand"]).trainee.heard


# ---- the loop ----------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, flags", [
    ("text", {}), ("vocoder", {"mel_only": 3}), ("align", {"augment": True, "accum": 2}),
    ("align", {}),
    ("flow", {}), ("s2s", {}), ("s2s", {"muon": True}), ("tokenizer", {"quantise_after": 1}),
    ("tokenizer", {"quantise_after": 5})])  # stopped amid the features that k-means will need
def test_a_resumed_run_is_the_uninterrupted_one(run, lists, stage, flags):
    """Bit for bit, at a step in the middle of an epoch, with dropout and mixed lists."""
    data = of(lists, stage) + ([lists["t2t"], lists["asr"]] if stage == "s2s" else
                               [lists["p"]] if stage == "align" else [])  # the same clips again
    flags = flags | dict(batch_tokens=150 if stage in TRAINED else 100)
    whole = run(stage, data, "whole", steps=7, **flags)
    run(stage, data, "parts", steps=4, **flags)
    parts = run(stage, data, "parts", steps=7, resume=True, **flags)
    a, b = (torch.load(os.path.join(t.args.out, "state.pt"), weights_only=True)
            for t in (whole, parts))
    assert a["step"] == b["step"] == 7 and a["data"] == b["data"]
    assert all(torch.equal(v, b["module"][k]) for k, v in a["module"].items())
    file = FILES.get(stage, "model") + ".safetensors"
    a, b = (open(os.path.join(t.args.out, file), "rb").read() for t in (whole, parts))
    assert a == b

    def losses(trainer):
        return [{k: v for k, v in line.items() if k not in ("rate", "wait", "minutes", "gb")}
                for line in log(trainer)]
    assert losses(whole) == losses(parts)


def test_a_run_goes_on_from_its_own_folder(run, spoken, checkpoint):
    """--resume without --init: what the stage leaves as it is stays, too."""
    run("vocoder", [spoken[0]], batch_tokens=400, mel_only=3)
    trainer = run("vocoder", [spoken[0]], init=None, steps=2, resume=True, batch_tokens=400,
                  mel_only=3)
    was, now = (read_weights(os.path.join(folder, "token2wav.safetensors"))
                for folder in (checkpoint, trainer.args.out))
    assert was.keys() == now.keys()
    same = {k.partition(".")[0]: torch.equal(v, now[k]) for k, v in was.items()}
    assert same == {"flow": True, "vocoder": False}


def test_a_run_goes_on_from_before_its_first_step_and_after_its_last_epoch(run, lists):
    data, flags = [lists["asr"]], dict(batch_tokens=30)
    whole = run("align", data, "whole", steps=None, epochs=2, **flags)
    for more in ({"steps": 0}, {"steps": None, "epochs": 1, "resume": True},
                 {"steps": None, "epochs": 2, "resume": True}):
        parts = run("align", data, "parts", **flags, **more)
    assert parts.step == whole.step == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.trainee.module.parameters(),
                                                 parts.trainee.module.parameters()))


def test_a_worker_process_changes_nothing(run, lists):
    a, b = (run("align", lists["align"], f"w{n}", steps=3, workers=n) for n in (0, 1))
    assert torch.equal(*(torch.cat([p.flatten() for p in t.trainee.module.parameters()])
                         for t in (a, b)))


def as_rank(rank, port, words, dies_at):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = words
    sys.stderr = open(words[words.index("--out") + 1] + f".{rank}", "w", buffering=1)
    if rank:
        loss = Dialogue.loss
        Dialogue.loss = lambda self, turn, batch: loss(self, turn, batch) if self.step != dies_at \
            else os._exit(9)
    train.main()


def two(stage, lists, init, out, *more, dies_at=None) -> list:
    """Exit codes of two processes that train to a folder out; what they say is beside it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = f"train.py --stage {stage} --init {init} --lr 0.01 --warmup 1 --accum 1 --workers 0 " \
        f"--log-every 1 --device cpu --batch-tokens 150 --out {out} --data {of(lists, stage)[0]}"
    words = [*words.split(), *more]
    context = multiprocessing.get_context("fork")  # spawned ones would import torch anew
    ranks = [context.Process(target=as_rank, args=(rank, port, words, dies_at))
             for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize("stage, flags", [("text", []), ("text", ["--muon"]),
                                          ("s2s", ["--shard"])])
def test_two_processes_are_one_with_twice_the_accumulation(run, lists, tmp_path, checkpoint, stage,
                                                           flags):
    """Also if they go on with what one has begun: no record is repeated or left out. What they
    leave behind, sharded or not, is a whole checkpoint, from which one process goes on."""
    init = copy_of(checkpoint, tmp_path / "init")
    config = (init / "config.json").read_text()
    (init / "config.json").write_text(config.replace('"dropout": 0.1', '"dropout": 0.0'))
    same = dict(accum=2, batch_tokens=150, valid=lists["t2t"], valid_every=3, valid_batches=2,
                init=init) | ({"muon": True} if "--muon" in flags else {})
    one = run(stage, of(lists, stage), "one", steps=4, **same)
    run(stage, of(lists, stage), "two", steps=1, **same)
    codes = two(stage, lists, init, tmp_path / "two", "--resume", "--steps", "3", "--valid",
                lists["t2t"], "--valid-every", "3", "--valid-batches", "1", *flags)
    assert codes == [0, 0], [open(f"{tmp_path}/two.{rank}").read() for rank in range(2)]
    assert len(torch.load(tmp_path / "two/state.pt", weights_only=True)["rng"]) == 2
    last = run(stage, of(lists, stage), "two", steps=4, resume=True, **same)
    assert len(log(last)) == len(log(one)) == 5  # four steps and the held-out loss
    for a, b in zip(log(one), log(last)):
        for name in a.keys() & {*PARTS, "valid_text", "valid_loss"}:
            assert abs(a[name] - b[name]) < 1e-5
        assert a.get("reply") == b.get("reply")
    was, now = (read_weights(str(tmp_path / n / "model.safetensors")) for n in ("one", "two"))
    for name in was:
        torch.testing.assert_close(was[name], now[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage, flags", [
    ("flow", []), ("vocoder", ["--mel-only", "1"]), ("tokenizer", ["--quantise-after", "1"])])
def test_what_the_paper_takes_as_given_trains_by_two_processes(lists, tmp_path, checkpoint, stage,
                                                               flags):
    codes = two(stage, lists, checkpoint, tmp_path / "two", "--steps", "3", "--valid-every", "3",
                "--valid", of(lists, stage)[0], "--valid-batches", "1", *flags)
    assert codes == [0, 0], [open(f"{tmp_path}/two.{rank}").read() for rank in range(2)]
    last = json.loads(open(tmp_path / "two/log.jsonl").readlines()[-1])
    assert last["step"] == 3 and math.isfinite(last["valid_loss"])


def test_a_dead_rank_ends_the_run(lists, tmp_path, checkpoint):
    codes = two("text", lists, checkpoint, tmp_path / "out", dies_at=2)
    said = (tmp_path / "out.0").read_text().splitlines()
    assert codes == [1, 9] and said[0].startswith("step 1 ")
    assert "rank 0 stops, another one is gone" in said[-1]


def test_checkpoints_are_kept_and_the_best_of_them(run, lists, monkeypatch, checkpoint):
    losses = iter([9.0, 9.0, 3.0, 9.0, 9.0, 1.0, 9.0, 9.0, 2.0])  # every third is the held-out one
    monkeypatch.setattr(train.Trainer, "means", lambda self, sums: {"loss": next(losses)})
    flags = dict(valid=lists["text"], valid_every=2, save_every=1, keep=2, valid_batches=1)
    trainer = run("text", lists["text"], steps=6, **flags)
    out = trainer.args.out
    folders = {n for n in os.listdir(out) if os.path.isdir(os.path.join(out, n))}
    assert folders == {"step-5", "step-6", "best"} and trainer.best == 1.0
    for folder, step in (("best", 4), ("step-5", 5), ("step-6", 6)):
        state = torch.load(os.path.join(out, folder, "state.pt"), weights_only=True)
        assert state["step"] == step and set(os.listdir(os.path.join(out, folder))) == {
            "config.json", "state.pt", *(p.name for p in checkpoint.iterdir())}
        weights = read_weights(os.path.join(out, folder, "model.safetensors"))
        assert torch.equal(weights["decoder.norm.weight"], state["module"]["decoder.norm.weight"])
    replies = [line["reply"] for line in log(trainer) if "reply" in line]
    assert len(replies) == 3 and all(r.endswith("[0 codes]") for r in replies)
    again = run("text", lists["text"], "out/step-5", steps=5, resume=True)
    assert again.step == 5 and again.best == 1.0
    losses = iter([9.0, 0.5])  # a better one without --keep: what was kept stays
    run("text", lists["text"], steps=7, resume=True, **flags | {"keep": 0, "valid_every": 7})
    assert folders == {n for n in os.listdir(out) if os.path.isdir(os.path.join(out, n))}
    state = torch.load(os.path.join(out, "best", "state.pt"), weights_only=True)
    assert state["step"] == 7 and state["best"] == 0.5


@pytest.mark.parametrize("stage", ["tts", "empathy", "understand"])
def test_a_sample_reply_of_every_kind(run, lists, stage):
    reply = log(run(stage, of(lists, stage), valid=of(lists, stage), valid_every=1))[-1]["reply"]
    codes = int(re.search(r" \[(\d+) codes\]$", reply)[1])
    assert codes > 0 if stage == "tts" else codes == 0 or stage == "empathy"


def test_rejects_are_in_the_log(run, lists, tmp_path):
    bad = {"txt": "hi", "task": "<TRANSCRIBE>"}
    path = write_list(tmp_path / "l", [json.loads(open(lists["asr"]).readline()),
                                       bad | {"wav": "gone.wav"}, bad, {"txt": "hi"}])
    for workers in (0, 1):
        line = log(run("align", [path], f"w{workers}", steps=3, workers=workers))[0]
        assert line["rejected"] == {"no such file": 1, "no wav": 1, "no task": 1}


@pytest.mark.parametrize("stage", ["align", "flow", "vocoder", "tokenizer"])
def test_audio_that_is_damaged_behind_its_header_is_left_out(run, tmp_path, wav, stage):
    """NaN in the samples: found only when they are read. Nothing is learned from it, and the run
    goes on; a batch of clips with nothing else ends it."""
    broken = str(tmp_path / "nan.wav")
    soundfile.write(broken, np.full(16000, np.nan), 16000, subtype="FLOAT")
    task = "<TRANSCRIBE>" if stage == "align" else "<TEXT2TOKEN>"
    rows = [{"txt": "hello", "task": task, "wav": path, "extra": {"speech_token": some_codes(25)}}
            for path in (broken, wav(1.0, 200, 24000))]
    both, good, bad = (write_list(tmp_path / f"{name}.jsonl", part) for name, part in (
        ("both", rows), ("good", rows[1:]), ("bad", rows[:1])))
    trainer = run(stage, [both], "both", steps=3, batch_tokens=10000)
    lines = log(trainer)
    assert [line["rejected"] for line in lines] == [{"holds samples that are not numbers": n}
                                                    for n in (1, 2, 3)]
    alone = run(stage, [good], "good", steps=3, batch_tokens=10000)
    if stage == "align":  # dropout differs after the first step
        assert lines[0]["asr"] == pytest.approx(log(alone)[0]["asr"], rel=0.02)
        now, was = (t.trainee.module.state_dict() for t in (
            run(stage, [bad], "bad", steps=2, weight_decay=0), run(stage, [bad], "was", steps=0)))
        assert all(torch.equal(v, was[k]) for k, v in now.items())
    else:
        with pytest.raises(SystemExit):
            run(stage, [bad], "bad", steps=2)


def test_a_stage_ends_after_the_papers_epochs(run, lists):
    assert [STAGES[s].epochs for s in TRAINED] == [math.inf, 1, 1, 1, 1, 2, 2, 1, 1]
    for stage, epochs in (("align", 1), ("tts", 2)):
        args = run(stage, lists[stage] if stage == "align" else [lists["tts"]], steps=0).args
        assert args.epochs == math.inf  # as there are --steps
        trainer = run(stage, [lists["asr" if stage == "align" else "tts"]], f"{stage} whole",
                      steps=None, batch_tokens=30)
        lines = log(trainer)
        assert [line["epoch"] for line in lines] == sorted([*range(epochs)] * 2)


def test_a_batch_weighs_each_token_once(run, lists, tmp_path):
    """Two unequal batches in one step teach what one batch of all their samples does."""
    rows = [{"txt": txt, "task": "<TEXT2TEXT>", "extra": {"question": "hello"}}
            for txt in ("hello", "the user said how are you today")]
    path = write_list(tmp_path / "two", rows)
    once, twice = (run("text", [path], f"{n}", steps=1, accum=n, batch_tokens=size).trainee.module
                   for n, size in ((1, 10000), (2, 20)))
    for a, b in zip(once.parameters(), twice.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_clip():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert train.clip(gradients, 10.0) == 5 and gradients[1].item() == 4
    assert train.clip(gradients, 1.0) == 5 and gradients[0][0].item() == pytest.approx(0.6)
    assert gradients[1].item() == pytest.approx(0.8)


def test_mfu_counts_what_is_trained(run, lists, tok, wav):
    trainee = run("align", lists["align"], steps=0).trainee
    sample = made({"task": "<TRANSCRIBE>", "wav": wav(0.8), "txt": "hello"}, tok)
    batch = trainee.collate([sample], "")

    def n(part):
        return sum(p.numel() for p in part.parameters())
    net, targets = trainee.module, int((batch["targets"] != -100).sum())
    assert trainee.flops(batch | {"size": 70, "weight": targets}) == (
        4 * n(net.decoder.layers) * 70 + 4 * 303 * 16 * targets + 6 * n(net.adapter) * 10
        + 2 * n(net.encoder) * 40)


def poison(monkeypatch, bad):
    """The loss is NaN at the steps for which bad(step)."""
    loss = Dialogue.loss

    def poisoned(self, turn, batch):
        value, stats = loss(self, turn, batch)
        return value * (math.nan if bad(self.step) else 1.0), stats
    monkeypatch.setattr(Dialogue, "loss", poisoned)


def test_a_bad_step_is_skipped(run, lists, monkeypatch, checkpoint):
    poison(monkeypatch, lambda step: step <= 3)
    trainer = run("text", lists["text"], steps=3)
    now, was = (read_weights(os.path.join(f, "model.safetensors"))
                for f in (trainer.args.out, checkpoint))
    assert trainer.bad == 3 and all(torch.equal(now[k], was[k]) for k in was)
    assert all("text" not in line for line in log(trainer))
    assert [line["skipped"] for line in log(trainer)] == [1, 2, 3]
    trainer = run("text", lists["text"], steps=4, resume=True)
    assert trainer.bad == 0 and log(trainer)[-1]["skipped"] == 3
    assert all(p.isfinite().all() for p in trainer.trainee.module.parameters())


def test_ten_bad_steps_in_a_row_end_the_run(run, lists, monkeypatch, capsys):
    poison(monkeypatch, lambda step: step % 10)  # nine, again and again: goes on
    assert run("text", lists["text"], "nine", steps=25).step == 25
    poison(monkeypatch, lambda step: True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run("text", lists["text"], "ten", steps=25)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "10 steps in a row" in said and "last at 10" in said


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("bf16, near", [(False, 1e-3), (True, 0.03)])
def test_orthogonal_steps(shape, bf16, near):
    """All directions of a gradient, down to a hundredth of the largest, move about alike."""
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.manual_seed(0)), False)
    sizes = torch.logspace(0, -2, min(shape))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        made = orthogonal(u @ torch.diag(sizes) @ v)
    assert made.shape == shape and made.dtype == torch.float32
    sizes = torch.linalg.svdvals(made)
    assert 0.6 < sizes.min() and sizes.max() < 1.3
    inside = u.T @ made @ v.T  # same directions
    assert (inside - inside.diagonal().diag()).abs().max() < near


@pytest.mark.parametrize("shape", [(320, 768), (768, 320), (384, 384)])
def test_orthogonal_steps_of_a_poor_gradient_do_not_explode(shape):
    """What bf16 rounds grows in five turns; where a gradient has but three directions, too."""
    few = (torch.randn(n, 3, generator=torch.manual_seed(n)) for n in shape)
    with torch.autocast("cpu", torch.bfloat16):
        sizes = torch.linalg.svdvals(orthogonal(next(few) @ next(few).T))
    assert sizes[2] > 0.6 and sizes[0] < 1.3


def test_learning_rate():
    def rate(step, lr=5e-6, warmup=8000, steps=10**9, cooldown=0):
        return learning_rate(step, SimpleNamespace(lr=lr, warmup=warmup, steps=steps,
                                                   cooldown=cooldown))
    assert rate(1) == pytest.approx(5e-6 / 8000)
    assert rate(4000) == pytest.approx(2.5e-6)
    assert rate(8000) == pytest.approx(5e-6)
    assert rate(32000) == pytest.approx(2.5e-6)
    rates = [rate(s, 1.0, 10) for s in range(1, 50)]
    assert max(rates) == rates[9] == 1 and rates[:10] == sorted(rates[:10])
    assert rate(1, 1.0, 0) == 1
    assert rate(90, 1.0, 1, 100, 10) == rate(90, 1.0, 1)  # the last 10 of 100 steps fall to 0
    assert rate(95, 1.0, 1, 100, 10) == pytest.approx(rate(95, 1.0, 1) * 0.6)
    assert rate(100, 1.0, 1, 100, 10) == pytest.approx(rate(100, 1.0, 1) * 0.1)


def test_weights_of_lists():
    assert train.weighted("a.jsonl") == ("a.jsonl", 1.0)
    assert train.weighted("a:b.jsonl:0.1") == ("a:b.jsonl", 0.1)
    assert train.weighted("a:3") == ("a", 3.0) and train.weighted("c:/x.y") == ("c:/x.y", 1.0)


def test_show_prints_and_stops(run, lists, tmp_path, capsys):
    run("empathy", [of(lists, "s2s")[0] + ":0.5"], show=1)
    said = capsys.readouterr().out
    assert said.count("\n\n") == 1 and "\033[35m" in said  # the think has its colour
    assert "~" * 13 in said.replace("\033[90m", "") and "<&&>" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_lists_end_with_one_line(run, lists, tmp_path, capsys, workers):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]\n")
    none = write_list(tmp_path / "none.jsonl", [{"txt": "a", "task": "<TRANSCRIBE>"}])
    for path, words in ((bad, "bad.jsonl:1: not a JSON record"), (none, "{'no wav': 1}"),
                        (tmp_path / "no.jsonl", "No such file")):
        with pytest.raises(SystemExit) as end:
            run("align", [str(path)], workers=workers)
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and words in said and len(said.splitlines()) == 1


def test_bad_checkpoints_end_with_one_line(run, lists, tmp_path, checkpoint, capsys):
    broken = copy_of(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no")
    save_weights(str(tmp_path / "other"), {"encoder.positional_embedding": torch.ones(9, 16)})
    for init, flags, words in ((broken, {}, "expected safetensors, found"),
                               (tmp_path, {}, "not a readable tokenizer.json"),
                               (checkpoint, {"resume": True}, "cannot resume"),
                               (checkpoint, {"resume": True, "out": "adamw", "muon": True},
                                "cannot resume"),
                               (checkpoint, {"preset": "paper"}, "tiny, not --preset paper"),
                               (checkpoint, {"whisper": tmp_path / "other"},
                                "expected the weights of Whisper")):
        if "out" in flags:
            run("text", lists["text"], flags["out"])
            capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run("text", lists["text"], init=init, **flags)
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and words in said and len(said.splitlines()) == 1
