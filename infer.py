r"""Talk to EChat: a wav in; a think, a reply and a wav out. Paper App. B.2.

    python infer.py question.wav                     # writes question.reply.wav
    python infer.py question.wav --stream --out -    # raw 16-bit PCM on stdout, for a player
    python infer.py --task tts --text "Hello there." --out hello.wav
    python infer.py question.wav --task understand --labels asr,emotion,age
    python infer.py --interactive                    # several turns, one wav path a line
    python infer.py question.wav --model language_think_final.pt --tokenizer Qwen2.5-3B-Instruct \
        --token2wav CosyVoice-300M-25Hz --voice v.safetensors       # the released weights

Exit codes: 0 done, 2 bad input or arguments (one line on stderr), 1 anything else.
"""
import time

BEGUN = time.time()  # before the heavy imports: the user waits for these too

import argparse
import codecs
import functools
import json
import math
import os
import re
import sys

import torch
from tqdm import tqdm

import model as echat
from data import BadInput, Tokenizer, read_wave, write_wave
from encoder import log_mel
from model import BadCheckpoint, Sampling

HERE = os.path.dirname(os.path.abspath(__file__))
SHORTEST, SILENCE = 0.2, 1e-4  # seconds, peak
EMOTION = re.compile(r"^<([^<>]+)>\s*")


