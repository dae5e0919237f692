"""Peak memory of a fit beyond its data, at numbers of frames a hundredfold apart.

    python -m bench.fit_memory

Every fit has a process of its own: K = 1,024 components on frames of D = 80, streamed in batches
that are made from one block, so that the data is that block however long the stream is. What is
measured is the growth of the resident peak (VmHWM) from before the fit to its end. Prints a line
a size and appends it to ``bench/results/fit_memory.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.records import RESULTS, append, peak_bytes, surroundings
from gmm_jepa.gmm import GaussianMixture

K, D = 1024, 80
BLOCK_FRAMES = 65_536


def batches(block: np.ndarray, n_frames: int) -> Iterator[np.ndarray]:
    """The block again and again, views of it, until there are `n_frames`."""
    for start in range(0, n_frames, len(block)):
        yield block[: n_frames - start]


def measure(n_frames: int, iterations: int) -> dict[str, float]:
    """Fit in this process."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((64, D))
    block = centres[rng.integers(64, size=BLOCK_FRAMES)] + rng.standard_normal((BLOCK_FRAMES, D))
    block = block.astype(np.float32)
    torch.ones(512, 512) @ torch.ones(512, 512)  # the libraries' own first buffers
    before, begin = peak_bytes(), time.perf_counter()
    mixture = GaussianMixture(K, max_iter=iterations, tol=0.0)
    mixture.fit(lambda: batches(block, n_frames))
    assert mixture.n_frames_ == n_frames
    seconds = time.perf_counter() - begin
    return {"n_frames": n_frames, "beyond_data_bytes": peak_bytes() - before, "seconds": seconds}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[100_000, 10_000_000], help="of each fit"
    )
    parser.add_argument("--iterations", type=int, default=2, help="of EM")
    parser.add_argument("--here", action="store_true", help="one size, as JSON, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.frames[0], arguments.iterations)))
        return
    for n_frames in arguments.frames:
        command = [sys.executable, "-m", "bench.fit_memory", "--here", "--frames", str(n_frames)]
        command += ["--iterations", str(arguments.iterations)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        line = json.loads(done.stdout)
        line = {"name": "fit_memory", "K": K, "D": D, **surroundings(), **line}
        append("fit_memory", line, arguments.out)
        print(
            f"{n_frames:>12,} frames: {line['beyond_data_bytes'] / 2**20:.0f} MiB beyond the data, "
            f"{line['seconds']:.1f} s for {arguments.iterations} iterations and the start"
        )


if __name__ == "__main__":
    main()
