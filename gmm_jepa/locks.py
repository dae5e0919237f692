"""Folders that one process works in at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gmm_jepa.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is absent, and removed again if it stays empty.

    The folder itself is locked, so that nothing is left to clean up however the process ends. File
    systems that cannot lock a folder let everybody in.

    Raises:
        InputError: another process holds it, or it is no folder and cannot be made.
    """
    folder = _locked(root)
    _folders.add(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            root.rmdir()  # if it is empty
        _folders.remove(folder)
        os.close(folder)


def _locked(root: Path) -> int:
    """The descriptor of a folder that is locked now."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = os.open(root, os.O_RDONLY)
    except FileExistsError:
        raise InputError(f"{root} is a file: give a folder") from None
    except OSError as error:
        raise InputError(f"{root}: no folder can be made here ({error.strerror})") from None
    try:
        if fcntl is not None:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(f"{root}: another process works here; wait until it ends") from None
    except OSError:  # no locks here
        pass
    return folder


_folders: set[int] = set()
"""Descriptors of the folders that this process holds."""


def _let_go() -> None:
    """A decoding process must not hold the folder of a run that was killed."""
    while _folders:
        os.close(_folders.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