class Chatbot:
    """A loaded checkpoint with everything a turn needs."""

    def __init__(self, args, tokenizer: str | None = None, token2wav: str | None = None):
        """tokenizer, token2wav: folders that hold these, where the checkpoint does not."""
        start = time.time()
        self.args, self.device = args, pick_device(args.device)
        released = echat.osum_file(args.model)
        if released and not tokenizer:
            raise BadCheckpoint(f"{args.model}: has no tokenizer; give --tokenizer, the folder of "
                                "Qwen2.5-3B-Instruct with tokenizer.json")
        if args.model in echat.PRESETS and not os.path.exists(args.model):
            raise BadCheckpoint(f"--model {args.model}: no such folder; make it: python model.py "
                                f"{args.model} --whisper FILE --llm DIR {args.model}")
        self.tok = Tokenizer(tokenizer or args.model)
        self.voice = None
        if args.task in ("s2s", "tts"):
            self.voice = self.load_voice(token2wav or (None if released else args.model))
            self.start = functools.lru_cache(maxsize=1)(self.voice.start)  # the prompt, once
        self.model = echat.load_echat(args.model, self.device)
        cfg = self.model.cfg
        if self.tok.n_vocab > cfg.decoder.vocab:
            raise BadCheckpoint(f"{tokenizer or args.model}: tokenizer.json has {self.tok.n_vocab} "
                                f"tokens, the model {cfg.decoder.vocab}")
        if self.voice:
            cfg.flow, cfg.vocoder = self.voice.cfg.flow, self.voice.cfg.vocoder
            if cfg.flow.codes != cfg.decoder.codes:
                raise BadCheckpoint(f"{token2wav}: speaks {cfg.flow.codes} codes, the model "
                                    f"{cfg.decoder.codes}")
        self.load_s, self.history = time.time() - start, []

    def load_voice(self, folder: str | None) -> echat.Token2Wav:
        """Our token2wav, or the released one if the folder holds its flow.pt."""
        args = self.args
        if folder is None:
            raise BadCheckpoint(f"--task {args.task} speaks, {args.model} has no voice: give "
                                "--token2wav, the folder of CosyVoice-300M-25Hz, or --task s2t")
        if not os.path.exists(os.path.join(folder, "flow.pt")):
            return echat.load_token2wav(folder, args.voice, self.device)
        if not args.voice:
            raise BadCheckpoint(f"{folder}: has no voice; give --voice FILE (python data.py voice)")
        return echat.load_cosyvoice(folder, args.voice, self.device)

    def hear(self, path: str) -> torch.Tensor:
        """wav -> log-mel (T, n_mels); BadInput for what nobody could answer."""
        wave = read_wave(path)
        if len(wave) < SHORTEST * 16000:
            raise BadInput(f"{path}: {len(wave) / 16000:.2f} s of audio, too short to understand")
        if (wave - wave.mean()).abs().max() < SILENCE:
            raise BadInput(f"{path}: silence")
        return log_mel(wave, self.model.cfg.encoder.n_mels)

    def sampling(self) -> dict[str, Sampling]:
        """The checkpoint's sampling with the flags of the command line on top, for both phases."""
        flags = {"temperature": self.args.temperature, "top_k": self.args.top_k,
                 "top_p": self.args.top_p}
        given = {k: v for k, v in flags.items() if v is not None}
        own = self.model.cfg.understand if self.args.task == "understand" else self.model.cfg.text
        return {name: Sampling(**vars(base) | given)
                for name, base in (("text", own), ("speech", self.model.cfg.speech))}

    def tokens(self, mel, text: str):
        args = self.args
        if args.task == "understand":
            text = echat.user_prompt(args.labels)
        elif args.think == "natural" and mel is not None and self.model.cfg.language == "en":
            text = echat.NATURAL
        return self.model.answer(self.tok, args.task, mel, text, think=args.think != "off",
                                 interleave=args.interleave, history=self.history, seed=args.seed,
                                 max_tokens=args.max_tokens, how=self.sampling())

    def turn(self, path: str | None, text: str):
        """One turn as events: ("text", piece), ("audio", wave chunk), ("done", result, wave).

        Audio comes in pieces only with --stream: all codes at once are rendered twice as fast.
        """
        start = time.time()
        mel = None if path is None else self.hear(path)
        words, codes, waves, times = [], [], [], {}
        state, spoken, utf8 = None, 0, codecs.getincrementaldecoder("utf-8")("replace")
        hop = self.voice.flow.hop_codes if self.voice and self.args.stream else math.inf

        def speak(final: bool):
            nonlocal state, spoken
            wave, state = self.voice.stream(codes[spoken:], state or self.start(self.args.seed),
                                            final)
            spoken = len(codes)
            if len(wave):
                times.setdefault("first_audio_s", time.time() - start)
                waves.append(wave)
                yield "audio", wave

        for kind, token in self.tokens(mel, text):
            if kind == "text":
                times.setdefault("first_text_s", time.time() - start)
                words.append(token)
                piece = self.tok.bytes_of(token) if token != self.tok.im_end else b""
                yield "text", utf8.decode(piece)
            elif token != self.model.cfg.decoder.codes:  # not the open or close of speech
                codes.append(token)
                if len(codes) - spoken >= hop:
                    yield from speak(False)
        if codes and self.voice:
            yield from speak(True)
        wave = torch.cat(waves) if waves else None
        rate = self.model.cfg.vocoder.sample_rate
        seconds = 0.0 if wave is None else len(wave) / rate
        times |= {"load_s": self.load_s, "total_s": time.time() - start}
        times["rtf"] = times["total_s"] / seconds if seconds else None
        answer = self.read(words)
        if self.args.task == "tts":
            answer["text"] = answer["text"] or text
        if self.args.task in ("s2s", "s2t"):
            self.history = (self.history + [(mel, answer["text"], codes)])[-5:]  # as released
        yield "done", {
            "wav": path, "task": self.args.task, **answer, "audio": None, "sample_rate": rate,
            "seconds": round(seconds, 3), "codes": len(codes), "timings": {
                k: times.get(k) and round(times[k], 3)
                for k in ("load_s", "first_text_s", "first_audio_s", "total_s", "rtf")}}, wave

    def read(self, ids: list[int]) -> dict:
        """Text ids of an answer -> think, transcript, labels, reply text."""
        ids = [i for i in ids if i != self.tok.im_end]
        cut = echat.think_length(ids, self.tok)
        full = self.tok.decode(ids)
        think, text = None, full
        if cut:
            think, text = full.split(echat.THINK_END, 1)
            think += echat.THINK_END
        elif full.startswith(echat.THINK):  # --max-tokens cut it short
            think, text = full, ""
        found = dict.fromkeys(("transcript", *echat.LABELS))
        if self.args.task == "understand":
            found.update(read_labels(text, self.args.labels))
        elif think:
            found.update(echat.read_think(think))
        if tag := EMOTION.match(text) if self.args.task in ("s2s", "s2t") else None:
            found["reply_emotion"], text = tag[1], text[tag.end():]
        transcript = found.pop("transcript")
        return {"think": think, "transcript": transcript, "labels": found, "text": text.strip()}


