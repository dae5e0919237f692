"""The report of a probe: ``report.html``, its pictures as PNGs, and the table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gmm_jepa.downstream import plots
from gmm_jepa.downstream.metrics import edit_distance, slots
from gmm_jepa.report.html import lead, listing, page, pairs, picture, table
from gmm_jepa.report.pictures import Figures, Pictures, draw, save
from gmm_jepa.report.theme import Theme
from gmm_jepa.report.words import show

TITLES = {"asr": "Speech recognition", "er": "Emotion recognition", "sf": "Slot filling"}
WORDS = {
    "wer": "WER",
    "cer": "CER",
    "accuracy": "accuracy",
    "slot_type_f1": "slot-type F1",
    "slot_value_cer": "slot-value CER",
}
N_EXAMPLES = 8
_PICTURES = ("curves", "layer_weights", "confusion_[0-9]*", "slots_[0-9]*")

_LEAD = (
    "A head on frozen features, a learned weight a layer; trained alike for every row, once with "
    "each learning rate, and the one that is best on the dev part is tested. <b>An encoder is "
    "worth something where it beats its controls:</b> the same encoder untrained, and log-mel "
    "frames."
)


def summary_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """The result as a table; the first row is the head."""
    scores = numbers["scores"]
    first = scores[0]
    head = ["features", "layers", "width", "learning rate", f"dev {WORDS[first]} %"]
    rows = [[*head, *(f"test {WORDS[score]} %" for score in scores)]]
    for row in numbers["rows"]:
        dev, test = row["dev"] or {}, row["test"] or {}
        cells = [show(test.get(score), ".2f") for score in scores]
        rate = f"{row['learning_rate']:g}" if row["dev"] else "diverged"
        size = [str(row["layers"]), str(row["dimensions"])]
        rows.append([row["features"], *size, rate, show(dev.get(first), ".2f"), *cells])
    return rows


def heard_lines(numbers: Mapping[str, Any]) -> list[str]:
    """How much of what is tested an encoder was pretrained on, as far as that is known."""
    data = numbers["data"]
    tested = data["utterances"] if len(data["folds"]) > 1 else data["folds"][0]["test"]
    return [
        f"{name} was pretrained on {n or 'none'} of the {tested} test utterances, without labels"
        for name, n in data.get("heard", {}).items()
    ]


def write_report(out: Path, numbers: Mapping[str, Any]) -> Path:
    """Write page and pictures; returns the page.

    Args:
        out: folder of the probe.
        numbers: content of ``probe.json``.

    Raises:
        ImportError: matplotlib is absent.
    """
    pictures = draw(lambda theme: _figures(theme, numbers))
    title = TITLES[numbers["task"]]
    html = page(
        f"{title}: {out.resolve().name}",
        _subtitle(numbers),
        _parts(numbers, pictures),
        "The numbers are in <code>probe.json</code> and <code>results/</code>, the pictures in "
        "<code>plots/</code>.",
    )
    return save(out / "report.html", html, pictures, of=_PICTURES)


def _figures(theme: Theme, numbers: Mapping[str, Any]) -> Figures:
    figures = {
        "curves": plots.curves(theme, numbers),
        "layer_weights": plots.layer_weights(theme, numbers),
    }
    for i, row in enumerate(numbers["rows"]):
        if numbers["task"] == "er":
            figures[f"confusion_{i}"] = plots.confusion(theme, numbers, row)
        if numbers["task"] == "sf":
            found = slot_counts(row["predictions"])
            figures[f"slots_{i}"] = plots.slot_bars(theme, row, found)
    return figures


def _subtitle(numbers: Mapping[str, Any]) -> str:
    data, settings = numbers["data"], numbers["settings"]
    folds = data["folds"]
    counts = ", ".join(f"{folds[0][part]:,} {part}" for part in ("train", "dev", "test"))
    several = f", first of {len(folds)} folds" if len(folds) > 1 else ""
    return (
        f"{data['utterances']:,} utterances, {data['hours']:.2f} h ({counts}{several}) · "
        f"{settings['steps']:,} steps of {settings['batch'] * settings['accumulate']} utterances"
    )


def _parts(numbers: Mapping[str, Any], pictures: Pictures) -> list[tuple[str, str]]:
    head, *rows = summary_rows(numbers)
    rates = ", ".join(f"{rate:g}" for rate in numbers["settings"]["learning_rates"])
    heard = "".join(f" {line}." for line in heard_lines(numbers))
    result = table(head, rows, f"Learning rates tried: {rates}.{heard}")
    caption = "At each row's learning rate; with folds, the first one."
    return [
        ("Result", lead(_LEAD) + result),
        ("Training", picture(pictures, "curves", "Curves", caption)),
        ("Layers", picture(pictures, "layer_weights", "Layer weights")),
        ("Confusion", pairs(_all(pictures, "confusion_"))),
        ("Slots", _all(pictures, "slots_")),
        ("Transcripts", _transcripts(numbers) if numbers["task"] != "er" else ""),
    ]


def _all(pictures: Pictures, prefix: str) -> str:
    return "".join(picture(pictures, key, key) for key in pictures if key.startswith(prefix))


def _transcripts(numbers: Mapping[str, Any]) -> str:
    """The best and the worst test utterances of trained rows, by characters in error."""
    rows = [row for row in numbers["rows"] if row["kind"] == "trained"] or numbers["rows"]
    parts = []
    for row in rows:
        ranked = sorted(row["predictions"], key=_error, reverse=True)
        shown = {"worst first": ranked}
        if len(ranked) > 2 * N_EXAMPLES:
            shown = {"worst": ranked[:N_EXAMPLES], "best": ranked[: -N_EXAMPLES - 1 : -1]}
        for which, predictions in shown.items():
            if predictions:
                title = escape(f"{row['features']}, {which}")
                said = [(p["reference"], p["hypothesis"] or "(nothing)") for p in predictions]
                parts.append(f"<h3>{title}</h3>{listing(said)}")
    return "".join(parts)


def _error(prediction: Mapping[str, str]) -> float:
    reference = prediction["reference"]
    return edit_distance(prediction["hypothesis"], reference) / max(1, len(reference))


def slot_counts(predictions: Sequence[Mapping[str, str]]) -> dict[str, tuple[int, int, int]]:
    """Of each slot type, the utterances where it was found, missed, or invented."""
    counts: dict[str, list[int]] = {}
    for prediction in predictions:
        truth, answer = set(slots(prediction["reference"])), set(slots(prediction["hypothesis"]))
        for i, kinds in enumerate((truth & answer, truth - answer, answer - truth)):
            for kind in kinds:
                counts.setdefault(kind, [0, 0, 0])[i] += 1
    return {kind: (c[0], c[1], c[2]) for kind, c in counts.items()}
