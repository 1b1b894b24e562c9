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
import glob
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial

import torch
from tqdm import tqdm

import model as echat
from data import LABELS, BadInput, Tokenizer, read_wave, spelled, write_wave
from decoder import StaticCache, pack
from encoder import log_mel
from model import BadCheckpoint

HERE = os.path.dirname(os.path.abspath(__file__))
AT_ONCE = 8  # wavs
COMPILED = 2048  # positions, prompt and answer; what is longer is not compiled
SHORTEST, SILENCE = 0.2, 1e-4  # seconds, peak
EMOTION = re.compile(r"^<([^<>]+)>\s*")


class Chatbot:
    """A loaded checkpoint with everything a turn needs."""

    def __init__(self, args, tokenizer: str | None = None, token2wav: str | None = None):
        """tokenizer, token2wav: folders that hold these, where the checkpoint does not."""
        start = time.time()
        self.args, self.device = args, pick_device(args.device, args.int8)
        if (released := echat.osum_file(args.model)) and not tokenizer:
            raise BadCheckpoint(f"{args.model}: has no tokenizer; give --tokenizer, the folder of "
                                "Qwen2.5-3B-Instruct with tokenizer.json")
        if args.model in echat.PRESETS and not os.path.exists(args.model):
            raise BadCheckpoint(f"--model {args.model}: no such folder; make it: python model.py "
                                f"{args.model} --whisper FILE --llm DIR {args.model}")
        self.tok, self.voice = Tokenizer(tokenizer or args.model), None
        if args.task in ("s2s", "tts"):
            if released and not token2wav:
                raise BadCheckpoint(f"--task {args.task} speaks, {args.model} has no voice: give "
                                    "--token2wav, the folder of CosyVoice-300M-25Hz, or --task s2t")
            self.voice = echat.load_token2wav(token2wav or args.model, args.voice, self.device)
            # The prompt of the voice is heard once.
            self.start = lru_cache(1)(partial(self.voice.start, steps=args.steps))
        self.model = echat.load_echat(args.model, self.device,
                                      torch.bfloat16 if args.bf16 else None)
        self.compile_s = get_ready(self.model, self.voice, args)
        cfg = self.model.cfg
        given = {k: v for k in ("temperature", "top_k", "top_p")
                 if (v := getattr(args, k)) is not None}
        for use in ("understand", "text", "speech"):
            setattr(cfg, use, replace(getattr(cfg, use), **given))
        if self.tok.n_vocab > cfg.decoder.vocab:
            raise BadCheckpoint(f"{tokenizer or args.model}: tokenizer.json has {self.tok.n_vocab} "
                                f"tokens, the model {cfg.decoder.vocab}")
        if self.voice:
            cfg.flow, cfg.vocoder = self.voice.cfg.flow, self.voice.cfg.vocoder
            if cfg.flow.codes != cfg.decoder.codes:
                raise BadCheckpoint(f"{token2wav or args.model}: speaks {cfg.flow.codes} codes, "
                                    f"the model {cfg.decoder.codes}")
        self.load_s, self.history = time.time() - start, []

    def hear(self, path: str, *span: float) -> torch.Tensor:
        """wav, all or from second to second -> log-mel (T, n_mels); BadInput for what nobody could
        answer."""
        wave = read_wave(path, 16000, *span)
        if len(wave) < SHORTEST * 16000:
            raise BadInput(f"{path}: {len(wave) / 16000:.2f} s of audio, too short to understand")
        if (wave - wave.mean()).abs().max() < SILENCE:
            raise BadInput(f"{path}: silence")
        wave = wave / wave.abs().max().clamp(min=1)  # floats may be of any size
        return log_mel(wave, self.model.cfg.encoder.n_mels)

    def answers(self, asked: list[tuple]):
        """Tokens of the answers to several questions, (mel or None, text, earlier turns), at once,
        as EChat.answers yields them."""
        args, think = self.args, self.args.think
        language = self.model.cfg.language
        own = echat.user_prompt(args.labels, language) if args.task == "understand" else \
            echat.NATURAL if think == "natural" and language == "en" else ""
        return self.model.answers(
            self.tok, args.task, [(mel, own if own and mel is not None else text, history)
                                  for mel, text, history in asked],
            think != "off", args.interleave, seed=args.seed, max_tokens=args.max_tokens)

    def turns(self, replies: list["Reply"]):
        """Turns at once as events: ("text", piece), ("audio", wave chunk, its number),
        ("done", result, wave)."""
        for i, phase, token in self.answers([(r.mel, r.asked, r.history) for r in replies]):
            yield from replies[i].take(phase, token)
        for reply in replies:
            yield from reply.end()

    def turn(self, wav: str | None, text: str, *span) -> tuple[dict, torch.Tensor | None]:
        """One turn -> result, wave."""
        *_, (_, result, wave) = self.turns([Reply(self, wav, text, *span)])
        return result, wave

    def read(self, ids: list[int]) -> dict:
        """Text ids of an answer -> think, transcript, labels, reply text."""
        full = self.tok.decode([i for i in ids if i != self.tok.im_end])
        think, end, text = full.partition(echat.THINK_END)
        if not end:  # no think, or one that --max-tokens cut short
            think, text = (full, "") if full.startswith(echat.THINK) and \
                self.args.think != "off" else ("", full.removeprefix(echat.THINK))
        found = echat.read_think(think + end)
        if self.args.task == "understand":  # "words<SAD><OLD>", in Chinese in another order
            words, *tags = re.split(r"<([^<>]+)>", text)
            found |= {w: tag for tag in tags[::2] for w in self.args.labels
                      if w != "asr" and spelled(w, tag) in LABELS[w]}
            found["transcript"] = words.strip() or None if "asr" in self.args.labels else None
        if self.args.task in ("s2s", "s2t", "tts") and (tag := EMOTION.match(text)):
            found["reply_emotion"], text = tag[1], text[tag.end():]
        return {"think": think + end or None, "transcript": found.pop("transcript"),
                "labels": {w: tag and spelled(w.removeprefix("reply_"), tag)
                           for w, tag in found.items()}, "text": text.strip()}


