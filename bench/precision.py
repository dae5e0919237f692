"""The loss of a bf16 training beside that of a float32 one: the same weights, batches and dropout.

    python -m bench.precision --preset smoke --steps 200

Each line of metrics is the mean over so many steps. Prints both curves and their largest relative
distance, and appends a JSON line to ``precision.jsonl``. Audio is real where a corpus is given,
else synthetic.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from bench.records import RESULTS, append, need_device, surroundings
from bench.train import Ours
from gmm_jepa.calibration import SyntheticCorpus
from gmm_jepa.config import Recipe
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.presets import PRESETS

LOG_EVERY = 10


def curve(recipe: Recipe, corpus: Corpus, device: torch.device) -> list[dict[str, float]]:
    """Metrics of every `LOG_EVERY` steps."""
    ours, lines = Ours(recipe, corpus, device), []
    for step in range(1, recipe.train.steps + 1):
        ours()
        if step % LOG_EVERY == 0:
            lines.append(ours.state.meters.read())
    return lines


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="smoke")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--corpus", type=Path, help="audio, a manifest or a packed corpus")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    need_device(options.device)
    recipe = PRESETS[options.preset]()
    segment_s = recipe.data.max_segment_s
    corpus: Corpus = SyntheticCorpus(round(16 * recipe.data.batch_s / segment_s), segment_s)
    if options.corpus is not None:
        corpus = open_corpus(options.corpus, rejects=RejectLog())
    curves = {}
    for precision in ("fp32", "bf16"):
        train = dataclasses.replace(recipe.train, steps=options.steps, precision=precision)
        changed = dataclasses.replace(recipe, train=train)
        lines = curve(changed, corpus, torch.device(options.device))
        curves[precision] = [line["loss"] for line in lines]
    apart = [abs(b - a) / abs(a) for a, b in zip(curves["fp32"], curves["bf16"])]
    print("step     fp32     bf16")
    for i, (wide, narrow) in enumerate(zip(curves["fp32"], curves["bf16"]), start=1):
        print(f"{i * LOG_EVERY:4}  {wide:7.4f}  {narrow:7.4f}")
    print(f"largest relative distance {max(apart):.1e}")
    line = {"name": "precision", "preset": options.preset, "steps": options.steps}
    line |= {"corpus": str(options.corpus.name) if options.corpus else "synthetic"}
    line |= {"log_every": LOG_EVERY, "loss": curves, "largest_relative_distance": max(apart)}
    append("precision", line | surroundings(options.device), options.out)


if __name__ == "__main__":
    main()
