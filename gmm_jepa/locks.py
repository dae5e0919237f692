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


TRIES = 20
"""To lock a folder that others make and remove meanwhile."""


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is absent, and then removed again if it stays empty.

    The folder itself is locked, so that nothing is left to clean up however the process ends. File
    systems that cannot lock a folder let everybody in.

    Raises:
        InputError: another process holds it, or it is no folder and cannot be made.
    """
    folder, is_new = _locked(root)
    _folders.add(folder)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                root.rmdir()  # if it is empty
        _folders.remove(folder)
        os.close(folder)


def _locked(root: Path) -> tuple[int, bool]:
    """The descriptor of a folder that is locked now, and whether it was made here."""
    for _ in range(TRIES):
        try:
            is_new = _make(root)
            folder = os.open(root, os.O_RDONLY)
        except FileNotFoundError:  # who made it has removed it
            continue
        except OSError as error:
            raise InputError(f"{root}: no folder can be made here ({error.strerror})") from None
        if not root.is_dir() and root.exists():
            os.close(folder)
            raise InputError(f"{root} is a file: give a folder")
        if not _lock(folder):
            os.close(folder)
            raise InputError(f"{root}: another process works here; wait until it ends")
        if _is_at(folder, root):
            return folder, is_new
        os.close(folder)
    raise InputError(f"{root}: no folder can be made here (others come and go)")


def _make(root: Path) -> bool:
    """Make a folder; False if there is something."""
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        root.mkdir()
    except FileExistsError:
        return False
    return True


def _lock(folder: int) -> bool:
    """False if another process has it locked."""
    try:
        if fcntl is not None:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True


def _is_at(folder: int, root: Path) -> bool:
    """Whether a folder that was opened is still what lies there."""
    try:
        there = root.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(folder), there)


_folders: set[int] = set()
"""Descriptors of the folders that this process holds."""


def _let_go() -> None:
    """A decoding process must not hold the folder of a run that was killed."""
    while _folders:
        os.close(_folders.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
