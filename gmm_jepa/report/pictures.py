"""The pictures of a report, each for light and for dark pages, and the files of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gmm_jepa.files import write_text, written_aside
from gmm_jepa.report.theme import DARK, LIGHT, Theme, style, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = Mapping[str, tuple[bytes, bytes]]
"""Name -> the picture for light and for dark pages, PNG."""
Figures = Mapping[str, "Figure | None"]
"""Name -> what was drawn; None stands for one whose data is missing."""


def draw(figures: Callable[[Theme], Figures]) -> Pictures:
    """Every picture that the data allows, in both themes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    both = []
    for theme in (LIGHT, DARK):
        with style(theme):
            made = figures(theme)
            both.append({key: to_png(f, theme) for key, f in made.items() if f is not None})
    return {key: (both[0][key], both[1][key]) for key in both[0]}


def save(path: Path, html: str, pictures: Pictures, *, of: Sequence[str] = ()) -> Path:
    """Write a page and, in ``plots/`` beside it, the light pictures as PNGs; returns the page.

    Args:
        path: of the page; its folder is made if absent.
        html: the page.
        pictures: by name.
        of: patterns of names; an earlier picture of such a name that was not drawn is removed.
    """
    folder = path.parent / "plots"
    for old in [old for name in of for old in folder.glob(f"{name}.png")]:
        if old.stem not in pictures:
            old.unlink()
    for key, (light, _) in pictures.items():
        with written_aside(folder / f"{key}.png") as aside:
            aside.write_bytes(light)
    write_text(path, html)
    return path
