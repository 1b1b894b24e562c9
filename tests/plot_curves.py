"""The README's picture of training: python tests/plot_curves.py RUN... OUT.png (needs matplotlib).

One panel a stage: every logged loss over its steps, held-out ones with dots.
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SKIP = {"step", "stage", "epoch", "lr", "rate", "wait", "minutes", "used", "perplexity", "commit",
        "gb", "mfu", "rejected", "skipped", "reply"}


def main(runs: list[str], out: str) -> None:
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.4 * rows), squeeze=False)
    for ax in axes.flat[len(runs):]:
        ax.axis("off")
    for ax, run in zip(axes.flat, runs):
        with open(f"{run}/log.jsonl", encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        for name in sorted({k for line in lines for k in line} - SKIP):
            points = [(line["step"], line[name]) for line in lines if name in line]
            ax.plot(*zip(*points), "." if name.startswith("valid") else "-", label=name, lw=1)
        ax.set_title(lines[0]["stage"], fontsize=9)
        ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.tick_params(labelsize=6)
        ax.set_yscale("log")
    fig.tight_layout()
    fig.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