def read_labels(text: str, wanted: list[str]) -> dict:
    """ "words<SAD><OLD>" -> transcript and the labels that were asked for, in their order."""
    words, *tags = re.split(r"<([^<>]+)>", text)
    words, tags = words.strip(), [None if t == "&&" else t for t in tags[::2]]
    out = dict(zip([w for w in wanted if w != "asr"], tags))
    return out | {"transcript": words or None} if "asr" in wanted else out


def pick_device(name: str) -> str:
    there = [d for d in ("cuda", "npu", "mps") if getattr(torch, d, None)
             and getattr(torch, d).is_available()] + ["cpu"]
    if name not in ("auto", *there):
        raise BadInput(f"--device {name}: there is none here")
    return there[0] if name == "auto" else name


def reply_path(wav: str | None, out: str | None) -> str:
    """question.wav -> question.reply.wav beside it, or in the folder --out, or --out itself."""
    name = (os.path.splitext(os.path.basename(wav))[0] if wav else "speech") + ".reply.wav"
    if out is None:
        return os.path.join(os.path.dirname(wav) if wav else ".", name)
    return os.path.join(out, name) if os.path.isdir(out) or out.endswith("/") else out


def lines_for_people(result: dict) -> str:
    """What a person reads after a turn: think, reply and one line of timings."""
    times = result["timings"]
    lines = [f"think: {result['think']}"] if result["think"] else []
    if result["task"] == "understand":
        found = {"transcript": result["transcript"], **result["labels"]}
        lines += [f"{k}: {v}" for k, v in found.items() if v]
    elif result["text"]:
        lines.append(f"reply: {result['text']}")
    if result["audio"]:
        lines.append(f"audio: {result['audio']} ({result['seconds']:.1f} s)")
    spans = [("first text", "first_text_s"), ("first audio", "first_audio_s"), ("total", "total_s")]
    parts = [f"{name} {times[key]:.2f} s" for name, key in spans if times[key] is not None]
    if times["rtf"]:
        parts.append(f"real-time factor {times['rtf']:.2f}")
    return "\n".join(lines + [", ".join(parts)])


def emit(event: dict, raw: bool) -> None:
    """One line of JSON on stdout, or on stderr where stdout is the raw audio."""
    print(json.dumps(event, ensure_ascii=False), file=sys.stderr if raw else sys.stdout, flush=True)


