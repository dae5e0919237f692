"""Options from dataclasses, through tyro; presets with overrides of any field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

from gmm_jepa.errors import InputError
from gmm_jepa.presets import preset

Options = TypeVar("Options")
PresetName = Literal["cpu", "cpu-long", "smoke", "paper", "large"]
ModelName = Literal[
    "conformer-cpu",
    "transformer-cpu",
    "conformer-base",
    "transformer-small",
    "transformer-base",
    "transformer-large",
]


def parse(
    options: type[Options], command: str, arguments: Sequence[str], *, system: str | None = None
) -> Options:
    """Parse a command's options; `--help` prints them and exits.

    Where the options have a field `recipe`, a `Recipe` or a kind of it, its default is the preset
    named by `--preset`, as `--system` (or `system`, if given) and `--model` change it.

    Raises:
        InputError: an unknown preset, system or model.
        SystemExit: help was asked for (0), or an option is unknown, missing or malformed (2).
    """
    defaults: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(options)}
    if "recipe" in fields:
        name = last_value(arguments, "--preset") or fields["preset"].default
        try:
            recipe = preset(
                name,
                system=system or last_value(arguments, "--system"),
                model=last_value(arguments, "--model") if "model" in fields else None,
            )
            recipe = get_type_hints(options)["recipe"](**vars(recipe))
        except InputError as error:
            raise InputError(f"--{error}") from None
        defaults = {name: tyro.MISSING for name, field in fields.items() if _required(field)}
        defaults |= {"preset": name, "recipe": recipe}
    return tyro.cli(
        options,
        prog=f"gmm-jepa {command}",
        args=list(arguments),
        default=options(**defaults) if defaults else None,
        config=(tyro.conf.AvoidSubcommands,),  # the default's kind of encoder is the one meant
    )


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def last_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of the last ``--option``, given apart or with ``=``."""
    value = None
    for word, following in zip(arguments, [*arguments[1:], None]):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value
