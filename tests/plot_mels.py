"""The README's mels and wavs of a voice in training (needs matplotlib):

    python tests/plot_mels.py LIST KEY OUT MODEL...

The recorded speech of a record of LIST, and what the flow and vocoder of each checkpoint make of
its codes: OUT.png, OUT_0.wav (recorded), OUT_1.wav, ...
"""
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from data import records, spoken_wave, write_wave
from model import load_token2wav
from vocoder import VocoderConfig, mel_spectrogram


def main(path: str, key: str, out: str, *models: str) -> None:
    record = next(r for r in records(path) if r["key"] == key)
    waves = {"recorded": spoken_wave(record, 24000)}
    for model in models:
        voice = load_token2wav(model)
        waves[model] = voice.stream(record["extra"]["speech_token"], voice.start(), final=True)[0]
    fig, axes = plt.subplots(1, len(waves), figsize=(3.6 * len(waves), 2.4), sharey=True)
    for i, (ax, (name, wave)) in enumerate(zip(axes, waves.items())):
        write_wave(f"{out}_{i}.wav", wave, 24000)
        ax.imshow(mel_spectrogram(wave[None], VocoderConfig())[0].T, origin="lower", aspect="auto",
                  vmin=-10, vmax=2)
        ax.set_title(f"{i}: {os.path.basename(os.path.normpath(name))}", fontsize=8)
        ax.tick_params(labelsize=6)
    fig.tight_layout()
    fig.savefig(f"{out}.png", dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
