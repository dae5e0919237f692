"""Values as text."""

from __future__ import annotations

from typing import Any


def show(value: float | None, form: str, *, scale: float = 1) -> str:
    """A number as text, or a dash for one that could not be measured.

    >>> show(0.123, ".1f", scale=100), show(None, ".1f")
    ('12.3', '–')
    """
    return "–" if value is None else format(scale * value, form)


def count(n: int, what: str) -> str:
    """A number of things: 1 seed, 2 seeds."""
    return f"{n} {what}{'s' * (n != 1)}"


def plain(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def dotted(values: Any, where: str = "") -> dict[str, Any]:
    """Nested JSON objects as dotted name -> value, an object's own values before those within."""
    if not isinstance(values, dict):
        return {where: values}
    flat: dict[str, Any] = {}
    for name, value in sorted(values.items(), key=lambda item: isinstance(item[1], dict)):
        flat |= dotted(value, f"{where}.{name}".lstrip("."))
    return flat
