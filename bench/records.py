"""What all measurements share: where they were taken, how sides take turns, where lines go."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"
# Of `settle`, on two virtual cores of a Xeon: EM of 800 frames, which takes 0.45 ms, had medians
# of 0.5 to 7.9 ms after 20 ms and of 0.45 to 0.65 after 50. Beside scikit-learn, which has thread
# pools of its own, posteriors had 7.7 ms after a rest of 50 ms and 0.3 after 300.
SETTLE_S, REST_S, REST_BESIDE_OTHER_POOLS_S = 0.05, 0.05, 0.3


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """Commit (with a plus where files are changed), versions, device and threads."""
    on_cuda = device == "cuda"
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor() or "cpu",
        "threads": None if on_cuda else torch.get_num_threads(),
    }


def commit() -> str | None:
    """Short name of the commit that is measured; None outside a repository."""

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    name = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ":!bench/results")
    return f"{name}{'+' if changed else ''}" if name else None


def need_device(device: str) -> None:
    """Refuse CUDA where there is none.

    Raises:
        SystemExit: with code 2, after one line of text.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        raise SystemExit(2)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def forget_peak_bytes() -> int:
    """Let `peak_bytes` begin anew, from what is resident now, which is returned (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def append(name: str, line: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Add one JSON line to ``<name>.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(line)) + "\n")


def take_turns(
    sides: Mapping[str, Callable[[], Any]], repeats: int, *, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Seconds a call of each side, the sides in turn so that all meet the same neighbours.

    Each side runs once beforehand, unmeasured.

    Returns:
        ``median``, ``p20`` and ``p80`` seconds of every side.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            wait()
            begin = time.perf_counter()
            side()
            wait()
            times[name].append(time.perf_counter() - begin)
    return {name: quantiles(taken) for name, taken in times.items()}


def settle(run: Callable[[], Any], rest_s: float) -> None:
    """Bring a CPU into the state in which a call is measured: rest, then run for `SETTLE_S`.

    The threads of whatever ran before spin for a while before they sleep: hence the rest. After it,
    on virtual machines, memory is slow to touch at first, and a thread that is woken may have been
    put on the caller's processor: hence the runs.
    """
    time.sleep(rest_s)
    begin = time.perf_counter()
    while True:
        run()
        if time.perf_counter() - begin > SETTLE_S:
            return


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"median": float(middle), "p20": float(low), "p80": float(high)}
