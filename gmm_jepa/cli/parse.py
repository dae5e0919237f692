"""Options from dataclasses, through tyro; presets with overrides of any field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import tyro

from gmm_jepa.config import PRESETS
from gmm_jepa.errors import InputError

Options = TypeVar("Options")
PresetName = Literal["cpu", "cpu-long", "smoke", "paper"]


def parse(options: type[Options], command: str, arguments: Sequence[str]) -> Options:
    """Parse a command's options; `--help` prints them and exits.

    Where the options have a field `recipe`, the preset named by `--preset` is its default.

    Raises:
        InputError: an unknown preset.
        SystemExit: help was asked for (0), or an option is unknown, missing or malformed (2).
    """
    defaults: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(options)}
    if "recipe" in fields:
        preset = _preset_name(arguments) or fields["preset"].default
        if preset not in PRESETS:
            raise InputError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        defaults = {name: tyro.MISSING for name, field in fields.items() if _required(field)}
        defaults |= {"preset": preset, "recipe": PRESETS[preset]()}
    return tyro.cli(
        options,
        prog=f"gmm-jepa {command}",
        args=list(arguments),
        default=options(**defaults) if defaults else None,
    )


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _preset_name(arguments: Sequence[str]) -> str | None:
    """The value of the last ``--preset``, given apart or with ``=``."""
    name = None
    for word, following in zip(arguments, [*arguments[1:], None]):
        if word == "--preset":
            name = following
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
    return name
