"""Workers that cannot start: one clear error, soon, and no process is left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmm_jepa.data.workers import map_in_order
from gmm_jepa.errors import InputError

UNGUARDED = """
import sys
import numpy as np
from gmm_jepa.data.workers import map_in_order
from gmm_jepa.errors import InputError

class Call:
    payload = None

    def __call__(self, i):
        return i

call = Call()
call.payload = np.zeros(1_000_000, np.uint8)  # a pipe holds 64 KiB
try:
    list(map_in_order(call, range(4), workers=2, start_method=sys.argv[1]))
except InputError as error:
    print(error)
"""


class EndsOnArrival:
    """Ends the worker that unpickles it; with a path, all workers but the first."""

    def __init__(self, path: Path | None = None):
        self.path = path

    def __call__(self, i: int) -> int:
        return i

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        try:
            if self.path is not None:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL))
                return
        except FileExistsError:
            pass
        os._exit(7)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_main_module_that_cannot_be_imported_is_told(tmp_path, method):
    """Its workers die before they read what is sent to them, more than a pipe holds."""
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    run = subprocess.Popen(
        [sys.executable, str(script), method],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = run.communicate(timeout=60)
        deadline = time.monotonic() + 10
        while group_lives(run.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not group_lives(run.pid)
    finally:
        if group_lives(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("loader worker ")
    assert "of 2 (from 0) ended before it began, exit code " in lines[0]
    assert "__main__" in lines[0]
    assert "RuntimeError" in err  # the worker's own words


def group_lives(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_ends_before_it_begins_is_told():
    with pytest.raises(InputError, match=r"^loader worker 0 of 1 .* exit code 7: "):
        list(map_in_order(EndsOnArrival(), range(4), workers=1, start_method="spawn"))
    assert multiprocessing.active_children() == []


def test_nothing_is_computed_before_all_have_begun(tmp_path):
    results = map_in_order(
        EndsOnArrival(tmp_path / "first"), range(4), workers=2, start_method="spawn"
    )
    with pytest.raises(InputError, match=r"^loader worker [01] of 2 .* exit code 7: "):
        next(results)
    assert multiprocessing.active_children() == []


def test_a_process_that_the_system_refuses_is_told(monkeypatch):
    fork, left = os.fork, [True]

    def refused() -> int:
        if not left:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    with pytest.raises(InputError, match=r"^loader worker 1 of 2 .*unavailable.*fewer workers"):
        list(map_in_order(abs, range(4), workers=2, start_method="fork"))
    assert multiprocessing.active_children() == []


def test_what_nobody_catches_ends_the_process(tmp_path):
    """Its traceback holds the iterator, and with it the workers, which do not hear SIGTERM."""
    script = tmp_path / "script.py"
    script.write_text(
        "from gmm_jepa.data.workers import map_in_order\n"
        "def read(results):\n"
        "    for result in results:\n"
        "        raise ValueError('nobody catches this')\n"
        "read(map_in_order(abs, range(1000), workers=2))\n"
    )
    words = [sys.executable, str(script)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "ValueError: nobody catches this"
