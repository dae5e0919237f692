"""Every op beside its peers: one table, and JSON lines in bench/results/ops.jsonl.

    python -m bench.ops --shapes small paper --device cpu

Correctness comes first: an op that is further from its reference than allowed (`Case.check`) is not
timed, and the command fails. Then warm-ups, and the op and its peers in turn: median, p20 and p80;
on CPUs each is settled before (`bench.records.settle`), which ``--seconds`` does not count.
Gradients are cleared before every run. Floors are `bench.floors` over `bench.peaks`; blank where no
peak is known. ``--tune`` times other tiles of the mixture kernels instead (CUDA only), see
`bench.tune`.

On CUDA the times are those of the device alone, between two of its events: the L2 cache is flushed,
then the device is kept waiting until the whole call has been enqueued, so that its kernels run back
to back. What the host needs to enqueue them stands beside as ``host ms``: where it is the larger of
the two, a program that does nothing else is bound by launches. ``runs_with_gaps`` counts runs whose
begin the device reached before the call had returned, as where the call itself waits; their times
hold the host's, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.cases import Case
from bench.peaks import Peaks, peaks_of
from bench.records import (
    REST_BESIDE_OTHER_POOLS_S,
    REST_S,
    RESULTS,
    append,
    need_device,
    settle,
    surroundings,
)
from bench.registry import makers
from bench.shapes import SHAPES, Shape

FLUSH_BYTES = 1 << 30  # many times any L2 cache
# How long the device is kept waiting: a few times what the call took to return the last time, for
# the host's time scatters; the bounds are for calls that are short, or still compiling.
BUSY_PER_HOST, MIN_BUSY_S, MAX_BUSY_S = 3.0, 3e-3, 30e-3
CYCLES_PER_S = 2.0e9  # of no GPU here more: the wait is at least as long as asked for
MIN_RUNS, MAX_RUNS = 7, {"cpu": 20, "cuda": 50}
WARM_UPS = 2  # the first may compile, the second tells how long the call takes to return
HEADER = (
    f"{'op':32} {'dtype':12} {'ms':>9} {'p20':>9} {'p80':>9} {'host ms':>8} "
    f"{'frames/s':>9} {'x real':>8} {'GB/s':>7} {'TFLOP/s':>8} {'% floor':>7}  "
    "peers: ms (our speed / theirs)"
)


class Taken(NamedTuple):
    """One run."""

    seconds: float
    """of the device"""
    host_s: float
    """until the call returned"""
    gaps: bool
    """whether the device may have waited for the host"""


def timer(device: str) -> Callable[[Callable[[], object], float], Taken]:
    """A function that runs its first argument once; the second is the `Taken.host_s` expected."""
    if device == "cpu":

        def on_cpu(run: Callable[[], object], host_s: float) -> Taken:
            begin = time.perf_counter()
            run()
            taken = time.perf_counter() - begin
            return Taken(taken, taken, gaps=False)

        return on_cpu
    cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def on_cuda(run: Callable[[], object], host_s: float) -> Taken:
        cache.zero_()
        busy_s = min(MAX_BUSY_S, max(MIN_BUSY_S, BUSY_PER_HOST * host_s))
        torch.cuda._sleep(round(busy_s * CYCLES_PER_S))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        called = time.perf_counter()
        run()
        host_s, gaps = time.perf_counter() - called, begin.query()
        end.record()
        torch.cuda.synchronize()
        return Taken(begin.elapsed_time(end) / 1e3, host_s, gaps)

    return on_cuda


def forget_gradients(case: Case) -> None:
    """Of the leaves that a run adds to."""
    for leaf in case.with_gradient:
        leaf.grad = None


def times_of(case: Case, device: str, seconds: float) -> dict[str, list[Taken]]:
    """Every run of the op ("ours") and of its peers, in turn, for about so long."""
    sides = {"ours": case.run, **case.peers}
    time_once = timer(device)
    times: dict[str, list[Taken]] = {side: [] for side in sides}
    last_host_s = dict.fromkeys(sides, 0.0)
    # scikit-learn brings thread pools of its own
    rest_s = REST_BESIDE_OTHER_POOLS_S if "scikit-learn" in sides else REST_S
    begin, rounds, settling_s = time.perf_counter(), -WARM_UPS, 0.0

    def time_is_left() -> bool:
        return time.perf_counter() - begin - settling_s < seconds

    while rounds < MIN_RUNS or (rounds < MAX_RUNS[device] and time_is_left()):
        for side, run in sides.items():
            if device == "cpu":
                settling = time.perf_counter()
                settle(lambda run=run: (forget_gradients(case), run()), rest_s)
                settling_s += time.perf_counter() - settling
            forget_gradients(case)
            taken = time_once(run, last_host_s[side])
            last_host_s[side] = taken.host_s
            if rounds >= 0:
                times[side].append(taken)
        rounds += 1
    return times


def measure(case: Case, shape: Shape, device: str, peaks: Peaks | None, seconds: float) -> dict:
    """Everything that one line of the table and of the results holds, but the surroundings."""
    times = times_of(case, device, seconds)
    milliseconds, host_ms = {}, {}
    for side, runs in times.items():
        low, median, high = np.percentile([1e3 * taken.seconds for taken in runs], [20, 50, 80])
        milliseconds[side] = [round(float(ms), 5) for ms in (median, low, high)]
        host_ms[side] = round(1e3 * float(np.median([taken.host_s for taken in runs])), 5)
    median_s = milliseconds["ours"][0] / 1e3
    floor_s = None
    if peaks is not None:
        floor_s = case.work.floor_s(
            flops_per_s=peaks.flops_per_s[case.products], bytes_per_s=peaks.bytes_per_s
        )
    return {
        "ms_median_p20_p80": milliseconds,
        "host_ms": None if device == "cpu" else host_ms,
        "runs_with_gaps": {side: sum(t.gaps for t in runs) for side, runs in times.items()},
        "runs": len(times["ours"]),
        "frames_per_s": shape.frames / median_s,
        "times_real_time": shape.rows * shape.seconds / median_s,
        "gb_per_s": case.work.bytes / median_s / 1e9,
        "tflop_per_s": case.work.flops / median_s / 1e12,
        "percent_of_floor": None if floor_s is None else 100 * floor_s / median_s,
        "speed_over_peer": {
            side: milliseconds[side][0] / milliseconds["ours"][0] for side in case.peers
        },
    }


def row_of(case: Case, measured: dict) -> str:
    """One line of the table."""
    median, p20, p80 = measured["ms_median_p20_p80"]["ours"]
    percent, host_ms = measured["percent_of_floor"], measured["host_ms"]
    host = f"{'' if host_ms is None else format(host_ms['ours'], '.3f'):>8}"
    peers = "  ".join(
        f"{peer} {measured['ms_median_p20_p80'][peer][0]:.3f} ({ratio:.2f})"
        for peer, ratio in measured["speed_over_peer"].items()
    )
    return (
        f"{case.name:32} {case.dtype:12} {median:9.3f} {p20:9.3f} {p80:9.3f} {host} "
        f"{measured['frames_per_s']:9.3g} {measured['times_real_time']:8.3g} "
        f"{measured['gb_per_s']:7.1f} {measured['tflop_per_s']:8.3f} "
        f"{'' if percent is None else f'{percent:.1f}':>7}  {peers}"
    )


def main() -> None:
    """Check, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="ops whose names contain one")
    parser.add_argument("--seconds", type=float, default=2.0, help="about so long for each case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tune", action="store_true", help="sweep the mixture kernels' tiles")
    options = parser.parse_args()
    need_device(options.device)
    if options.tune:
        from bench.tune import sweep

        shapes = [SHAPES[name] for name in options.shapes]
        sweep(shapes, options.device, options.only[0], options.out)
        return
    torch.set_flush_denormal(True)  # before threads start, which take it over; see chunked_torch
    peaks = peaks_of(options.device)
    where = {
        **surroundings(options.device),
        "peaks": None if peaks is None else peaks._asdict(),
    }
    print(json.dumps(where))
    wrong = seen = 0
    for name in options.shapes:
        shape = SHAPES[name]
        print(f"\n{name}: {shape.describe()}\n{HEADER}")
        for make in makers(options.device).values():
            torch.manual_seed(0)
            case = make(shape)
            if not any(part in case.name for part in options.only):
                continue
            seen += 1
            error = case.check()
            if not error <= 1.0:  # also where it is not a number
                wrong += 1
                print(f"{case.name:32} {case.dtype:12} WRONG: {error:.3g} times the error allowed")
                continue
            measured = measure(case, shape, options.device, peaks, options.seconds)
            print(row_of(case, measured), flush=True)
            line = {"op": case.name, "dtype": case.dtype, "shape": name, **shape._asdict()}
            line |= {"error_of_allowed": error, **measured, **where}
            append("ops", line, options.out)
    if not seen:
        sys.exit(f"no op's name contains any of: {' '.join(options.only)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
