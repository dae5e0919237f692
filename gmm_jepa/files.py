"""Files that are whole or absent: written aside, synced to disk, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gmm_jepa.errors import InputError


def refuse_existing(path: Path) -> None:
    """Raise `InputError` if there is something at the path."""
    if path.exists():
        raise InputError(f"{path} exists already; it is left as it is")


UNFINISHED = ".gmm-jepa-part"
"""End of the names of what was being written when the process died."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write a file or folder at, renamed to `path` once it is complete on disk.

    A file takes the place of a file, a folder that of a folder. An exception removes what was
    written; a crash leaves only a name ending in `UNFINISHED`. Files have the permissions that the
    umask gives, also those of libraries that give less.

    Raises:
        InputError: a file was written, and there is a folder at `path`; it is left as it is.
    """
    aside = path.with_name(path.name + UNFINISHED)
    _remove(aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        _open_to_readers(aside)
        _sync(aside)
        if path.is_dir():
            if not aside.is_dir():
                raise InputError(f"{path} is a folder; a file was to be written")
            shutil.rmtree(path)
        os.replace(aside, path)
    finally:
        _remove(aside)
    _sync_entry(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_MODE = 0o666 & ~_umask()
"""Of new files. Asked once: to ask changes it for all threads."""


def _open_to_readers(aside: Path) -> None:
    for path in (aside, *aside.rglob("*")) if aside.is_dir() else (aside,):
        if path.is_file():
            path.chmod(_MODE)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new content, never a part.

    What UTF-8 cannot hold, of names of files that are not in it, is written as `readable` has it.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def readable(text: str) -> str:
    r"""The text, with numbers for what UTF-8 cannot hold.

    >>> readable("na\udcefve")
    'na\\udcefve'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, likewise."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def finite(values: Any) -> Any:
    """JSON values with None for NaN and infinities, which JSON does not know."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: the file is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync_entry(file)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
