"""One run of a comparison in a process of its own: ``python -m gmm_jepa.compare.job FOLDER PID``.

Trains the run that was prepared in the folder, or goes on with it, and evaluates it. PID is that of
the process that started it, with which it ends; it may be left out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence

from gmm_jepa.compare.plan import add_seconds
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.labelling import label_seconds
from gmm_jepa.pipeline import Run
from gmm_jepa.train.folder import RunFolder, held

BAD_INPUT, STOPPED = 2, 3
"""Exit codes: a user's mistake, said in a line after `SAID`; asked to stop before the last step."""
SAID = "gmm-jepa: "
_PR_SET_PDEATHSIG = 1


def finish(folder: RunFolder) -> bool:
    """Train and evaluate; False if it was asked to stop before the last step."""
    with processes() as peers, held(folder.root, peers):
        run = Run(folder, *folder.read(), peers)
        audio = run.audio()
        began, labelled = time.perf_counter(), _label_time(folder)
        outcome = run.train(audio.train)
        labelled = _label_time(folder) - labelled  # between iterations; it is counted apart
        add_seconds(folder, "train", time.perf_counter() - began - labelled)
        if outcome.finished:
            began = time.perf_counter()
            run.evaluate(audio)
            add_seconds(folder, "evaluate", time.perf_counter() - began)
    return outcome.finished


def _label_time(folder: RunFolder) -> float:
    return sum(label_seconds(folder).values())


def _end_with(parent: int) -> None:
    """Be asked to stop when the comparison dies, be it killed; where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            sys.exit(STOPPED)


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    if len(arguments) > 1:
        _end_with(int(arguments[1]))
    try:
        return 0 if finish(RunFolder(arguments[0])) else STOPPED
    except InputError as error:
        print(SAID + " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