class Reply:
    """A turn as it is said: its text, its codes, and the audio made of them. Audio comes in pieces
    only with --stream: all codes at once are rendered twice as fast."""

    def __init__(self, bot: Chatbot, wav: str | None, text: str, *span: float):
        self.bot, self.wav, self.asked, self.begun = bot, wav, text, time.time()
        self.mel = None if wav is None else bot.hear(wav, *span)  # (T, n_mels)
        self.history = bot.history  # (mel, reply text, its codes) of earlier turns
        self.words, self.codes, self.waves, self.times = [], [], [], {}
        self.state, self.spoken, self.whole = None, 0, False
        # The prompt of tts opens speech, in all else the first code does.
        self.opened = bot.args.task == "tts" and not bot.args.interleave
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.hop = bot.voice.flow.hop_codes if bot.voice and bot.args.stream else math.inf

    def note(self, what: str) -> None:
        self.times.setdefault(what, round(time.time() - self.begun, 3))

    def take(self, phase: str, token: int):
        """A token -> the events that it causes."""
        if phase == "text":
            self.whole = token == self.bot.tok.im_end and not self.bot.voice
            self.note("first_text_s")
            self.words.append(token)
            piece = self.bot.tok.bytes_of(token) if token != self.bot.tok.im_end else b""
            yield "text", self.utf8.decode(piece)
        elif token != self.bot.model.cfg.decoder.codes:
            self.opened = True
            self.codes.append(token)
            if len(self.codes) - self.spoken >= self.hop:
                yield from self.speak(False)
        else:  # the open or close of speech
            self.whole, self.opened = self.opened, True

    def speak(self, final: bool):
        state = self.state or self.bot.start(self.bot.args.seed)
        wave, self.state = self.bot.voice.stream(self.codes[self.spoken:], state, final)
        self.spoken = len(self.codes)
        if len(wave):
            self.note("first_audio_s")
            yield "audio", wave, len(self.waves)
            self.waves.append(wave)

    def end(self):
        """The rest of the audio, then the whole: ("done", result, wave)."""
        bot, task = self.bot, self.bot.args.task
        yield "text", self.utf8.decode(b"", True)  # a character that was cut
        if self.codes and bot.voice:
            yield from self.speak(True)
        wave = torch.cat(self.waves) if self.waves else None
        rate = bot.model.cfg.vocoder.sample_rate
        seconds = 0.0 if wave is None else len(wave) / rate
        self.note("total_s")
        answer, times = bot.read(self.words), {
            "load_s": round(bot.load_s, 3), "first_text_s": None, "first_audio_s": None,
            **self.times, "rtf": round(self.times["total_s"] / seconds, 3) if seconds else None}
        if bot.args.compile:
            times["compile_s"] = round(bot.compile_s, 1)
        if task == "tts":
            answer["text"] = answer["text"] or EMOTION.sub("", self.asked)
        if task in ("s2s", "s2t"):  # what the next turn remembers, as released
            bot.history = [*bot.history, (self.mel, answer["text"], self.codes)][-5:]
        yield "done", {
            "wav": self.wav, "task": task, **answer, "audio": None, "sample_rate": rate,
            "seconds": round(seconds, 3), "codes": len(self.codes), "cut": not self.whole,
            "timings": times}, wave


