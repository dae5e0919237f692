"""Time that the host takes for a training step on CUDA, where the device takes none.

    python -m bench.null_cuda python -m bench.host_time --preset paper
    python -m bench.null_cuda python -m bench.host_time --preset paper --compile --cuda-graphs

A step is hardly faster than this, however fast the GPU is. What the driver does for a launch, some
two microseconds, is not in it. It depends on how many operations there are and little on how large
they are, so the default is few rows of a few seconds. Beside the time: kernels and graphs launched,
and how often the host waited for the device, which must be never. JSON lines go to
``host_time.jsonl``. Convolutions take no cuDNN here and launch two kernels a row, so
GMM_JEPA_UNPROVEN_KERNELS=1, which has few of them, is the better picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench.null_cuda.counts import counts
from bench.records import RESULTS, append, need_device, quantiles, surroundings
from bench.train import Ours, sized
from gmm_jepa.calibration import SyntheticCorpus
from gmm_jepa.ops import fused
from gmm_jepa.presets import PRESETS
from gmm_jepa.train.trainer import training_step

WARM_UP_STEPS = 3
"""Networks are compiled in the first, a graph is recorded in the second."""


def measure(ours: Ours, steps: int) -> dict[str, object]:
    """Milliseconds and counts of a step, of batches made before."""
    batches = [next(ours.batches) for _ in range(WARM_UP_STEPS + steps)]
    for batch in batches[:WARM_UP_STEPS]:
        training_step(ours.state, batch, ours.recipe, ours.peers)
    before, times = counts(), []
    for batch in batches[WARM_UP_STEPS:]:
        begin = time.perf_counter()
        training_step(ours.state, batch, ours.recipe, ours.peers)
        times.append(1e3 * (time.perf_counter() - begin))
    found = counts().since(before)
    a_step = {name: count / steps for name, count in found._asdict().items()}
    return {"host_ms": quantiles(times), **a_step}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    parser.add_argument("--rows", type=int, default=2, help="utterances in a batch")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each utterance")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--cuda-graphs", action="store_true", help="and replay them as CUDA graphs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    need_device("cuda")
    counts()  # ends here where they are not to be had
    settings = {"precision": options.precision, "compile": options.compile}
    settings |= {"cuda_graphs": options.cuda_graphs}
    recipe = sized(PRESETS[options.preset](), options.rows, options.seconds, **settings)
    corpus = SyntheticCorpus(4 * options.rows, options.seconds)
    found = measure(Ours(recipe, corpus, torch.device("cuda", 0)), options.steps)
    how = "with CUDA graphs" if options.cuda_graphs else "compiled" if options.compile else "eager"
    print(
        f"{options.preset}, {options.precision}, {how}: {found['host_ms']['median']:.1f} ms, "
        f"{found['launches']:.0f} launches, {found['graphs']:.0f} graphs, "
        f"{found['waits']:g} waits"
    )
    line = {"name": "host_time", "preset": options.preset, **settings}
    line |= {"shape": {"rows": options.rows, "seconds": options.seconds}}
    line |= {"unproven_kernels": fused.uses_unproven, **found}
    append("host_time", {**line, **surroundings()}, options.out)
    if found["waits"] or found["impossible"]:
        raise SystemExit(f"{found['waits']:g} waits, {found['impossible']:g} impossible launches")


if __name__ == "__main__":
    main()
