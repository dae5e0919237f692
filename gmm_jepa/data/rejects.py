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

OPTION = "--max-bad-fraction"
"""What the share that is put up with is called by commands without a recipe."""
RECIPE_OPTION = "--data.max-bad-fraction"
"""And by those with one."""
_BEGINNING = b'{"file": '
"""Of every line."""


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

    Opening the file of an earlier start keeps its lines and writes none of them twice, but for a
    log that begins it anew. `count` and `summary` tell of what this log was given, whether or not
    its file held it before.

    Args:
        path: the file, made when the first reject comes; None keeps the log in memory only.
        anew: what earlier starts left in the file goes with the first reject, or with
            `drop_earlier`.

    Raises:
        InputError: the file is to begin anew, but holds something else than rejects.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, anew: bool = False):
        self.path = None if path is None else Path(path)
        self.n_given = 0
        """Rejects given to this log, those that were given several times as often."""
        self._is_stale = False
        self._kinds: Counter[str] = Counter()
        self._added: dict[tuple[str, int | None, str | None], Reject] = {}
        self._on_disk: set[tuple[str, int | None, str | None]] = set()
        self._ends_in_newline = True
        if self.path is not None and self.path.exists():
            holds_rejects = self._read_earlier()
            if anew and not holds_rejects:
                raise InputError(f"{self.path} holds something else than rejects: it is left alone")
            if anew:
                self._is_stale, self._on_disk = True, set()

    def add(self, reject: Reject) -> None:
        """Record one, if this log has not been given the same file and line before."""
        reject = reject._replace(reason=" ".join(reject.reason.split()))
        key = (reject.file, reject.line, reject.manifest)
        self.n_given += 1
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

    def drop_earlier(self) -> None:
        """Let the file tell of this log alone: where it has no reject yet, there is no file."""
        if self._is_stale:
            assert self.path is not None
            self.path.unlink(missing_ok=True)
            self._is_stale, self._ends_in_newline = False, True

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

    def check(
        self,
        total: int,
        max_bad_fraction: float,
        *,
        n_bad: int | None = None,
        option: str = RECIPE_OPTION,
    ) -> None:
        """Stop where too much is bad.

        Args:
            total: how many things were looked at, good and bad.
            max_bad_fraction: how many of them may be bad, 0 to 1.
            n_bad: how many of them are; None: all that this log was given, each once.
            option: what `max_bad_fraction` is called on the command line.

        Raises:
            InputError: `n_bad` exceeds ``max_bad_fraction * total``.
        """
        check_fraction(max_bad_fraction, option)
        n_bad = self.count if n_bad is None else n_bad
        if n_bad > max_bad_fraction * total:
            raise InputError(
                f"{n_bad} of {total} inputs are bad, more than {option} {max_bad_fraction:g} "
                f"allows ({_rounded_up(n_bad / total):g} would): "
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
        self.drop_earlier()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="ascii") as file:
            file.write(text if self._ends_in_newline else "\n" + text)
        self._ends_in_newline = True

    def _read_earlier(self) -> bool:
        """Note what the file holds; whether all of it was written by such a log."""
        assert self.path is not None
        holds_rejects = True
        content = self.path.read_bytes()
        self._ends_in_newline = content.endswith(b"\n") or not content
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._on_disk.add((record["file"], record["line"], record.get("manifest")))
                holds_rejects &= "reason" in record
            except ValueError:  # a line cut short by a crash; the reject comes again when it is met
                holds_rejects &= line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
            except (KeyError, TypeError, AttributeError):
                holds_rejects = False
        return holds_rejects


def check_fraction(max_bad_fraction: float, option: str = OPTION) -> None:
    """Refuse what is no share, before anything is read.

    Raises:
        InputError: it is not from 0 to 1.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise InputError(f"{option}: expected between 0 and 1, got {max_bad_fraction}")


def _rounded_up(fraction: float) -> float:
    return min(math.ceil(fraction * 1000) / 1000, 1.0)
