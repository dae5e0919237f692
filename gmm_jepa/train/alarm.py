"""The collapse alarm: reads the lines of metrics and says where a representation degenerates.

It looks at the front end as well as at the output, since what is lost there no later block brings
back. Every threshold was chosen on runs of 100 steps of the cpu preset on synthesised speech, a
line every five steps: *healthy* (the preset), *collapsed* (no anchor, teacher decay 0), *pure*
(no anchor) and *natural* (the waveform at its natural level, which learns nothing).

Effective rank counts for little: it fell to 0.22 of its start in the healthy run and to 0.63 only
in the pure one, which learned nothing. The alarm warns of a rank near one and no more.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmm_jepa.errors import require
from gmm_jepa.files import write_text
from gmm_jepa.train.metrics import read_metrics

HIGH_COSINE = 0.8
"""Mean cosine that is too high. At steps 40 to 100 the output of the healthy run had 0.10 to 0.22,
of a healthy smoke run 0.31 to 0.45; collapsed 0.94 to 0.95, pure 0.91 to 0.93, natural 0.81 to
0.86. Front ends: 0.09 to 0.20 healthy, 0.82 to 0.93 the others."""
FALLEN = {"std": 0.4, "usage_entropy": 0.4, "effective_rank": 0.1}
"""Share of a meter's highest value so far under which it has fallen too far. Standard deviation:
0.35 collapsed, 0.29 pure, at least 0.69 healthy. Usage entropy: 0.24 to 0.36 collapsed, at least
0.59 healthy. Effective rank: a healthy run fell to 0.22."""
START_STEPS = 40
"""Nothing is judged before this step: in healthy runs the mean cosine was 0.88 at step 5 and 0.77
at step 25, and usage that is counted over a few steps jumps."""
START_SHARE = 0.05
"""Nor in this first share of a run, since long runs start with small steps; not measured."""
LINES_IN_A_ROW = 2
"""So many lines must agree: one line sees one micro-batch."""

_PREFIXES = ("front_end_", "online_", "")
"""Of an embedding's meters in a line: the front end's, and the output's with or without one."""


@dataclass(frozen=True)
class Event:
    """One warning."""

    step: int
    """Step of the line that settled it."""
    meter: str
    """Its name in the metrics."""
    value: float
    """What it was then."""
    reason: str
    """In words, with what was expected."""

    def __str__(self) -> str:
        return f"collapse alarm at step {self.step}: {self.meter} {self.value:.3g}, {self.reason}"


class Watch:
    """Judges lines one after the other; a meter warns once for each model.

    Args:
        steps: length of the run.
        starts: steps done where a new model begins, as between the iterations of HuBERT-style
            training; nothing is compared across them.
    """

    def __init__(self, steps: int, starts: Sequence[int] = (0,)) -> None:
        self._start_steps = max(START_STEPS, START_SHARE * steps)
        self._starts = sorted(starts)
        self._began = 0
        self._highest: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}
        self._warned: set[str] = set()

    def see(self, line: Mapping[str, Any]) -> list[Event]:
        """The warnings that one line of metrics brings; values that are absent or null pass."""
        events, step = [], int(line["step"])
        began = max((start for start in self._starts if start < step), default=0)
        if began != self._began:
            self._began = began
            self._highest.clear()
            self._in_a_row.clear()
            self._warned.clear()
        for meter, kind in _meters(line):
            value = float(line[meter])
            reason = self._reason(meter, kind, value, step - began)
            self._in_a_row[meter] = self._in_a_row.get(meter, 0) + 1 if reason else 0
            if self._in_a_row[meter] >= LINES_IN_A_ROW and meter not in self._warned:
                self._warned.add(meter)
                events.append(Event(step, meter, value, reason))
        return events

    def _reason(self, meter: str, kind: str, value: float, step: int) -> str:
        """What is wrong with a value at a step of its model, or nothing."""
        highest = max(value, self._highest.get(meter, -math.inf))
        self._highest[meter] = highest
        if step < self._start_steps:
            return ""
        if kind == "mean_cosine":
            return f"above {HIGH_COSINE}: all embeddings point one way" * (value > HIGH_COSINE)
        share = FALLEN[kind]
        fallen = value < share * highest
        return f"under {share:g} of its highest so far, {highest:.3g}" if fallen else ""


def _meters(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names in the line of the meters that are there as finite numbers, and their kinds."""
    wanted = [
        (prefix + kind, kind)
        for prefix in _PREFIXES
        for kind in ("mean_cosine", "std", "effective_rank")
    ]
    return [
        (name, kind)
        for name, kind in [*wanted, ("usage_entropy", "usage_entropy")]
        if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])
    ]


class Alarm:
    """Warns on the terminal and in ``alarms.jsonl``, which follows from the metrics alone.

    Args:
        path: of the events, beside the metrics.
        metrics: lines written before a resume are judged again, silently.
        steps, starts: see `Watch`.
    """

    def __init__(self, path: Path, metrics: Path, steps: int, starts: Sequence[int] = (0,)) -> None:
        self._path = path
        self._watch = Watch(steps, starts)
        self._events = [event for line in read_metrics(metrics) for event in self._watch.see(line)]
        if path.exists() or self._events:
            self._write()

    def see(self, line: Mapping[str, Any]) -> None:
        """Judge one line; call it in the main process."""
        events = self._watch.see(line)
        for event in events:
            require("tqdm", extra="train").tqdm.write(f"warning: {event}", file=sys.stderr)
        if events:
            self._events += events
            self._write()

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(asdict(e)) + "\n" for e in self._events))


def read_alarms(path: Path) -> list[Event]:
    """The events of an ``alarms.jsonl``; none where it is absent."""
    return [
        Event(**{k: line[k] for k in Event.__dataclass_fields__}) for line in read_metrics(path)
    ]
