"""Phones of an utterance as its entry has them: ``phones``, a list of [start_s, end_s, symbol]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def phone_segments(
    entry: dict[str, Any],
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]] | None:
    """Starts, ends (s) and symbols of an entry's ``phones``; None where absent or malformed."""
    phones = entry.get("phones")
    if not phones:
        return None
    try:
        ordered = sorted(map(_phone, phones))
    except (TypeError, ValueError, OverflowError):
        return None
    starts, ends, symbols = zip(*ordered)
    return np.array(starts), np.array(ends), list(symbols)


def bad_phones(entries: Iterable[dict[str, Any]]) -> str | None:
    """In how many entries ``phones`` are malformed, as a line for the user; None: in none."""
    n_bad = sum(bool(e.get("phones")) and phone_segments(e) is None for e in entries)
    if not n_bad:
        return None
    utterances = "utterance" if n_bad == 1 else "utterances"
    return f"phones of {n_bad} {utterances} are not [start_s, end_s, symbol]: left out"


def _phone(phone: Any) -> tuple[float, float, str]:
    start, end, symbol = phone
    start_s, end_s = float(start), float(end)
    is_symbol = isinstance(symbol, (str, int)) and symbol != ""
    if isinstance(phone, str) or not -math.inf < start_s <= end_s < math.inf or not is_symbol:
        raise ValueError("not a segment")
    return start_s, end_s, str(symbol)