def get_ready(model: echat.EChat, voice: echat.Token2Wav | None, args) -> float:
    """To generate with, in the precision that args ask for, its steps compiled or packed -> for how
    many seconds it compiled."""
    if args.bf16:
        model.bfloat16()
        if voice:
            voice.bfloat16()
    if args.int8:
        model.decoder.to_int8()
    start, llm = time.time(), model.decoder
    if args.compile:
        llm.static = StaticCache(llm, COMPILED)
        nothing = llm.norm.weight.new_zeros(1, 1, llm.cfg.dim)
        try:
            with torch.inference_mode():
                for _ in range(3):  # now, not in the first answer: compile, warm up, record
                    llm.decode(nothing, llm.static)
        except RuntimeError as e:  # no C++ compiler, no Triton
            raise BadInput(f"--compile: {str(e).strip().splitlines()[0]}") from None
    took = time.time() - start
    for part in filter(None, (None if args.compile else model, voice)):
        pack(part)
    return took


def pick_device(name: str, int8: bool = False) -> str:
    there = [d for d in ("cuda", "npu", "mps") if getattr(torch, d, None)
             and getattr(torch, d).is_available()] + ["cpu"]
    if name not in ("auto", *there):
        raise BadInput(f"--device {name}: there is none here")
    if int8 and name not in ("auto", "cpu"):
        raise BadInput(f"--int8 is for the CPU, not for --device {name}")
    return name if name != "auto" else "cpu" if int8 else there[0]


def reply_path(wav: str | None, out: str | None) -> str:
    """question.wav -> question.reply.wav beside it, or in the folder --out, or --out itself."""
    name = (os.path.splitext(os.path.basename(wav))[0] if wav else "speech") + ".reply.wav"
    if out is None:
        return os.path.join(os.path.dirname(wav) if wav else ".", name)
    return os.path.join(out, name) if os.path.isdir(out) or out.endswith("/") else out


def lines_for_people(result: dict) -> str:
    """What a person reads after a turn: think, reply and one line of timings."""
    lines = {"think": result["think"], "reply": result["text"]}
    if result["task"] == "understand":
        lines = {"transcript": result["transcript"], **result["labels"]}
    if result["audio"]:
        lines["audio"] = f"{result['audio']} ({result['seconds']:.1f} s)"
    parts = [f"{k[:-2].replace('_', ' ')} {seconds:.2f} s" for k, seconds in
             result["timings"].items() if k not in ("load_s", "rtf") and seconds is not None]
    if rtf := result["timings"]["rtf"]:
        parts.append(f"real-time factor {rtf:.2f}")
    if result["cut"]:
        parts.append("cut by --max-tokens")
    return "\n".join([*(f"{k}: {v}" for k, v in lines.items() if v), ", ".join(parts)])


def put(args: argparse.Namespace, what: dict | str) -> None:
    """A line, JSON or not, on stdout, or on stderr where stdout is the raw audio."""
    line = what if isinstance(what, str) else json.dumps(what, ensure_ascii=False)
    print(line, file=sys.stderr if args.out == "-" else sys.stdout, flush=True)


def attempt(work, *given):
    """What work gives; where the input is bad, a line on stderr and None."""
    try:
        return work(*given)
    except BadInput as e:
        print(f"infer.py: {e}", file=sys.stderr)


