"""Errors a user can cause, and the door through which optional packages come in."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what and why.

    The command line prints it and exits with code 2; libraries may catch it as `ValueError`.
    """


def check(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        InputError: with the message, where the condition does not hold.
    """
    if not condition:
        raise InputError(message)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: dotted name, for example ``"soundfile"``.
        extra: the extra of this project that brings it.

    Raises:
        ImportError: the package is absent; the message names the install command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is needed here: pip install "gmm-jepa[{extra}]" ({error})'
        ) from error
