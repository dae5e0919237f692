"""One run of a comparison in a process of its own: ``python -m gmm_jepa.compare.job FOLDER``.

Trains the run that was prepared in the folder, or goes on with it, and evaluates it.
"""

from __future__ import annotations

import ctypes
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


def _end_with_parent() -> None:
    """Be asked to stop when the comparison dies, be it killed; where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    _end_with_parent()
    try:
        return 0 if finish(RunFolder(arguments[0])) else STOPPED
    except InputError as error:
        print(SAID + " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
