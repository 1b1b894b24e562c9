"""The command line with a released file: what it needs, what it says, what it answers."""

import json
import shutil

import pytest
import torch
from conftest import CODES, tiny_config
from test_model import released

import infer
import model as echat
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


def test_the_released_token2wav_needs_a_voice_and_keeps_its_rate(
        file, tokenizer_folder, checkpoint, run, tmp_path, monkeypatch):
    """Its own loaders are tested where they are; here they are replaced by something small."""
    flow = tiny_config().flow
    flow.causal, flow.chunk, flow.frames_per_code = False, 0, 22050 / 256 / 25
    flow.left_chunks = flow.look_ahead = 0
    hift = VocoderConfig(22050, hop=256, channels=16, rates=(8, 8), kernels=(16, 16))
    monkeypatch.setattr(echat.FlowConfig, "cosyvoice1", classmethod(lambda cls: flow))
    monkeypatch.setattr(echat, "hift", lambda: hift)
    monkeypatch.setattr(echat, "load_hift", lambda path: HiFT(hift))
    monkeypatch.setattr(echat, "load_cosyvoice1", lambda state: state)
    torch.save(echat.Flow(flow).state_dict(), tmp_path / "flow.pt")
    words = ("--model", file, "--tokenizer", tokenizer_folder, "--task", "tts", "--text", "hello",
             "--token2wav", tmp_path, "--max-tokens", 9, "--json", "--out", tmp_path / "a.wav")
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
