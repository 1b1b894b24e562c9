r"""Talk to EChat: a wav in; a think, a reply and a wav out. Paper App. B.2.

    python infer.py question.wav                     # writes question.reply.wav
    python infer.py *.wav --out replies/             # eight at once
    python infer.py question.wav --stream --out -    # raw 16-bit PCM on stdout, for a player
    python infer.py --task tts --text "Hello there." --out hello.wav
    python infer.py question.wav --task understand --labels asr,emotion,age
    python infer.py --interactive                    # several turns, one wav path a line
    python infer.py question.wav --model language_think_final.pt --tokenizer Qwen2.5-3B-Instruct \
        --token2wav CosyVoice-300M-25Hz --voice v.safetensors       # the released weights

Exit codes: 0 done, 2 bad input or arguments (one line on stderr), 1 anything else.
"""
import argparse
import codecs
import functools
import json
import math
import os
import re
import sys
import time

import torch
from tqdm import tqdm

import model as echat
from data import BadInput, Tokenizer, read_wave, write_wave
from encoder import log_mel
from model import BadCheckpoint, Sampling

HERE = os.path.dirname(os.path.abspath(__file__))
AT_ONCE = 8  # wavs
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

    def hear(self, path: str | None) -> torch.Tensor | None:
        """wav -> log-mel (T, n_mels); BadInput for what nobody could answer."""
        if path is None:
            return None
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

    def answers(self, mels: list, text: str):
        """Tokens of the answers to several questions at once, as EChat.generate yields them."""
        args, think = self.args, self.args.think
        if args.task == "understand":
            text = echat.user_prompt(args.labels)
        elif think == "natural" and mels[0] is not None and self.model.cfg.language == "en":
            text = echat.NATURAL
        return self.model.answers(
            self.tok, args.task, [(mel, text, self.history) for mel in mels], think != "off",
            args.interleave, seed=args.seed, max_tokens=args.max_tokens, how=self.sampling())

    def tokens(self, mel, text: str):
        """One answer as (phase, token)."""
        return (said for _, *said in self.answers([mel], text))

    def turns(self, wavs: list, mels: list, text: str, start: float):
        """Several turns at once as events (index, ...): "text", piece; "audio", wave chunk;
        "done", result, wave. Their time counts from `start`."""
        replies = [Reply(self, *heard, text, start) for heard in zip(wavs, mels)]
        for i, phase, token in self.answers(mels, text):
            yield from ((i, *event) for event in replies[i].take(phase, token))
        for i, reply in enumerate(replies):
            yield from ((i, *event) for event in reply.end())

    def turn(self, path: str | None, text: str):
        """One turn as events, see `turns`."""
        start = time.time()
        return (event for _, *event in self.turns([path], [self.hear(path)], text, start))

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


class Reply:
    """A turn as it is said: its text, its codes, and the audio made of them.

    Audio comes in pieces only with --stream: all codes at once are rendered twice as fast.
    """

    def __init__(self, bot: Chatbot, wav: str | None, mel, text: str, start: float):
        self.bot, self.wav, self.mel, self.asked, self.begun = bot, wav, mel, text, start
        self.words, self.codes, self.waves, self.times = [], [], [], {}
        self.state, self.spoken = None, 0
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.hop = bot.voice.flow.hop_codes if bot.voice and bot.args.stream else math.inf

    def note(self, what: str) -> None:
        self.times.setdefault(what, time.time() - self.begun)

    def take(self, phase: str, token: int):
        """A token -> the events that it causes."""
        if phase == "text":
            self.note("first_text_s")
            self.words.append(token)
            piece = self.bot.tok.bytes_of(token) if token != self.bot.tok.im_end else b""
            yield "text", self.utf8.decode(piece)
        elif token != self.bot.model.cfg.decoder.codes:  # not the open or close of speech
            self.codes.append(token)
            if len(self.codes) - self.spoken >= self.hop:
                yield from self.speak(False)

    def speak(self, final: bool):
        state = self.state or self.bot.start(self.bot.args.seed)
        wave, self.state = self.bot.voice.stream(self.codes[self.spoken:], state, final)
        self.spoken = len(self.codes)
        if len(wave):
            self.note("first_audio_s")
            self.waves.append(wave)
            yield "audio", wave

    def end(self):
        """The rest of the audio, then the whole: ("done", result, wave)."""
        bot, task = self.bot, self.bot.args.task
        if self.codes and bot.voice:
            yield from self.speak(True)
        wave = torch.cat(self.waves) if self.waves else None
        rate = bot.model.cfg.vocoder.sample_rate
        seconds = 0.0 if wave is None else len(wave) / rate
        self.note("total_s")
        times = {"load_s": bot.load_s, "first_text_s": None, "first_audio_s": None, **self.times}
        times["rtf"] = times["total_s"] / seconds if seconds else None
        answer = bot.read(self.words)
        if task == "tts":
            answer["text"] = answer["text"] or self.asked
        if task in ("s2s", "s2t"):  # what the next turn remembers, as released
            bot.history = [*bot.history, (self.mel, answer["text"], self.codes)][-5:]
        yield "done", {
            "wav": self.wav, "task": task, **answer, "audio": None, "sample_rate": rate,
            "seconds": round(seconds, 3), "codes": len(self.codes),
            "timings": {k: v if v is None else round(v, 3) for k, v in times.items()}}, wave


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


