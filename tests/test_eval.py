"""eval.py: counting by hand, the rule judge on written replies, the client against a local server,
the commands on a tiny random model."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec

import pytest
import torch

import eval as ev
import model as echat
from adapter import AdapterConfig
from data import BadInput, train_tokenizer, write_wave
from decoder import DecoderConfig
from encoder import EncoderConfig
from flow import FlowConfig
from vocoder import VocoderConfig


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- counting ------------------------------------------------------------------------------------

@pytest.mark.parametrize("said, heard, errors, words", [
    ("The cat sat.", "the cat sat", 0, 3),
    ("I don\u2019t know!", "I don't know", 0, 3),
    ("I don't know", "I dont know", 1, 3),
    ("one two three four", "one three four five", 2, 4),  # two lost, five added
    ("a b c", "", 3, 3),
    ("", "some words", 2, 0),
    ("Bake it for twenty-five minutes.", "Bake it for 25 minutes", 0, 6),
    ("one hundred seven", "107", 0, 3),
    ("It is 3.5, or 1,000", "it is 3 5 or 1 000", 4, 7),  # decimals and thousands stay digits
    ("\u4f60\u597d\uff0c\u4e16\u754c", "\u4f60\u4e16\u754c", 1, 4),  # Chinese counts characters
])
def test_word_errors(said, heard, errors, words):
    said = ev.normalise(said)
    assert (ev.edit_distance(said, ev.normalise(heard)), len(said)) == (errors, words)


def test_interval():
    assert ev.interval([1, 0, 1, 1]) == ev.interval([1, 0, 1, 1])
    value, low, high = ev.interval([1, 2, 0, 3], [10, 10, 10, 10])
    assert value == 0.15 and 0 <= low < value < high <= 0.3
    assert ev.interval([1, 1, 1]) == [1.0, 1.0, 1.0]
    assert ev.interval([]) == [None] * 3 == ev.interval([2], [0])
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert ev.interval(values, seed=1) != ev.interval(values, seed=2)


# ---- rules ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("event, reply, hit", [
    ("SIGH", "Why all the sighs today?", True),
    ("SIGH", "As an AI I cannot know.", False),
    ("SIGH", "Ai, what a day.", True),
    ("CRY", "Please stop crying.", True),
    ("CRY", "You sobbed so hard.", True),
    ("CRY", "Tearing up is fine.", True),
    ("CRY", "That is pure crystal.", False),
    ("SCREAMING", "No need to call it out loudly.", True),
    ("LAUGH", "You are laughing!", True),
    ("LAUGH", "Nothing funnier than that.", True),
    ("THROAT_CLEARING", "You cleared your throat.", True),
    ("THROAT_CLEARING", "Is your throat clear?", False),
    ("COUGH", "That cough needs tea.", True),
    ("COUGH", "You will be fine, chill.", False),
    ("SNEEZE", "Sneezing in spring?", True),
    ("SNEEZE", "Keep warm, colds are going round.", True),
    ("SNEEZE", "He scolds the dog.", False),
])
def test_event_keywords(event, reply, hit):
    assert (ev.judge(reply, "event", event) == "right") == hit


@pytest.mark.parametrize("dim, label, reply, verdict", [
    ("age", "CHILD", "Well done, kiddo! Ask a grown-up to help.", "right"),
    ("age", "CHILD", "Take a little salt and stir.", "none"),
    ("age", "CHILD", "Take your time, grandpa.", "wrong"),
    ("age", "CHILD", "Good evening, sir.", "wrong"),
    ("age", "ADULT", "Good evening, sir.", "right"),
    ("age", "ADULT", "Talk to your boss about the deadline.", "right"),
    ("age", "ADULT", "Come on, little buddy.", "wrong"),
    ("age", "OLD", "Show your grandchildren, ma'am.", "right"),
    ("age", "OLD", "Hello grandma, well done, kiddo.", "mixed"),
    ("age", "OLD", "Bring it to your grandma.", "none"),  # a third person
    ("age", "OLD", "Call your doctor, and mind the stairs.", "right"),
    ("gender", "FEMALE", "Of course, ma\u2019am.", "right"),
    ("gender", "FEMALE", "Well, young man, try this.", "wrong"),
    ("gender", "FEMALE", "I miss the sun.", "none"),
    ("gender", "FEMALE", "Certainly, miss.", "right"),
    ("gender", "MALE", "Ask the lady at the desk.", "none"),
    ("gender", "MALE", "You are a brave boy.", "right"),
    ("gender", "MALE", "Yes sir, madam.", "mixed"),
    ("emotion", "SAD", "I am sorry you feel so down.", "right"),
    ("emotion", "SAD", "I am sorry.", "right"),
    ("emotion", "ANGER", "Take a deep breath and stay calm.", "right"),
    ("emotion", "ANGER", "No wonder you are furious.", "right"),
    ("emotion", "FEAR", "You are safe, do not be scared.", "right"),
    ("emotion", "FEAR", "What a joy, how happy you sound!", "wrong"),
    ("emotion", "HAPPY", "I am happy to help.", "none"),
    ("emotion", "SURPRISE", "That was unexpected!", "right"),
    ("emotion", "DISGUST", "Yuck, how gross.", "right"),
    ("emotion", "DISGUST", "So disgusting that you are scared.", "mixed"),
    ("neutral", "NEUTRAL", "Turn left at the bank. Great idea.", "right"),
    ("neutral", "NEUTRAL", "You sound sad.", "wrong"),
])
def test_rules(dim, label, reply, verdict):
    assert ev.judge(reply, dim, label) == verdict


def record(key="k", txt="<SAD>Poor little one, do not cry.", **extra):
    return {"key": key, "task": "<S2TCHAT> <TEXT2TOKEN> <THINK>", "txt": txt,
            "extra": {"q_txt": "My toy broke.", **extra}}


FULL = dict(age="<CHILD>", gender="<MALE>", q_emotion="<SAD>", caption="<CRY>")


def test_labels():
    assert ev.labels_of(record(**FULL)) == {"age": "CHILD", "gender": "MALE", "emotion": "SAD",
                                            "event": "CRY"}
    assert ev.labels_of(record(q_emotion="<NEUTRAL>", caption="<OTHER>", age="<&&>")) == {
        "neutral": "NEUTRAL"}
    rows = [record(age=f"<{i}>") for i in range(5)] + [record(gender=f"<{i}>") for i in range(4)]
    mixed = ev.shuffled(rows, 3)
    assert mixed == ev.shuffled(rows, 3) and all(a != b for a, b in zip(rows, mixed))
    assert [ev.labels_of(a).keys() for a in rows] == [ev.labels_of(b).keys() for b in mixed]
    found = ev.verdicts(["Oh kiddo, so sad.", "Hm."], [ev.labels_of(record(**FULL))] * 2, 0)
    assert found["age"]["n"] == 2 and found["age"]["score"][0] == 0.5 and found["age"]["none"] == 1
    assert found["event"]["score"][0] == 0.5 and found["all"]["score"][0] == 0.0


def test_messages_hold_the_prompt_and_the_fields():
    kind, chat = ev.messages(record(**FULL), "Oh dear.", "SORRY")
    assert kind == "multi" and chat[0]["content"].startswith("You are a professional empathetic")
    assert chat[1]["content"].split("\n") == [
        "age: CHILD", "gender: MALE", "emotional state: SAD", "sound events in audio: CRY",
        "question: My toy broke.", "response: Oh dear."]
    kind, chat = ev.messages(record(q_emotion="<NEUTRAL>"), "Oh dear.", None)
    assert kind == "emotion" and "(1\u20135)" in chat[0]["content"]
    assert "user emotion: NEUTRAL" in chat[1]["content"]
    assert chat[1]["content"].endswith("emotion label of the response: none")
    assert ev.messages(record(caption="<CRY>"), "Oh.", None) == ("event", None)
    assert ev.messages(record(gender="<MALE>"), "Oh.", None)[0] == "gender"


# ---- the client ----------------------------------------------------------------------------------

@pytest.fixture
def server():
    """A chat endpoint that answers from a script: an int is a status, a str the answer."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            web.seen.append((self.path, self.headers.get("Authorization"), body))
            say = web.script.pop(0)
            self.send_response(say if isinstance(say, int) else 200)
            if say == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            if isinstance(say, str):
                reply = {"choices": [{"message": {"content": say}}]}
                self.wfile.write(say.encode() if say == "<html>" else json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    web.seen, web.script = [], []
    web.url = f"http://127.0.0.1:{web.server_port}/v1"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.shutdown()
    web.server_close()


CHAT = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("script, score, count", [
    (["4"], 75.0, {"sent": 1}),
    (["score: 5"], 100.0, {"sent": 1}),
    (["**0**"], 0.0, {"sent": 1}),
    (["I think 4 of 5", "", "2."], 25.0, {"sent": 3}),
    (["no", "<html>", "10"], None, {"sent": 3, "no number": 1}),
    ([429, 503, "1"], 0.0, {"sent": 3}),
    ([500] * 5, None, {"sent": 5, "unreachable": 1}),
])
def test_client(server, tmp_path, monkeypatch, capfd, script, score, count):
    monkeypatch.setenv("ECHAT_JUDGE_KEY", "secret-key")
    server.script = list(script)
    client = ev.Judge(server.url, "m", str(tmp_path / "cache.jsonl"), wait=0.001)
    assert client.score(CHAT) == score and dict(client.count) == count
    path, auth, body = server.seen[0]
    assert path == "/v1/chat/completions" and auth == "Bearer secret-key"
    assert body["model"] == "m" and body["messages"] == CHAT
    if score is not None:  # a second run asks nobody
        again = ev.Judge(server.url, "m", str(tmp_path / "cache.jsonl"))
        assert again.scores([CHAT, CHAT], 2) == [score] * 2 and not again.count
    assert all("secret" not in p.read_text() for p in tmp_path.iterdir())
    assert "secret" not in "".join(capfd.readouterr())


def test_client_gives_up(server, tmp_path):
    server.script = [401]
    with pytest.raises(BadInput, match="HTTP 401"):
        ev.Judge(server.url, "m", str(tmp_path / "c")).score(CHAT)
    away = ev.Judge("http://127.0.0.1:9", "m", str(tmp_path / "c"), wait=0.001)
    assert away.scores([CHAT], 1) == [None] and away.count["unreachable"] == 1


# ---- items and commands --------------------------------------------------------------------------

def test_items_resume_and_count_the_broken(tmp_path):
    path, calls = str(tmp_path / "some-12345678.jsonl"), []

    def work(r):
        calls.append(r["key"])
        if r["key"] == "b":
            raise BadInput("no such file\nat all")
        return {"v": r["key"] * 2}
    rows = [{"key": k} for k in "abc"]
    got = ev.run_items(path, rows[:2], work)
    assert got == [{"key": "a", "v": "aa"}, {"key": "b", "error": "no such file"}]
    with open(path, "a") as f:
        f.write('{"key": "c", "v"')  # killed while writing
    assert [g.get("v") for g in ev.run_items(path, rows, work)] == ["aa", None, "cc"]
    assert calls == list("abbc")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny random checkpoint, two wavs and the lists of all commands."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("world")
    cfg = echat.Config(
        encoder=EncoderConfig(80, 16, 2, 1), adapter=AdapterConfig(16, 16, 2, 1, 16),
        decoder=DecoderConfig(300, 16, 1, 2, 1, 8, 16, codes=12),
        flow=FlowConfig(codes=12, spk_dim=6, dim=8, enc_layers=1, enc_heads=2, enc_ffn=16,
                        channels=(16,), mid=1, heads=2, head_dim=8, time_dim=16),
        vocoder=VocoderConfig(channels=16))
    echat.save_config(str(home), cfg)
    train_tokenizer(["hello there, how are you"], 300, str(home))
    weights = echat.EChat(cfg)
    echat.save_weights(str(home / "model.safetensors"), weights)
    voice = {"spk": torch.randn(1, 6), "prompt_codes": torch.zeros(1, 2, dtype=torch.long),
             "prompt_mel": torch.randn(1, 8, 80) - 5}
    token2wav = echat.Token2Wav(cfg, voice)
    token2wav.vocoder.fold() if hasattr(token2wav.vocoder, "fold") else None
    echat.save_weights(str(home / "token2wav.safetensors"), token2wav)
    echat.save_weights(str(home / "voice.safetensors"), voice)
    for name in "ab":
        write_wave(str(home / f"{name}.wav"), torch.randn(12000) * 0.1, 24000)
    recipe = {"age": "OLD", "gender": "MALE", "emotion": "SAD", "event": "OTHER", "voice": "v"}
    full = [{"key": f"f{n}", "wav": f"{n}.wav", "txt": "Hello there.<OLD><MALE><SAD><OTHER>",
             "task": "<TRANSCRIBE> <AGE> <GENDER> <EMOTION> <EVENT>", "extra": {"recipe": recipe}}
            for n in "abx"]
    talk = [record(f"e{n}", **FULL) | {"wav": f"{n}.wav"} for n in "abx"]
    for row in talk:
        row["extra"] |= {"q_txt": row["key"]}
    say = [{"key": f"t{n}", "wav": f"{n}.wav", "txt": "hello there", "task": "<TEXT2TOKEN>",
            "extra": {"speech_token": [1, 2, 3]}} for n in "abx"]
    for name, rows in (("full", full), ("talk", talk), ("say", say)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


def call(world, monkeypatch, capsys, command, *more):
    """One command as a person runs it -> its text and its result."""
    monkeypatch.setattr(sys, "argv", ["eval.py", command, "--model", str(world), "--device", "cpu",
                                      "--max-tokens", "12", "--out", str(world / "out"), *more])
    ev.main()
    text = capsys.readouterr().out
    return text, json.loads(text.strip().split("\n")[-1])


def test_understand(world, monkeypatch, capsys):
    data = ["--data", str(world / "full.jsonl")]
    text, result = call(world, monkeypatch, capsys, "understand", *data)
    assert "synthetic" in text and "transcript WER" in text
    for way in ("query", "think"):
        assert result[way]["n"] == 2 and result[way]["broken"] == 1
        assert result[way]["age"]["accuracy"][0] == 0 and "OLD" in result[way]["age"]["confusion"]
    assert result["think"]["wer"][0] == 1.0  # no think: nothing heard
    assert call(world, monkeypatch, capsys, "understand", *data)[1] == result


def test_echat(world, monkeypatch, capsys, server):
    data = ["--data", str(world / "talk.jsonl"), "--judge", server.url, "--judge-model", "m"]
    assert call(world, monkeypatch, capsys, "echat", *data, "--dry-run")[1]["requests"] == 3
    server.script = ["5", "1"]
    text, result = call(world, monkeypatch, capsys, "echat", *data, "--shuffle", "--jobs", "1")
    assert result["n"] == 2 and result["broken"] == 1 and "Offline rules" in text
    assert result["reference"]["age"]["score"][0] == result["reference"]["event"]["score"][0] == 1
    assert result["shuffled"]["age"]["n"] == 2
    assert result["judge"]["multi"]["n"] == 2 and not server.script
    assert result["judge"]["multi"]["score"][0] == 0.5
    dry = call(world, monkeypatch, capsys, "echat", *data, "--dry-run")[1]
    assert dry["cached"] == 2 and dry["requests"] == 1


def test_tts(world, monkeypatch, capsys):
    _, result = call(world, monkeypatch, capsys, "tts", "--data", str(world / "say.jsonl"), "--asr",
                     "none", "--limit", "1", "--path", "model", "original", "resynthesis", "copy",
                     "griffinlim")
    assert result["original"]["seconds"] == 0.5 and result["copy"]["seconds"] == 0.5
    assert result["griffinlim"]["seconds"] == 0.5 and result["resynthesis"]["seconds"] == 0.1
    assert all(result[way]["broken"] == 0 for way in ("model", "original", "copy"))


def test_griffin_lim_keeps_a_tone():
    cfg = VocoderConfig()
    wave = (torch.arange(12000) * 2 * torch.pi * 440 / 24000).sin() * 0.3
    again = ev.griffin_lim(ev.mel_spectrogram(wave[None], cfg)[0], cfg)
    assert len(again) == 12000
    peak = torch.fft.rfft(again[2000:10000]).abs().argmax() * 24000 / 8000
    assert abs(float(peak) - 440) < 15


def test_speed(world, monkeypatch, capsys):
    text, result = call(world, monkeypatch, capsys, "speed", "--tokens", "3")
    assert result["device"] == "cpu" and "copy_GBps" in text
    assert all(result[k] > 0 for k in ("decode_tok_per_s", "cold_encoder_ms", "prefill_ms",
                                       "flow_rtf", "vocoder_rtf", "total_s", "load_s"))


def test_speed_of_random_weights_beside_transformers(world, monkeypatch, capsys):
    monkeypatch.setitem(ev.echat.PRESETS, "small", lambda: ev.echat.load_config(str(world)))
    words = ["speed", "--preset", "small", "--tokens", "3", "--prompt", "50"]
    result = call(world, monkeypatch, capsys, *words)[1]
    assert result["weights"] == "small" and "total_s" not in result
    if find_spec("transformers") is None:
        with pytest.raises(SystemExit) as stop:
            call(world, monkeypatch, capsys, *words, "--against", "transformers")
        assert stop.value.code == 2 and "pip install" in capsys.readouterr().err
        return
    result = call(world, monkeypatch, capsys, *words, "--against", "transformers")[1]
    assert result["transformers_over_ours"]["equal_tokens"]


@pytest.mark.parametrize("argv", [["--judge", "http://x"], ["--dry-run"], ["--think", "loud"]])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        ev.arguments(["echat", "--data", "x", *argv])
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_a_missing_model_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "l.jsonl").write_text("")
    monkeypatch.setattr(sys, "argv", ["eval.py", "echat", "--data", str(tmp_path / "l.jsonl"),
                                      "--model", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        ev.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
