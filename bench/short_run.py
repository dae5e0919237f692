"""A real training for so many seconds: packed audio, mixture, training, and a profile of it.

    python -m bench.short_run --seconds 60 --preset paper --precision bf16

It is the run of ``gmm-jepa run`` up to the evaluation, stopped by SIGTERM as a scheduler would stop
it, on ``--corpus`` (a packed corpus) or on synthetic audio that is packed first; soundfile is not
needed. Prints the rate, the share of time spent waiting for data and the losses at the start and at
the end, and appends a JSON line to ``short_run.jsonl``; the profile (trace and table by operation)
goes to a folder ``profile`` beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np

from bench.records import RESULTS, append, surroundings
from gmm_jepa.calibration import SyntheticCorpus
from gmm_jepa.config import Recipe, Sources
from gmm_jepa.data.pack import pack_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.distributed import Processes, processes
from gmm_jepa.pipeline import open_run
from gmm_jepa.presets import PRESETS
from gmm_jepa.train.metrics import read_metrics

LOG_EVERY = 5
EDGE_LINES = 2
"""Lines of metrics whose losses are averaged at either end."""


def shortened(preset: str, precision: str, *, compiled: bool) -> Recipe:
    """The preset with a line of metrics every few steps and nothing written but those."""
    recipe = PRESETS[preset]()
    train = dataclasses.replace(
        recipe.train,
        precision=precision,
        compile=compiled,
        log_every=LOG_EVERY,
        checkpoint_every=recipe.train.steps,
        tensorboard=False,
    )
    return dataclasses.replace(recipe, train=train)


def packed(folder: Path, recipe: Recipe, minutes: float) -> Path:
    """Synthetic audio, packed."""
    segment_s = recipe.data.max_segment_s
    corpus = SyntheticCorpus(int(60 * minutes / segment_s) + 1, segment_s)
    pack_corpus(corpus, folder / "packed", rejects=RejectLog())
    return folder / "packed"


def train_for(
    seconds: float, recipe: Recipe, corpus: Path, folder: Path, profile: Path, peers: Processes
) -> list[dict]:
    """The lines of metrics of a training that is asked to stop after so long."""
    run = open_run(folder, Sources(audio=(str(corpus),)), recipe, peers)
    audio = run.audio().train
    run.targets(audio)  # its time is not the training's
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        run.train(audio, profile=profile)
    finally:
        timer.cancel()
    return read_metrics(run.folder.metrics)


def summary(lines: list[dict]) -> dict:
    """Rates over the second half of the lines, losses at both ends."""
    late = lines[len(lines) // 2 :]
    edges = {"first": lines[:EDGE_LINES], "last": lines[-EDGE_LINES:]}
    losses = {
        edge: {name: float(np.mean([line[name] for line in part])) for name in ("loss", "kl")}
        for edge, part in edges.items()
    }
    return {
        "steps": lines[-1]["step"],
        "audio_s_per_s": float(np.median([line["audio_s_per_s"] for line in late])),
        "wait_share": float(np.median([line["wait_share"] for line in late])),
        "skipped_steps": lines[-1]["skipped_steps"],
        "losses": losses,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--corpus", type=Path, help="packed; default: synthetic audio")
    parser.add_argument("--minutes", type=float, default=60.0, help="of synthetic audio")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    recipe = shortened(options.preset, options.precision, compiled=options.compile)
    with tempfile.TemporaryDirectory() as name, processes() as peers:
        folder = Path(name)
        corpus = options.corpus or packed(folder, recipe, options.minutes)
        profile = options.out / "profile"
        lines = train_for(options.seconds, recipe, corpus, folder / "run", profile, peers)
        if len(lines) < 2 * EDGE_LINES:
            raise SystemExit(f"{len(lines)} lines of metrics in {options.seconds:g} s: too few")
        found = summary(lines)
        where = surroundings(peers.device.type)
    losses = {edge: f"{values['loss']:.3f}" for edge, values in found["losses"].items()}
    print(
        f"{options.preset}, {options.precision}: {found['steps']} steps, "
        f"{found['audio_s_per_s']:.0f} audio s/s, {found['wait_share']:.1%} waiting for data, "
        f"loss {losses['first']} to {losses['last']}"
    )
    line = {"name": "short_run", "preset": options.preset, "precision": options.precision}
    line |= {"compile": options.compile, "corpus": "given" if options.corpus else "synthetic"}
    append("short_run", {**line, **found, **where}, options.out)


if __name__ == "__main__":
    main()
