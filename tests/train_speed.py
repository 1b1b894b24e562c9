"""The decoder's training beside a plain loop over the same model in transformers: tokens of data
(no pads) a second, ours / theirs. Same weights, same records, AdamW and clipping on both sides, in
turns.

    pip install transformers
    python tests/train_speed.py assets/mini corpus/{tts,text,plain,echat}.train.jsonl

Theirs is what one would write: records in random order, a fixed number a batch, so many that a
padded batch has as many positions as ours, logits of all positions. Ours is what train.py does:
batches of one kind sorted by length, the prompt computed once, logits where there is a target.
Encoder and adapter take no part: the slots of the user's speech are zeros on both sides.
"""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import train

BUDGET, EACH, ROUNDS, STEPS = 2800, 600, 8, 5


def twin(net: torch.nn.Module) -> torch.nn.Module:
    """The decoder in transformers: speech rows behind the text rows of table and head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c, state = net.cfg, net.state_dict()
    peer = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=c.vocab + c.codes + 1, hidden_size=c.dim, intermediate_size=c.ffn,
        head_dim=c.head_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    text, rows = state.pop("embed_tokens.weight"), state.pop("speech_embed.weight")
    peer.set_input_embeddings(torch.nn.Embedding(c.vocab + c.codes + 3, c.dim))
    peer.lm_head = torch.nn.Linear(c.dim, c.vocab + c.codes + 1)
    peer.lm_head.weight.data = torch.cat([text, state.pop("speech_head.weight")])
    peer.lm_head.bias.data = torch.cat([torch.zeros(c.vocab), state.pop("speech_head.bias")])
    found = {f"model.{k}": v for k, v in state.items()}
    found["model.embed_tokens.weight"] = torch.cat([text, rows])
    wrong = peer.load_state_dict(found, strict=False)
    assert not wrong.unexpected_keys and set(wrong.missing_keys) == {
        "lm_head.weight", "lm_head.bias"}
    return peer.train()


class Plain:
    """The plain loop."""

    def __init__(self, peer, pad: int):
        self.peer, self.pad = peer, pad
        self.optimizer = torch.optim.AdamW(peer.parameters(), 1e-5, weight_decay=0.01)

    def loss(self, samples: list) -> torch.Tensor:
        ids = data.pad_stack([torch.tensor(s.ids) for s in samples], self.pad)
        labels = data.pad_stack([torch.tensor(s.targets) for s in samples], -100)
        real = data.pad_stack([torch.ones(s.length, dtype=torch.long) for s in samples])
        slots = (ids < 0)[..., None]
        embeds = self.peer.get_input_embeddings()(ids.clamp(min=0)).masked_fill(slots, 0)
        return self.peer(inputs_embeds=embeds, attention_mask=real, labels=labels).loss

    def step(self, samples: list) -> None:
        self.optimizer.zero_grad()
        self.loss(samples).backward()
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), 5.0)
        self.optimizer.step()


def positions(batch: list) -> int:
    return len(batch) * max(s.length for s in batch)


def pads(batches: list) -> float:
    return 1 - sum(s.length for b in batches for s in b) / sum(map(positions, batches))


def clocked(step, batches: list) -> float:
    """Tokens of real data a second."""
    begin = time.perf_counter()
    for batch in batches:
        step(batch)
    return sum(s.length for b in batches for s in b) / (time.perf_counter() - begin)


def main(init: str, lists: list[str]) -> None:
    kept = []
    train.Trainer.run = lambda trainer: kept.append(trainer)
    sys.argv = ["train.py", "--stage", "s2s", "--trains", "decoder", "--init", init, "--lr", "1e-5",
                "--warmup", "1", "--accum", "1", "--device", "cpu", "--data", *lists[:1]]
    train.main()
    trainer, rng, samples = kept[0], random.Random(0), []
    for path in lists:
        made = [data.attempt(trainer.trainee.make, r, 1, rng)
                for r, _ in zip(data.records(path), range(EACH))]
        samples += [s for s in made if not isinstance(s, str)]
    for sample in samples:
        sample.audio = []
    ours = data.cut_batches(samples, BUDGET)
    rng.shuffle(ours)
    rng.shuffle(samples)
    size = min(range(1, 40), key=lambda n: abs(BUDGET - np.mean(
        [positions(samples[i:i + n]) for i in range(0, len(samples), n)])))
    theirs = [samples[i:i + size] for i in range(0, len(samples), size)]
    plain = Plain(twin(trainer.trainee.module.decoder), trainer.trainee.tok.im_end)

    trainer.trainee.module.train()
    with torch.no_grad():  # the same loss on the same batch
        loss, _ = trainer.trainee.loss("model", trainer.collate(theirs[0], ""))
        torch.testing.assert_close(plain.loss(theirs[0]), loss, atol=1e-4, rtol=1e-4)

    def step(batch: list) -> None:
        trainer.step += 1
        trainer.update([trainer.collate(batch, "")])
    rates = np.zeros((ROUNDS + 1, 2))  # the first is to warm up
    for i in range(ROUNDS + 1):
        part = slice(i * STEPS, (i + 1) * STEPS)
        rates[i] = clocked(step, ours[part]), clocked(plain.step, theirs[part])
    ratio = rates[1:, 0] / rates[1:, 1]
    kinds = [s.kind for s in samples]
    alike = sorted((s for s in samples if s.kind == max(kinds, key=kinds.count)),
                   key=lambda s: s.length)
    each = {}  # budget -> ms of CPU a step, with records of the median length
    for budget in (700, 1400, 2800, 5600):
        n = budget // alike[len(alike) // 2].length
        batch, times = alike[(len(alike) - n) // 2:][:n], []
        for _ in range(6):
            begin = time.process_time()
            step(batch)
            times.append(1000 * (time.process_time() - begin))
        each[positions(batch)] = float(np.median(times[1:]).round(1))
    print(json.dumps({
        "threads": torch.get_num_threads(), "records": len(samples), "their_batch": size,
        "tokens_per_s": rates[1:].mean(0).round().tolist(),
        "pads": [round(pads(b), 3) for b in (ours, theirs)],
        "ours_over_theirs": np.percentile(ratio, (50, 0, 100)).round(2).tolist(),
        "ms_of_a_step_by_positions": each}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
