"""The command line: several wavs, odd wavs, a released file; what it needs, says and answers."""

import io
import json
import resource
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import CODES, copy_of, tiny_config, tone
from test_model import released

import infer
import model as echat
from decoder import StaticCache
from infer import Reply
from vocoder import HiFT, VocoderConfig


@pytest.fixture
def file(tmp_path):
    torch.save(released()[1], tmp_path / "tag_think_final.pt")
    return str(tmp_path / "tag_think_final.pt")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(words of the command line) -> exit code, stdout, stderr."""
    def command(*words):
        monkeypatch.setattr("sys.argv", ["infer.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            infer.main()
        return end.value.code, *capsys.readouterr()
    return command


def test_text_tasks_need_file_and_tokenizer_only(file, tokenizer_folder, run, wav):
    for task, more in (("s2t", [wav(1.0)]), ("understand", [wav(1.0)]),
                       ("t2t", ["--text", "hello"])):
        code, out, err = run("--model", file, "--tokenizer", tokenizer_folder, "--task", task,
                             "--max-tokens", 5, "--json", "--device", "cpu", *more)
        assert code == 0, err
        answer = json.loads(out)
        assert answer["task"] == task and answer["audio"] is None


def test_what_is_missing_is_asked_for(file, tokenizer_folder, checkpoint, run, wav, tmp_path):
    tokenizer = ("--tokenizer", tokenizer_folder)
    wave = wav(1.0)
    for words, asked in (
            ((wave, "--model", file, "--task", "s2t"), "--tokenizer"),
            ((wave, "--model", file, *tokenizer), "--token2wav"),
            ((wave, "--model", file, "--tokenizer", tmp_path, "--task", "s2t"), "tokenizer.json"),
            (("--model", "small", "--task", "t2t", "--text", "hi"),
             "python model.py small --whisper FILE --llm DIR"),
            ((wave, "--model", tmp_path / "none.pt", *tokenizer, "--task", "s2t"), "none.pt")):
        code, out, err = run(*words)
        assert code == 2 and asked in err and err.count("\n") == 1 and not out, err


def test_our_token2wav_can_speak_for_it(file, tokenizer_folder, checkpoint, run, tmp_path):
    code, out, err = run("--model", file, "--tokenizer", tokenizer_folder, "--task", "tts",
                         "--text", "hello", "--token2wav", checkpoint, "--max-tokens", 9, "--json",
                         "--out", tmp_path / "a.wav")
    assert code == 0, err
    assert json.loads(out)["sample_rate"] == 24000


def test_the_released_token2wav_needs_a_voice_keeps_its_rate_and_streams(
        file, tokenizer_folder, checkpoint, run, tmp_path, monkeypatch):
    """Its own loaders are tested where they are; here they are replaced by something small."""
    flow = tiny_config().flow
    flow.causal, flow.chunk, flow.frames_per_code = False, 0, 22050 / 256 / 25
    flow.left_chunks = flow.look_ahead = 0
    hift = VocoderConfig("hift", 22050, hop=256, channels=16, rates=(8, 8), kernels=(16, 16))
    monkeypatch.setattr(echat.FlowConfig, "cosyvoice1", classmethod(lambda cls: flow))
    monkeypatch.setattr(echat, "hift", lambda: hift)
    monkeypatch.setattr(echat, "load_cosyvoice1", lambda state: state)
    state = released()[1]
    state["speech_head.bias"][CODES] = -1e4  # says no end, but for --max-tokens
    torch.save(state, file)
    torch.save(echat.Flow(flow).state_dict(), tmp_path / "flow.pt")
    torch.save(HiFT(hift).state_dict(), tmp_path / "hift.pt")
    words = ("--model", file, "--tokenizer", tokenizer_folder, "--task", "tts", "--text", "hello",
             "--token2wav", tmp_path, "--max-tokens", 50, "--json", "--out", tmp_path / "a.wav")
    code, _, err = run(*words)
    assert code == 2 and "--voice" in err
    voice = echat.read_weights(str(checkpoint / "voice.safetensors"))
    voice["prompt_mel"] = voice["prompt_mel"][:, :flow.frames(6)]
    echat.save_weights(str(tmp_path / "v.safetensors"), voice)
    code, out, err = run(*words, "--voice", tmp_path / "v.safetensors")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["sample_rate"] == 22050 and answer["codes"] > 0
    assert round(answer["seconds"] * 22050) // 256 == flow.frames(answer["codes"])
    code, out, err = run(*words, "--voice", tmp_path / "v.safetensors", "--stream")
    *events, done = answers_of(out)
    samples = [e["samples"] for e in events if e["event"] == "audio"]
    assert code == 0 and len(samples) > 1 and sum(samples) == 256 * flow.frames(done["codes"]), err
    assert done["codes"] == answer["codes"] > 18
    shutil.copy(file, tmp_path / "flow.pt")  # another model's weights
    code, _, err = run(*words, "--voice", tmp_path / "v.safetensors")
    assert code == 2 and "flow" in err and err.count("\n") == 1, err


def test_codes_that_do_not_match_are_told(file, tokenizer_folder, checkpoint, run, tmp_path):
    state = released()[1]
    state["speech_head.weight"] = torch.zeros(CODES + 9, 32)
    state["speech_head.bias"] = torch.zeros(CODES + 9)
    state["speech_token_emded.weight"] = torch.zeros(CODES + 11, 32)
    torch.save(state, file)
    code, _, err = run("--model", file, "--tokenizer", tokenizer_folder, "--task", "tts", "--text",
                       "hello", "--token2wav", checkpoint)
    assert code == 2 and "codes" in err


def answers_of(out: str) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "timings"}
            for line in out.splitlines()]


@pytest.mark.parametrize("more", [["--task", "s2s", "--interleave", "--max-tokens", 70],
                                  ["--task", "understand", "--max-tokens", 9]])
def test_several_wavs_are_answered_as_one_by_one(checkpoint, run, wav, tmp_path, more):
    wavs = [wav(0.5 + n / 9, 150 + 40 * n) for n in range(9)]  # eight and one
    alone, words = [], ["--model", checkpoint, "--json", "--out", f"{tmp_path}/", *more]
    for name in wavs:
        alone += answers_of(run(name, *words)[1])
    sound = [sf.read(a["audio"])[0] for a in alone if a["audio"]]
    code, out, err = run(*wavs[:2], tmp_path / "none.wav", *wavs[2:], *words)
    assert code == 2 and err.count("\n") == 1 and "none.wav: no such file" in err
    assert answers_of(out) == alone and len({str(a["text"]) for a in alone}) > 1
    for a, was in zip(alone, sound):
        assert np.array_equal(sf.read(a["audio"])[0], was)


def test_compiled_it_says_the_same(checkpoint, run, wav, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "StaticCache", partial(StaticCache, backend="aot_eager"))
    for task in (["--task", "tts", "--text", "hello"], ["--task", "s2t", wav(0.7)]):
        said = []
        for more in ([], ["--compile"]):
            code, out, err = run("--model", checkpoint, "--json", "--max-tokens", 60, "--out",
                                 tmp_path / "a.wav", *task, *more)
            assert code == 0, err
            [answer] = answers_of(out)
            wave = answer["audio"] and sf.read(answer["audio"])[0].tolist()
            said.append(answer | {"audio": wave})
        assert said[0] == said[1] and bool(said[0]["audio"]) == ("tts" in task)


def test_what_cannot_be_compiled_is_one_line(checkpoint, run, monkeypatch):
    def fails(*_):
        raise RuntimeError("No working C++ compiler found\n\nmore")
    monkeypatch.setattr(StaticCache, "step", fails)
    code, out, err = run("--model", checkpoint, "--task", "tts", "--text", "hello", "--compile")
    assert code == 2 and "No working C++ compiler" in err and err.count("\n") == 1 and not out


def damaged(path, cut):
    path.write_bytes(path.read_bytes()[:cut])


ODD = {  # what is written to the wav, what is told; "" = there is a reply
    "empty": (lambda p: p.write_bytes(b""), "not a readable audio file"),
    "text": (lambda p: p.write_text("hello"), "not a readable audio file"),
    "folder": (lambda p: p.mkdir(), "not a readable audio file"),
    "header": (lambda p: (sf.write(p, tone(1.0), 16000), damaged(p, 44)), "no samples"),
    "cut": (lambda p: (sf.write(p, tone(1.0), 16000), damaged(p, 20000)), ""),
    "silent": (lambda p: sf.write(p, np.zeros(16000), 16000), "silence"),
    "constant": (lambda p: sf.write(p, np.full(16000, 0.5), 16000), "silence"),
    "nan": (lambda p: sf.write(p, np.full(16000, np.nan), 16000, "FLOAT"), "not numbers"),
    "infinite": (lambda p: sf.write(p, np.full(16000, np.inf), 16000, "FLOAT"), "not numbers"),
    "short": (lambda p: sf.write(p, tone(0.05), 16000), "0.05 s of audio, too short"),
    "long": (lambda p: sf.write(p, tone(600, 8000), 8000), "600 s of audio, the limit is 200 s"),
    **{subtype: (lambda p, subtype=subtype: sf.write(p, tone(0.5), 16000, subtype), "")
       for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")},
    **{f"{rate} Hz": (lambda p, rate=rate: sf.write(p, tone(0.5, rate), rate), "")
       for rate in (8000, 11025, 44100, 48000)},
    "stereo": (lambda p: sf.write(p, np.stack([tone(0.5)] * 2, 1), 16000), ""),
    "mirrored": (lambda p: sf.write(p, np.stack([tone(0.5), -tone(0.5)], 1), 16000), ""),
    "loud": (lambda p: sf.write(p, 1e4 * tone(0.5), 16000, "FLOAT"), ""),
    "huge": (lambda p: sf.write(p, 1e38 * tone(0.5), 16000, "FLOAT"), ""),
}


def test_odd_wavs_get_a_reply_or_one_line(checkpoint, run, tmp_path):
    for name, (write, _) in ODD.items():
        write(tmp_path / f"{name}.wav")
    out = tmp_path / "out"
    code, told, err = run(*(tmp_path / f"{name}.wav" for name in ODD), "--model", checkpoint,
                          "--json", "--out", f"{out}/", "--max-tokens", 30, "--think", "off")
    lines, replies = err.splitlines(), [json.loads(line)["wav"] for line in told.splitlines()]
    wrong = {name: words for name, (_, words) in ODD.items() if words}
    assert code == 2 and len(lines) == len(wrong), err
    for (name, words), line in zip(wrong.items(), lines):
        assert f"{name}.wav: " in line and words in line and "Traceback" not in line
    assert replies == [str(tmp_path / f"{name}.wav") for name in ODD if name not in wrong]
    assert all(p.name.endswith(".reply.wav") for p in out.iterdir())


def test_floats_of_any_size_sound_alike(checkpoint, run, tmp_path):
    said = []
    for size in (1, 1e38):
        sf.write(tmp_path / "a.wav", size * tone(0.5), 16000, "DOUBLE")
        said += answers_of(run(tmp_path / "a.wav", "--model", checkpoint, "--task", "understand",
                               "--json", "--max-tokens", 20)[1])
    assert said[0] == said[1] and said[0]["cut"]


@pytest.mark.parametrize("task, interleave, said, whole", [
    ("s2s", False, "a a . | 5 5 |", True), ("s2s", False, "a a . |", False),
    ("s2s", False, "a a . | 5", False), ("s2s", False, "a a", False),
    ("s2s", True, "a a 5 5 a . 5 |", True), ("s2s", True, "a a 5 5 a .", False),
    ("tts", False, "5 5 |", True), ("tts", False, "5 5", False), ("tts", False, "|", True)])
def test_a_reply_is_whole_once_its_speech_closes(tok, task, interleave, said, whole):
    """a text, . its end, 5 a code, | what opens speech and closes it, one code for both."""
    bot = SimpleNamespace(
        tok=tok, voice=True, history=[], model=SimpleNamespace(cfg=tiny_config()),
        args=SimpleNamespace(task=task, interleave=interleave, stream=False))
    reply = Reply(bot, None, "")
    for word in said.split():
        phase, token = {"a": ("text", tok.encode("a")[0]), ".": ("text", tok.im_end),
                        "5": ("speech", 5), "|": ("speech", CODES)}[word]
        list(reply.take(phase, token))
    assert reply.whole == whole


@pytest.mark.parametrize("task, said, want", [
    ("understand", "hi<laugh><middle_age><female>", dict(
        event="LAUGH", age="ADULT", gender="FEMALE", emotion=None)),  # in the order of the demo
    ("understand", "hi<OLD><FEMALE><ANGRY><&&>", dict(
        age="OLD", gender="FEMALE", emotion="ANGER", event=None)),
    ("understand", "hi<other>", dict(event="OTHER", emotion=None)),
    ("s2t", echat.label_think("zh", "hi", dict(
        age="<ADULT>", emotion="<ANGRY>", reply_emotion="\u4e2d\u7acb")) + "<\u60b2\u4f24>yes", dict(
            age="ADULT", gender=None, emotion="ANGER", reply_emotion="SAD"))])
def test_labels_in_the_released_spelling_are_ours(tok, task, said, want):
    bot = SimpleNamespace(tok=tok, args=SimpleNamespace(
        task=task, think="label", labels=["asr", "emotion", "gender", "age", "event"]))
    got = infer.Chatbot.read(bot, tok.encode(said))
    assert got["transcript"] == "hi" and want.items() <= got["labels"].items()
    assert got["text"].startswith("hi" if task == "understand" else "yes")


def test_raw_audio_on_stdout(checkpoint, wav, tmp_path, monkeypatch, capsysbinary):
    """--out -: the samples of the file that would be written, and nothing else."""
    words = ["infer.py", wav(1.0), "--model", str(checkpoint), "--json", "--max-tokens", "90",
             "--think", "off", "--interleave", "--temperature", "1", "--out"]
    said = []
    for more in ([f"{tmp_path}/a.wav"], ["-"], ["-", "--stream"]):
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as end:
            infer.main()
        assert end.value.code == 0
        said.append(capsysbinary.readouterr())
    wave = sf.read(tmp_path / "a.wav", dtype="int16")[0]
    for out, err in said[1:]:
        made = np.frombuffer(out, np.int16)
        assert len(made) == len(wave) and abs(made.astype(int) - wave).max() <= 4
        assert json.loads(err.splitlines()[-1])["seconds"] == round(len(wave) / 24000, 3)


def test_interactive(checkpoint, run, wav, monkeypatch, tmp_path):
    """Turn by turn; what cannot be heard is told and forgotten; the last five turns are kept."""
    past, answers = [], infer.Chatbot.answers
    monkeypatch.setattr(infer.Chatbot, "answers", lambda self, asked: past.append(
        len(asked[0][2])) or answers(self, asked))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{wav(1.0)}\n\n{tmp_path}/no.wav\n" + 7 * (
        wav(0.5) + "\n")))
    code, out, err = run("--interactive", "--model", checkpoint, "--json", "--task", "s2t",
                         "--max-tokens", 9)
    assert code == 2 and err.count("\n") == 1 and "no.wav: no such file" in err
    assert past == [0, 1, 2, 3, 4, 5, 5, 5] and len(out.splitlines()) == 8


def test_a_direct_reply_that_begins_to_think_is_a_reply(tok):
    for think, want in (("off", (None, "hello")), ("label", ("<think>hello", ""))):
        bot = SimpleNamespace(tok=tok, args=SimpleNamespace(think=think, task="s2s"))
        got = infer.Chatbot.read(bot, tok.encode("<think>hello"))
        assert (got["think"], got["text"]) == want


def test_what_cannot_be_written_or_read_is_one_line(checkpoint, run, wav, tmp_path):
    broken = copy_of(checkpoint, tmp_path / "broken")
    shutil.copy(broken / "token2wav.safetensors", broken / "model.safetensors")
    cut = copy_of(checkpoint, tmp_path / "cut")
    damaged(cut / "model.safetensors", 900)
    for words, told in ((["--model", broken], "model.safetensors"),
                        (["--model", cut], "expected safetensors, found"),
                        (["--model", tmp_path / "none"], "none"),
                        (["--model", checkpoint, "--voice", wav(1.0)], "expected safetensors"),
                        (["--model", checkpoint, "--out", tmp_path / "no" / "a.wav"], "folder"),
                        (["--model", checkpoint, "--top-p", "0"], "--top-p"),
                        (["--model", checkpoint, "--max-tokens", 10**9], "--max-tokens"),
                        (["--model", checkpoint, "--labels", "asr,mood"], "mood")):
        code, out, err = run(wav(1.0), "--max-tokens", 30, *words)
        assert code == 2 and told in err and err.count("\n") == 1 and not out, err
    code, out, err = run(wav(1.0), wav(1.0), "--model", checkpoint)
    assert code == 2 and "same name" in err and err.count("\n") == 1 and not out


def test_chunks_of_a_longer_reply_do_not_stay(checkpoint, run, wav, tmp_path):
    for n in (0, 1, 77):
        (tmp_path / f"b.{n:03d}.wav").write_bytes(b"old")
    code, out, err = run(wav(1.0), "--model", checkpoint, "--json", "--max-tokens", 60, "--think",
                         "off", "--interleave", "--stream", "--out", tmp_path / "b.wav")
    said = {e["path"] for e in answers_of(out) if e["event"] == "audio"}
    assert code == 0 and said == {str(p) for p in tmp_path.glob("b.*.wav")}, err


def test_a_streamed_reply_is_the_reply(checkpoint, run, wav, tmp_path):
    words = [wav(1.0), "--model", checkpoint, "--json", "--max-tokens", 90, "--think", "off",
             "--interleave", "--temperature", 1]
    whole = answers_of(run(*words, "--out", tmp_path / "a.wav")[1])[0]
    events = answers_of(run(*words, "--stream", "--out", tmp_path / "b.wav")[1])
    pieces = [sf.read(e["path"])[0] for e in events if e["event"] == "audio"]
    text = "".join(e["text"] for e in events if e["event"] == "text")
    assert text.strip() == whole["text"], (text, whole["text"])
    assert events[-1].pop("event") == "done" and len(pieces) > 1
    assert events[-1] | {"audio": None} == whole | {"audio": None}
    want = sf.read(tmp_path / "a.wav")[0]
    assert np.abs(np.concatenate(pieces) - want).max() < 1e-3


def test_a_full_disk_is_one_line_and_leaves_no_reply(checkpoint, run, wav, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["--task", "tts", "--text", "hello", "--model", checkpoint, "--max-tokens", 30]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file longer than this
    try:
        code, out, err = run(*words, "--out", tmp_path / "a.wav")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "a.wav: cannot be written" in err and not out
    assert err.count("\n") == 1 and not (tmp_path / "a.wav").exists(), err
