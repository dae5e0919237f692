"""Progress bars with rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from gmm_jepa.errors import require

Item = TypeVar("Item")
LOG_EVERY_S = 30.0
"""Seconds between two states of a bar that nobody looks at."""


def track(items: Collection[Item], what: str, unit: str) -> Iterator[Item]:
    """The items, with a bar that follows them."""
    yield from tqdm_bar(items, desc=what, unit=unit)


class Bar:
    """A bar for work that tells how much is done and how much there is.

    Args:
        what: the work, in words.
        unit: what is counted.
        shown: draw it.
    """

    def __init__(self, what: str, unit: str, *, shown: bool = True) -> None:
        self._bar = tqdm_bar(desc=what, unit=unit, disable=not shown)

    def __call__(self, done: float, total: float) -> None:
        """Move to `done` of `total`."""
        self._bar.total = round(total)
        self._bar.update(min(round(done), round(total)) - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()


class Stages:
    """One bar after another for work that goes through named stages."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move to `done` of `total` in `stage`; a new stage closes the bar before it."""
        if self._bar is None or stage != self._stage:
            self.__exit__()
            self._bar, self._stage = Bar(stage, ""), stage
        self._bar(done, total)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__()


def tqdm_bar(*arguments: Any, unit: str, **options: Any) -> Any:
    """A tqdm bar as the others, for callers that need all it can do.

    Where it goes to a file it moves twice a minute. TQDM_DISABLE hides it.
    """
    tqdm = require("tqdm", extra="train").tqdm
    if not options.get("disable"):
        options.pop("disable", None)  # else tqdm would not look at its variable
    if not sys.stderr.isatty():
        options.setdefault("mininterval", LOG_EVERY_S)
    return tqdm(*arguments, unit=unit and f" {unit}", dynamic_ncols=True, **options)
