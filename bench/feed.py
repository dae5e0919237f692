"""How fast one worker process feeds training, from flac files and from a packed corpus.

    python -m bench.feed

Makes a corpus of noise with the level of speech (flac files, and a packed corpus of the same
samples) in a temporary folder, checks that both give the same samples, and drains the training
loader with the batches of a preset: reading alone, and with the masks and the noise that a
training step wants. Rates are seconds of audio per second of CPU time: of the worker, all it does
to hand batches over included, and of the main process that receives them. Prints them, the corpora
in turn, and appends JSON lines to ``bench/results/feed.jsonl``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from bench.records import RESULTS, append, quantiles, surroundings
from gmm_jepa.config import Recipe
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.loader import Prepare, RankView, make_loader
from gmm_jepa.data.pack import pack_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.objectives.prepare import MaskAndDisturb
from gmm_jepa.presets import PRESETS
from gmm_jepa.train.trainer import batch_plan

WARM_UP_BATCHES = 10
EPOCHS = {"flac": 2, "packed": 12}


def make_corpora(folder: Path, minutes: float, longest_s: float) -> dict[str, Corpus]:
    """The same audio twice: as flac files and packed.

    Utterances last half of `longest_s` to all of it. White noise compresses worst of all, so
    flac decodes no slower on speech.
    """
    rng = np.random.default_rng(0)
    audio = folder / "flac"
    audio.mkdir()
    seconds, number = 0.0, 0
    while seconds < 60 * minutes:
        n_samples = int(rng.uniform(0.5, 1.0) * longest_s * SAMPLE_RATE_HZ)
        samples = (0.05 * rng.standard_normal(n_samples)).astype(np.float32)
        soundfile.write(audio / f"{number:05d}.flac", samples, SAMPLE_RATE_HZ)
        seconds, number = seconds + n_samples / SAMPLE_RATE_HZ, number + 1
    flac = open_corpus(audio, rejects=RejectLog())
    return {"flac": flac, "packed": pack_corpus(flac, folder / "packed", rejects=RejectLog())}


def check(corpora: dict[str, Corpus]) -> None:
    """Both corpora must hold the same samples."""
    for i in range(0, len(corpora["flac"]), 7):
        samples = [
            corpus.read(i, 0, int(corpus.durations_samples[i])) for corpus in corpora.values()
        ]
        if not all(np.array_equal(samples[0], other) for other in samples):
            raise SystemExit(f"utterance {i}: flac and packed samples differ")


class Clocked:
    """What `prepare` gives, and the CPU time of the worker until then."""

    def __init__(self, prepare: Prepare | None):
        self.prepare = prepare

    def __call__(self, view: RankView) -> dict[str, Any]:
        """Extras of one batch."""
        extras = self.prepare(view) if self.prepare is not None else {}
        return extras | {"cpu_s": time.process_time()}


def drain(
    corpus: Corpus, recipe: Recipe, *, prepared: bool, epochs: int
) -> Callable[[], dict[str, float]]:
    """Passes over all batches, made by one worker; the rates of both processes."""
    plan = batch_plan(corpus, recipe)
    prepare = None
    if prepared:
        prepare = MaskAndDisturb(recipe.objective, recipe.encoder.n_frames, seed=recipe.seed)

    def run() -> dict[str, float]:
        n_batches = WARM_UP_BATCHES + epochs * plan.n_batches()
        batches = make_loader(
            corpus, plan, stop_step=n_batches, workers=1, prepare=Clocked(prepare)
        )
        audio_s = 0.0
        for batch in batches:
            if batch.step < WARM_UP_BATCHES:
                worker_s, main_s = batch.extras["cpu_s"], time.process_time()
            else:
                audio_s += float(batch.lengths_samples.sum()) / SAMPLE_RATE_HZ
        worker_s, main_s = batch.extras["cpu_s"] - worker_s, time.process_time() - main_s
        return {"worker": audio_s / worker_s, "main": audio_s / main_s}

    return run


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="of audio")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    recipe = PRESETS[arguments.preset]()
    with tempfile.TemporaryDirectory() as folder:
        corpora = make_corpora(Path(folder), arguments.minutes, recipe.data.max_segment_s)
        check(corpora)
        sides = {
            f"{name}, {'masks and noise' if prepared else 'reading alone'}": drain(
                corpus, recipe, prepared=prepared, epochs=EPOCHS[name]
            )
            for name, corpus in corpora.items()
            for prepared in (False, True)
        }
        turns = [{name: side() for name, side in sides.items()} for _ in range(arguments.repeats)]
        audio_s = corpora["flac"].total_s
    for name in sides:
        rates = {
            process: {
                key: round(rate)
                for key, rate in quantiles([turn[name][process] for turn in turns]).items()
            }
            for process in ("worker", "main")
        }
        worker = rates["worker"]
        print(
            f"{name:<26}{worker['median']:>8,} x real time ({worker['p20']:,} to "
            f"{worker['p80']:,}); the main process could take {rates['main']['median']:,}"
        )
        line = {"name": "feed", "side": name, "preset": arguments.preset, **surroundings()}
        append("feed", line | {"audio_s": audio_s, "times_real_time": rates}, arguments.out)


if __name__ == "__main__":
    main()
