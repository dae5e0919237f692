"""`gmm-jepa convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gmm_jepa.cli.parse import parse
from gmm_jepa.interop import convert


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Files of the published code to this project's safetensors, or back.

    Models (portable_step*.pt with its config.json), mixtures (gmm.pt), centroids (kmeans.pt). A
    run folder stands for its newest checkpoint. Clusters of 80 features are taken for those of the
    default log-mel front end, which is the published one. Nothing is unpickled.
    """

    source: Path
    """A published .pt, a .safetensors file of this project, or a run folder."""
    out: Path
    """The new file: .safetensors from a published one, .pt else (with config.json beside it)."""
    config: Path | None = None
    """Settings of a published model, and of nothing else; default: config.json beside it."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parse(ConvertOptions, command, arguments)
    what = convert(options.source, options.out, config=options.config)
    print(f"{options.out}: {what} of {options.source}")
    return 0
