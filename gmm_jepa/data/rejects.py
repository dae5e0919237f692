"""The record of every file or line that could not be used."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gmm_jepa.errors import InputError


class Reject(NamedTuple):
    """One thing that could not be used.

    `file` is the audio file, or the manifest where a line itself is bad; `line` is the line (from
    1) of the manifest, None for a file found in a folder; `manifest` names the manifest where
    `file` does not.
    """

    file: str
    line: int | None
    reason: str
    manifest: str | None = None


class RejectLog:
    """An append-only JSONL file of rejects, one object per file and line.

    Opening the file of an earlier run keeps its lines and writes none of them twice. `count` and
    `summary` tell of what this log was given, whether or not its file held it before.

    Args:
        path: the file, made when the first reject comes; None keeps the log in memory only.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path = None if path is None else Path(path)
        self._kinds: Counter[str] = Counter()
        self._added: dict[tuple[str, int | None, str | None], Reject] = {}
        self._on_disk: set[tuple[str, int | None, str | None]] = set()
        self._ends_in_newline = True
        if self.path is not None and self.path.exists():
            self._read_earlier()

    def add(self, reject: Reject) -> None:
        """Record one, if this log has not been given the same file and line before."""
        reject = reject._replace(reason=" ".join(reject.reason.split()))
        key = (reject.file, reject.line, reject.manifest)
        if key in self._added:
            return
        self._added[key] = reject
        self._kinds[reject.reason.split(":", 1)[0]] += 1
        if self.path is not None and key not in self._on_disk:
            self._write(reject)
            self._on_disk.add(key)

    def extend(self, rejects: Iterable[Reject]) -> None:
        """Record several, as they come from a loader's batches."""
        for reject in rejects:
            self.add(reject)

    def __iter__(self) -> Iterator[Reject]:
        """The distinct rejects given to this log, in order."""
        return iter(self._added.values())

    @property
    def count(self) -> int:
        """Distinct rejects given to this log."""
        return len(self._added)

    def summary(self) -> str:
        """One line, such as ``3 rejected (2 truncated, 1 missing), see runs/a/rejects.jsonl``."""
        if not self._added:
            return "none rejected"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        return f"{self.count} rejected ({kinds}){self._pointer()}"

    def check(self, total: int, max_bad_fraction: float, *, n_bad: int | None = None) -> None:
        """Stop where too much is bad.

        Args:
            total: how many things were looked at, good and bad.
            max_bad_fraction: how many of them may be bad, 0 to 1.
            n_bad: how many of them are; None: all that this log was given.

        Raises:
            InputError: `n_bad` exceeds ``max_bad_fraction * total``.
        """
        if not 0 <= max_bad_fraction <= 1:
            raise InputError(f"max_bad_fraction must be in 0..1, got {max_bad_fraction}")
        n_bad = self.count if n_bad is None else n_bad
        if n_bad > max_bad_fraction * total:
            raise InputError(
                f"{n_bad} of {total} inputs are bad, more than max_bad_fraction = "
                f"{max_bad_fraction:g} allows ({_rounded_up(n_bad / total):g} would): "
                f"{self.summary()}"
            )

    def _pointer(self) -> str:
        return "" if self.path is None else f", see {self.path}"

    def _write(self, reject: Reject) -> None:
        fields = {"file": reject.file, "line": reject.line, "reason": reject.reason}
        if reject.manifest is not None:
            fields["manifest"] = reject.manifest
        text = json.dumps(fields) + "\n"
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="ascii") as file:
            file.write(text if self._ends_in_newline else "\n" + text)
        self._ends_in_newline = True

    def _read_earlier(self) -> None:
        assert self.path is not None
        content = self.path.read_bytes()
        self._ends_in_newline = content.endswith(b"\n") or not content
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._on_disk.add((record["file"], record["line"], record.get("manifest")))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line cut short by a crash; the reject comes again when it is met


def _rounded_up(fraction: float) -> float:
    return min(math.ceil(fraction * 1000) / 1000, 1.0)
