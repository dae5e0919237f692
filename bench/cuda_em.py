"""EM statistics on a CUDA device: the native kernels beside chunked torch, accuracy against speed.

    python -m bench.cuda_em

K = 1,024, D = 80, frames drawn from a mixture whose components overlap as those of speech do
(`bench.mixtures`). The mixture is a new one at every call, as in EM, and is packed anew. Each side
first runs on a small part against float64 on the CPU. Plain torch is there in float64, as the
operator's own exact form, and in float32 (`bench.peers.chunked_torch`). Triton has no EM kernel;
the time of its log-likelihood from products, in the form that is not exact, stands for a lower
bound of one. Median, p20 and p80 of `--repeats`, and, by the profiler, nanoseconds a frame of each
native kernel, and so which of the two screens ran: that of warpgroups' products only with
``GMM_JEPA_UNPROVEN_KERNELS=1``. A line each side is appended to ``bench/results/cuda_em.jsonl``.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import largest_share, worst
from bench.mixtures import frames_of, overlapping
from bench.peers.chunked_torch import ChunkedMixture
from bench.records import RESULTS, append, need_device, surroundings, take_turns
from gmm_jepa import ops
from gmm_jepa.ops import Mixture, em, native, native_mixture

FLOOR_FRAMES_PER_S = 2.4e9  # bytes and bfloat16 products; csrc/README.md
PROFILED_CALLS = 3
FRAMES_OF_TORCH = 1 << 20
CHUNK = 1 << 16
"""Of float32 torch: 256 MB of responsibilities."""


def error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, relative to each field's own size."""
    return worst(largest_share(g, e) for g, e in zip(got, expected, strict=True))


def kernels_ns_per_frame(call: Callable[[], object], n_frames: int) -> dict[str, float]:
    """Device time of each native kernel, the longest first; "other" is packing and filling."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize()
    taken: dict[str, float] = defaultdict(float)
    for event in run.key_averages():
        kernel = re.search(r"em_([a-z_]+)_kernel", event.key)
        name = kernel[1] if kernel else "other"
        taken[name] += 1e3 * event.self_device_time_total / (PROFILED_CALLS * n_frames)
    longest_first = sorted(taken.items(), key=lambda item: -item[1])
    return {name: round(ns, 3) for name, ns in longest_first if ns > 0.0}


def main() -> None:
    """Check, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1 << 23, help="drawn from a mixture")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    need_device("cuda")
    K, D = 1024, 80
    draw = torch.Generator("cuda").manual_seed(0)
    mixture = overlapping(K, D, draw)
    frames = frames_of(mixture, options.frames, draw)
    narrow = Mixture(*(p.float() for p in mixture))

    def new() -> Mixture:
        return Mixture(*(p.clone() for p in mixture))

    sides: dict[str, Callable[[Tensor], object]] = {
        "torch, float64": lambda x: em.em_statistics_reference(x, *mixture),
        "torch, float32": lambda x: ChunkedMixture(*mixture, chunk_frames=CHUNK).statistics(x),
    }
    if native.cuda_architectures():
        sides["native"] = lambda x: native_mixture.em_statistics_cuda(x, *new())
        sides["native, hard"] = lambda x: native_mixture.em_statistics_cuda(x, *new(), hard=True)
    small = frames[:8192]
    cpu = Mixture(*(p.cpu() for p in mixture))
    expected = em.em_statistics_reference(small.cpu().double(), *cpu)
    errors = {name: error(sides[name](small), expected) for name in sides if "hard" not in name}
    if not errors.get("native", 0.0) <= 1e-6:
        raise SystemExit(f"native statistics are off by {errors['native']}")
    sides["triton, log-likelihood alone"] = lambda x: ops.gmm_log_likelihood(
        x, narrow, precision="fast"
    )
    fewer = frames[:FRAMES_OF_TORCH]
    of_side = {name: fewer if "torch" in name else frames for name in sides}
    turns = {name: (lambda side=side, x=of_side[name]: side(x)) for name, side in sides.items()}
    print(f"{'side':30} {'M frames/s':>10} {'of floor':>8} {'error':>9}")
    for name, seconds in take_turns(turns, options.repeats, device="cuda").items():
        n = len(of_side[name])
        rate = n / seconds["median"]
        off = errors.get(name)
        shown = f"{off:9.1e}" if off is not None else " " * 9
        print(f"{name:30} {rate / 1e6:10.1f} {rate / FLOOR_FRAMES_PER_S:8.3f} {shown}")
        line = {"name": name, "shape": {"frames": n, "components": K, "features": D}}
        line |= {"seconds": seconds, "frames_per_s": round(rate), "relative_error": off}
        if name.startswith("native"):
            kernels = kernels_ns_per_frame(turns[name], n)
            print("  ns a frame: " + ", ".join(f"{k} {ns:.2f}" for k, ns in kernels.items()))
            screen = "wgmma" if "tiles" in kernels else "mma"
            line |= {"kernels_ns_per_frame": kernels, "screen": screen}
        append("cuda_em", line | surroundings("cuda"), options.out)


if __name__ == "__main__":
    main()
