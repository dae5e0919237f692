"""Several runs at a time, each in a process of its own with its share of the cores and GPUs.

On two cores two processes of one thread do more than one of two threads (56 against 44 seconds of
audio a second with the cpu preset).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from gmm_jepa.compare.job import BAD_INPUT, SAID, STOPPED
from gmm_jepa.compare.plan import Planned
from gmm_jepa.errors import InputError
from gmm_jepa.progress import Bar
from gmm_jepa.train.advice import usable_cores
from gmm_jepa.train.metrics import read_metrics

LOG = "log.txt"
_LOOK_EVERY_S = 1.0
_BAR = re.compile(r"\[\d+:\d\d[:\d]*[<,]")
"""The clock of a progress bar."""


class StoppedError(Exception):
    """A run was asked to stop before its last step; the next start goes on with it."""


@dataclass
class _Job:
    planned: Planned
    slot: int
    """Which of the processes at a time it is."""
    process: subprocess.Popen[bytes]

    @property
    def steps_done(self) -> int:
        lines = read_metrics(self.planned.folder.metrics)
        return lines[-1]["step"] if lines else 0


def run_all(
    planned: Sequence[Planned],
    *,
    jobs: int,
    on_done: Callable[[Planned], None] = lambda planned: None,
) -> None:
    """Train and evaluate the runs that are not done; their output goes to ``log.txt``.

    Ctrl-C and SIGTERM stop them at a checkpoint, from which the next start goes on. Where one ends
    before its last step, the others are stopped too.

    Args:
        planned: prepared runs.
        jobs: processes at a time.
        on_done: called after every run.

    Raises:
        InputError: one of them met a user's mistake.
        StoppedError: this or one of them was asked to stop.
        ChildProcessError: one of them failed.
    """
    waiting = [p for p in planned if not p.is_done]
    jobs = min(jobs, len(waiting))
    total = sum(p.recipe.train.steps for p in waiting)
    running: list[_Job] = []
    done = 0
    with _stopped_gently(running), Bar("training", "step", shown=bool(waiting)) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                slot = min(set(range(jobs)) - {job.slot for job in running})
                threads = max(1, usable_cores() // jobs)
                next_one = waiting.pop(0)
                process = _start(next_one, slot=slot, threads=threads)
                running.append(_Job(next_one, slot, process))
            time.sleep(_LOOK_EVERY_S)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _check(job)
                done += job.planned.recipe.train.steps
                on_done(job.planned)
            bar(done + sum(job.steps_done for job in running), total)


def _start(planned: Planned, *, slot: int, threads: int) -> subprocess.Popen[bytes]:
    log = planned.folder.root / LOG
    words = ["-m", "gmm_jepa.compare.job", str(planned.folder.root), str(os.getpid())]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | _share(slot, threads),
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others
        )


def _share(slot: int, threads: int) -> dict[str, str]:
    """What tells a process its cores, and which GPU is its own (or whose it shares)."""
    share = {"OMP_NUM_THREADS": str(threads)}
    if torch.cuda.is_available():
        share["LOCAL_RANK"] = str(slot % torch.cuda.device_count())
    return share


def _check(job: _Job) -> None:
    """Raise what ended a run before its end."""
    code, root = job.process.returncode, job.planned.folder.root
    if code == 0:
        return
    if code in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
        raise StoppedError(f"{root} was stopped")
    if code < 0:
        raise ChildProcessError(f"{root} was ended by {_signal_name(-code)}")
    if code == BAD_INPUT:
        raise InputError(f"{root}: {_last_words(root / LOG, after=SAID)}")
    raise ChildProcessError(f"{root} failed, see {LOG} there: {_last_words(root / LOG)}")


def _signal_name(number: int) -> str:
    """Such as SIGKILL; those of real time have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_words(log: Path, *, after: str = "") -> str:
    """What follows `after` in the last line that has it and is no progress bar."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for line in lines if after in line and not _BAR.search(line)]
    said = (line.rpartition(after)[2] if after else line for line in reversed(lines))
    return next(filter(None, map(str.strip, said)), "nothing was said")


@contextmanager
def _stopped_gently(running: list[_Job]) -> Iterator[None]:
    """However the block is left, what still runs is asked to save and end, and waited for."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError("the comparison was stopped") from None
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
        signal.signal(signal.SIGTERM, before)