def play(bot: Chatbot, wavs: list[str | None]) -> bool:
    """Run one turn, or several at once, and write what the flags ask for. False: some failed."""
    replies, written = [attempt(Reply, bot, wav, bot.args.text) for wav in wavs], 0
    replies = [reply for reply in replies if reply]
    with tqdm(desc=os.path.basename(wavs[0] or bot.args.task), unit=" tokens", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for event, *what in bot.turns(replies) if replies else ():
            bar.update()
            if event == "done":
                written += bool(attempt(finish, bot.args, *what))
            elif bot.args.stream:
                stream(bot, wavs[0], event, *what)
    return written == len(wavs)


def stream(bot: Chatbot, wav: str | None, event: str, what, number: int = 0) -> None:
    """A piece of a reply: text as JSON, audio as PCM on stdout or as a file of its own."""
    args, told = bot.args, {"event": event, "text": what}
    if event == "audio" and args.out == "-":
        return pcm(what)
    if event == "audio":
        stem = os.path.splitext(reply_path(wav, args.out))[0]
        for old in glob.glob(glob.escape(stem) + ".[0-9][0-9][0-9].wav") if number == 0 else ():
            os.remove(old)  # of a longer reply
        path = f"{stem}.{number:03d}.wav"
        write_wave(path, what, bot.model.cfg.vocoder.sample_rate)
        told = {"event": event, "path": path, "samples": len(what)}
    if args.json and len(what):
        put(args, told)


def pcm(wave: torch.Tensor) -> None:
    """Raw 16-bit audio on stdout."""
    sys.stdout.buffer.write((wave.clamp(-1, 1) * 32767).round().short().numpy().tobytes())
    sys.stdout.buffer.flush()


def finish(args: argparse.Namespace, result: dict, wave: torch.Tensor | None) -> bool:
    """A whole reply: the wav, and JSON or lines for people."""
    if wave is not None and args.out != "-":
        result["audio"] = reply_path(result["wav"], args.out)
        write_wave(result["audio"], wave, result["sample_rate"])
    elif wave is not None and not args.stream:
        pcm(wave)
    told = {"event": "done", **result} if args.stream else result
    put(args, told if args.json else lines_for_people(result))
    return True


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
    p.add_argument("--steps", type=int, help="of the flow, not the checkpoint's")
    p.add_argument("--voice", help="voice.safetensors of another voice")
    p.add_argument("--out", help="wav to write, folder, or - for raw PCM on stdout")
    p.add_argument("--json", action="store_true", help="one JSON object a wav on stdout")
    p.add_argument("--interactive", action="store_true", help="several turns, one wav path a line")
    p.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    p.add_argument("--int8", action="store_true", help="the LLM in 8 bits, on a CPU")
    p.add_argument("--compile", action="store_true",
                   help="compile the LLM's steps first: for a GPU, a CPU gets slower")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-tokens", type=int, default=1200)
    for flag, kind in (("--temperature", float), ("--top-k", int), ("--top-p", float)):
        p.add_argument(flag, type=kind, help="not the checkpoint's")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "npu", "mps"))
    args = p.parse_args()
    args.labels = [w.strip() for w in args.labels.split(",")]
    if wrong := objection(args):
        p.error(wrong)
    args.labels = [w for w in echat.ASKED if w in args.labels]
    return args


def objection(args: argparse.Namespace) -> str | None:
    """The first thing that is wrong with the arguments."""
    heard, several = args.task not in ("t2t", "tts"), len(args.wavs) > 1
    folder = args.out and (os.path.isdir(args.out) or args.out.endswith("/"))
    home = os.path.dirname(args.out or "") or "."
    odd = [repr(label) for label in args.labels if label not in echat.ASKED]
    checks = (
        (odd, f"--labels: {', '.join(odd)} is not among {', '.join(echat.ASKED)}"),
        (not heard and (not args.text.strip() or args.wavs),
         f"--task {args.task} takes --text and no wav"),
        (not heard and args.interactive, f"--interactive reads wavs, --task {args.task} none"),
        (heard and not args.wavs and not args.interactive, "a wav is needed"),
        (args.out and several and not folder, "--out must be a folder for several wavs"),
        (not folder and not os.path.isdir(home), f"--out {args.out}: no such folder"),
        (several and len({reply_path(wav, args.out) for wav in args.wavs}) < len(args.wavs),
         "two wavs have the same name: their replies would be one file"),
        (not 1 <= args.max_tokens <= 100000 or abs(args.seed) >= 2**63
         or args.steps is not None and args.steps < 1,
         "--max-tokens, --steps, --seed: out of range"),
        (not (args.temperature or 0) >= 0 or (args.top_k or 0) < 0
         or not 0 < (1 if args.top_p is None else args.top_p) <= 1,
         "--temperature, --top-k, --top-p: out of range"))
    return next((told for wrong, told in checks if wrong), None)


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
    for text in (sys.stdin, sys.stdout):
        if isinstance(text, io.TextIOWrapper):  # names of files are bytes
            text.reconfigure(errors="surrogateescape")
    args, good = arguments(), True
    try:
        bot = Chatbot(args, args.tokenizer, args.token2wav)
        if args.out and args.out.endswith("/"):
            os.makedirs(args.out, exist_ok=True)
        for wavs in groups(args):
            good &= play(bot, wavs)
            bot.history = bot.history if args.interactive else []
    except BrokenPipeError:  # the player was closed; what is left in the buffer has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (BadInput, BadCheckpoint, OSError) as e:
        told = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else e
        print(f"infer.py: {told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(1)
    sys.exit(0 if good else 2)


if __name__ == "__main__":
    main()