def tell(error: BadInput) -> None:
    print(f"infer.py: {error}", file=sys.stderr)


def play(bot: Chatbot, wavs: list[str | None]) -> bool:
    """Run one turn, or several at once, and write what the flags ask for. False: some failed."""
    start, asked, good = time.time(), [], True
    for wav in wavs:
        try:
            asked.append((wav, bot.hear(wav)))
        except BadInput as e:
            good = tell(e)
    if not asked:
        return False
    names, mels = zip(*asked)
    chunks = iter(range(10**9))
    with tqdm(desc=os.path.basename(names[0] or bot.args.task), unit=" tokens", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for i, event, *payload in bot.turns(names, mels, bot.args.text, start):
            bar.update()
            if event != "done":
                bot.args.stream and piece(bot, names[i], event, payload[0], chunks)
                continue
            try:
                whole(bot, *payload)
            except BadInput as e:
                good = tell(e)
    return bool(good)


def piece(bot: Chatbot, wav: str | None, event: str, what, chunks) -> None:
    """A piece of a streamed reply: text as JSON, audio as PCM on stdout or as a chunk file."""
    args, raw = bot.args, bot.args.out == "-"
    if event == "text":
        told = {"event": "text", "text": what} if what else None
    elif raw:
        sys.stdout.buffer.write((what.clamp(-1, 1) * 32767).round().short().numpy().tobytes())
        sys.stdout.buffer.flush()
        return
    else:
        path = f"{os.path.splitext(reply_path(wav, args.out))[0]}.{next(chunks):03d}.wav"
        write_wave(path, what, bot.model.cfg.vocoder.sample_rate)
        told = {"event": "audio", "path": path, "samples": len(what)}
    if told and args.json:
        emit(told, raw)


def whole(bot: Chatbot, result: dict, wave: torch.Tensor | None) -> None:
    """A reply as it is written in the end: the wav, the JSON or the lines for people."""
    args, raw = bot.args, bot.args.out == "-"
    if wave is not None and not raw:
        result["audio"] = reply_path(result["wav"], args.out)
        write_wave(result["audio"], wave, result["sample_rate"])
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


def groups(args: argparse.Namespace):
    """Wavs to answer at once: those of the command line, then each one that a person types."""
    size = 1 if args.stream or args.interactive else AT_ONCE
    wavs = args.wavs or ([] if args.interactive else [None])  # None: a task without
    yield from (wavs[i:i + size] for i in range(0, len(wavs), size))
    while args.interactive:
        if sys.stdin.isatty():
            print("wav: ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield [line.strip()]


def main() -> None:
    args, good = arguments(), True
    try:
        bot = Chatbot(args, args.tokenizer, args.token2wav)
        if args.out and args.out.endswith("/"):
            os.makedirs(args.out, exist_ok=True)
        for wavs in groups(args):
            good &= play(bot, wavs)
            bot.history = bot.history if args.interactive else []
    except (BadInput, BadCheckpoint) as e:
        sys.exit(tell(e) or 2)
    except BrokenPipeError:  # the player was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as e:
        sys.exit(tell(f"{e.filename or ''}: {e.strerror or e}") or 2)
    except KeyboardInterrupt:
        sys.exit(1)
    sys.exit(0 if good else 2)


if __name__ == "__main__":
    main()
