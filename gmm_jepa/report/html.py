"""A page as one HTML file that needs nothing but itself, and its parts.

Parts are HTML, empty where there is nothing to show. What is called text is escaped here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from string import Template

from gmm_jepa.report.pictures import Pictures


def page(title: str, subtitle: str, parts: Sequence[tuple[str, str]], sources: str) -> str:
    """One HTML page that needs nothing but itself.

    Args:
        title, subtitle: text.
        parts: headings and HTML; the first, "Result", stands without its heading, and what is
            empty is left out.
        sources: HTML, where the numbers come from.
    """
    kept = [(head, body) for head, body in parts if body]
    folder = resources.files("gmm_jepa.report")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h, _ in kept if h != "Result"),
        body="\n".join(
            f'<section id="{_anchor(head)}">'
            + (f"<h2>{escape(head)}</h2>" if head != "Result" else "")
            + f"{body}</section>"
            for head, body in kept
        ),
        sources=sources,
        written=escape(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    )


def _anchor(head: str) -> str:
    return head.lower().replace(" ", "-")


def lead(html: str) -> str:
    """A paragraph that tells how to read what follows it."""
    return f'<p class="lead">{html}</p>'


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """The figures a reader looks for first: label, value and note, text."""
    body = "".join(
        f'<div class="card"><span>{escape(label)}</span><strong>{escape(value)}</strong>'
        f"<small>{escape(note)}</small></div>"
        for label, value, note in figures
    )
    return f'<div class="cards">{body}</div>' if body else ""


def picture(pictures: Pictures, key: str, text: str, caption: str = "") -> str:
    """One picture that follows the page's theme, nothing if it was not drawn.

    `text` says what it shows; the caption is HTML.
    """
    if key not in pictures:
        return ""
    light, dark = (
        "data:image/png;base64," + base64.b64encode(png).decode() for png in pictures[key]
    )
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure class="{escape(key.rstrip("0123456789_"))}"><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(text)}" loading="lazy"></picture>{note}</figure>'
    )


def pairs(html: str) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="pairs">{html}</div>' if html else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A card with a table of text; the first column is words, the others numbers."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    foot = f'<tfoot><tr><td colspan="{len(head)}">{escape(note)}</td></tr></tfoot>' if note else ""
    return (
        f'<div class="tables"><table class="numbers"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def listing(rows: Iterable[tuple[str, str]], caption: str = "") -> str:
    """A small table of names and values, text."""
    top = f"<caption><b>{escape(caption)}</b></caption>" if caption else ""
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table class='plain'>{top}{body}</table>"
