"""What a speech tokenizer's codes cost a recogniser: letter errors and CTC's nats a byte on held-out
speech through the codes, and without them from the same features; codes in use, bits a second.

    python tests/quantiser.py assets/mini corpus/tts.train.jsonl corpus/tts.test.jsonl 400

A checkpoint keeps of its tokenizer what makes codes. So two recognisers are trained, on the same
400 batches, on its frozen features: each from the encoder's upper blocks and a new CTC head.
"""

import json
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as echat
from data import Source
from encoder import SpeechTokenizer
from eval import edit_distance, interval
from train import S3, learning_rate

BLANK = 256


def recogniser(folder: str, through: bool) -> SpeechTokenizer:
    """Behind the codes of a checkpoint, or behind the features that they stand for."""
    net = SpeechTokenizer(replace(echat.load_config(folder).s3, vocab=BLANK)).eval()
    net.init_from_encoder(echat.load_echat(folder).encoder.state_dict())
    net.load_state_dict(net.state_dict() | echat.load_s3(folder).state_dict())
    net.codebook.fitted.fill_(through)
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(("tail.", "ln_post.", "head.")))
    return net


def batches(s3: S3, path: str):
    """Batches of one list after the other, each with the epoch it is of."""
    source = Source(path, 1.0, s3.make, 3200, 0)
    for clips in source.batches():
        yield source.state["epoch"], s3.collate(clips, "")


def hear(net: SpeechTokenizer, batch: dict):
    return net(*(batch[k] for k in ("mel", "mel_lengths", "text", "text_lengths")))


def taught(nets: dict[str, SpeechTokenizer], s3: S3, path: str, steps: int) -> None:
    """All of them on the same batches, a new head at the rate of mini's recipe, the rest slower."""
    how = Namespace(lr=1.0, warmup=80, steps=steps, cooldown=steps // 2)
    optimisers = {name: torch.optim.AdamW([
        {"params": net.head.parameters(), "scale": 2e-3},
        {"params": [*net.tail.parameters(), *net.ln_post.parameters()], "scale": 3e-4}])
        for name, net in nets.items()}
    for step, (_, batch) in zip(range(1, steps + 1), batches(s3, path)):
        heard = {name: hear(net, batch)[1:] for name, net in nets.items()}
        for name, (loss, _) in heard.items():
            for group in optimisers[name].param_groups:
                group["lr"] = group["scale"] * learning_rate(step, how)
            optimisers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(nets[name].parameters(), 1.0)
            optimisers[name].step()
        if step % 100 == 0:
            print(step, {name: stats["ctc"] for name, (_, stats) in heard.items()}, flush=True)


def read(logits: torch.Tensor) -> str:
    """The most probable path (T, 257) of CTC as text."""
    path = logits.argmax(-1).unique_consecutive()
    return bytes(path[path != BLANK].tolist()).decode(errors="replace")


@torch.no_grad()
def main(folder: str, train_list: str, test_list: str, steps: str) -> None:
    torch.manual_seed(0)
    s3 = S3(Namespace(whisper=None), echat.load_config(folder), None)
    nets = {name: recogniser(folder, name == "codes") for name in ("codes", "features")}
    with torch.enable_grad():
        taught(nets, s3, train_list, int(steps))
    letters, nats, used = {name: [] for name in nets}, Counter(), Counter()
    for epoch, batch in batches(s3, test_list):
        if epoch:
            break
        codes, lengths = nets["codes"].encode(batch["mel"], batch["mel_lengths"])
        used.update(code for row, n in zip(codes.tolist(), lengths) for code in row[:n])
        for name, net in nets.items():
            logits, _, stats = hear(net, batch)
            nats[name] += stats["ctc"] * len(codes)
            for row, n, clip in zip(logits, lengths * net.cfg.pool, batch["clips"]):
                letters[name].append((edit_distance([*clip.text], [*read(row[:n])]),
                                      len(clip.text)))
    share = np.array([*used.values()]) / used.total()
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    size = nets["codes"].cfg.codes
    print(json.dumps({
        "clips": len(letters["codes"]), "steps": int(steps),
        **{f"letter errors, {name}": interval(found) for name, found in letters.items()},
        **{f"nats a byte, {name}": nats[name] / len(letters[name]) for name in nets},
        "codes used": len(used) / size, "perplexity": perplexity,
        "bits a second": 25 * float(np.log2(perplexity)), "at most": 25 * float(np.log2(size))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