def play(bot: Chatbot, wav: str | None, text: str) -> None:
    """Run one turn and write what the flags ask for."""
    args, raw = bot.args, bot.args.out == "-"
    target = None if raw else reply_path(wav, args.out)
    rate, chunks = bot.model.cfg.vocoder.sample_rate, 0
    with tqdm(desc=os.path.basename(wav or args.task), unit=" tokens", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for event, *payload in bot.turn(wav, text):
            bar.update()
            if event == "audio" and raw:
                pcm = (payload[0].clamp(-1, 1) * 32767).round().short()
                sys.stdout.buffer.write(pcm.numpy().tobytes())
                sys.stdout.buffer.flush()
            elif event == "audio" and args.stream:
                path = f"{os.path.splitext(target)[0]}.{chunks:03d}.wav"
                write_wave(path, payload[0], rate)
                chunks += 1
                if args.json:
                    emit({"event": "audio", "path": path, "samples": len(payload[0])}, raw)
            elif event == "text" and payload[0] and args.stream and args.json:
                emit({"event": "text", "text": payload[0]}, raw)
    result, wave = payload
    if wave is not None and not raw:
        write_wave(target, wave, rate)
        result["audio"] = target
    if args.json:
        emit({"event": "done", **result} if args.stream else result, raw)
    else:
        print(lines_for_people(result), file=sys.stderr if raw else sys.stdout, flush=True)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="Talk to EChat: a wav in, a think and a spoken reply out.")
    p.error = lambda message: p.exit(2, f"infer.py: {message}\n")  # one line, without the usage
    p.add_argument("wavs", nargs="*", metavar="question.wav")
    p.add_argument("--model", default=os.path.join(HERE, "assets", "mini"),
                   help="checkpoint folder, or a released OSUM-EChat file (.pt)")
    p.add_argument("--tokenizer", help="folder with tokenizer.json, if --model is a released file")
    p.add_argument("--token2wav", help="folder with flow.pt and hift.pt of CosyVoice-300M-25Hz")
    p.add_argument("--task", default="s2s", choices=("s2s", "s2t", "t2t", "tts", "understand"))
    p.add_argument("--text", default="", help="the question (t2t) or the words to speak (tts)")
    p.add_argument("--labels", default="asr,age,gender,emotion,event", help="for understand")
    p.add_argument("--think", default="label", choices=("label", "natural", "off"))
    p.add_argument("--interleave", action="store_true", help="6 text : 18 speech tokens")
    p.add_argument("--stream", action="store_true", help="write chunks while the model speaks")
    p.add_argument("--voice", help="voice.safetensors of another voice")
    p.add_argument("--out", help="wav to write, folder, or - for raw PCM on stdout")
    p.add_argument("--json", action="store_true", help="one JSON object a wav on stdout")
    p.add_argument("--interactive", action="store_true", help="several turns, one wav path a line")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-tokens", type=int, default=1200)
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "npu", "mps"))
    args = p.parse_args()
    labels = [w.strip() for w in args.labels.split(",")]
    for w in labels:
        if w not in echat.ASKED:
            p.error(f"--labels: {w!r} is not among {', '.join(echat.ASKED)}")
    args.labels = [w for w in echat.ASKED if w in labels]
    if args.task in ("t2t", "tts") and (not args.text.strip() or args.wavs):
        p.error(f"--task {args.task} takes --text and no wav")
    if args.task in ("t2t", "tts") and args.interactive:
        p.error("--interactive reads wavs, which --task t2t and tts do not take")
    if args.task not in ("t2t", "tts") and not (args.wavs or args.interactive):
        p.error("a wav is needed")
    folder = args.out and (os.path.isdir(args.out) or args.out.endswith("/"))
    if args.out and len(args.wavs) > 1 and not folder:
        p.error("--out must be a folder when there are several wavs")
    if args.out and not folder and not os.path.isdir(os.path.dirname(args.out) or "."):
        p.error(f"--out {args.out}: no such folder")
    bad = [name for name, good in (
        ("max-tokens", args.max_tokens > 0), ("seed", abs(args.seed) < 2**63),
        ("temperature", args.temperature is None or args.temperature >= 0),
        ("top-k", args.top_k is None or args.top_k >= 0),
        ("top-p", args.top_p is None or 0 < args.top_p <= 1)) if not good]
    if bad:
        p.error(f"--{bad[0]}: out of range")
    return args


def turns(args: argparse.Namespace):
    """The wavs of the command line (None for a task without), then those a person types."""
    yield from args.wavs or ([] if args.interactive else [None])
    while args.interactive:
        if sys.stdin.isatty():
            print("wav: ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def main() -> None:
    args = arguments()
    failed = False
    try:
        bot = Chatbot(args, args.tokenizer, args.token2wav)
        if args.out and args.out.endswith("/"):
            os.makedirs(args.out, exist_ok=True)
        for wav in turns(args):
            try:
                play(bot, wav, args.text)
            except BadInput as e:
                print(f"infer.py: {e}", file=sys.stderr)
                failed = True
            if not args.interactive:
                bot.history = []
    except (BadInput, BadCheckpoint) as e:
        print(f"infer.py: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"infer.py: {e.filename or ''}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(1)
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
