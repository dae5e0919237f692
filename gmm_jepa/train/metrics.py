"""Lines of metrics on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gmm_jepa.errors import require
from gmm_jepa.files import write_text


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events, both cut back to the step a run resumes at.

    Args:
        path: of the JSON lines.
        start_step: lines of later steps are dropped.
        tensorboard: also write events, beside the JSON lines.
    """

    def __init__(self, path: Path, start_step: int, *, tensorboard: bool) -> None:
        kept = [
            json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= start_step
        ]
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            module = require("torch.utils.tensorboard", extra="train")
            self._events = module.SummaryWriter(
                str(path.parent / "tensorboard"), purge_step=start_step + 1
            )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, line: Mapping[str, float]) -> None:
        """Append a line with its ``step`` (steps done); a value that is not finite becomes null."""
        finite = {k: v if math.isfinite(v) else None for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._events is not None:
            for name in line.keys() - {"step"}:
                self._events.add_scalar(name, line[name], line["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; none if it is absent, and a line cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
