"""The demo corpus: synthetic read English with phone labels, made on the spot.

Speech nobody has to download: espeak-ng (through `gmm_jepa.data.espeak`) reads the sentences beside
this file in many voices. The voices of the test part are not heard in training, and neither are its
sentences. One seed gives one corpus, bit for bit, for given packages on a given kind of machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.commands import commands, draw_mood, spoken
from gmm_jepa.data.espeak import Speaker, Speech
from gmm_jepa.data.phones import label_phones
from gmm_jepa.data.voices import N_VOICES, Voice, cast_parts, sentences
from gmm_jepa.errors import InputError, require
from gmm_jepa.files import written_aside
from gmm_jepa.locks import held

_RECIPE_VERSION = 1
"""Goes up with every change that makes other samples or labels from the same arguments."""

_RMS = 0.08
_LEVEL_SPREAD_DB = 1.5
_MAX_LEVEL_CHANGE_DB = 3.0
_MAX_PEAK = 0.95

Content = Literal["sentences", "commands"]
"""Read English; or commands with slots, spoken in several moods."""

Progress = Callable[[float, float], None]
"""Called with the seconds made so far and the seconds wanted."""


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Everything that decides the corpus; written beside it, so that a complete one is known."""

    minutes: float
    test_minutes: float
    n_train_voices: int
    n_test_voices: int
    seed: int
    content: Content
    version: int = _RECIPE_VERSION

    def __post_init__(self) -> None:
        for name in ("minutes", "test_minutes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}: expected a positive number, got {value}")
        for name, least in (("n_train_voices", 1), ("n_test_voices", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < least:
                raise InputError(f"{name}: expected {least} or more, got {value}")
        if self.content not in get_args(Content):
            raise InputError(f"content: expected sentences or commands, got {self.content!r}")
        n_voices = self.n_train_voices + self.n_test_voices
        if n_voices > N_VOICES:
            raise InputError(
                "n_train_voices + n_test_voices: "
                f"expected at most {N_VOICES} (all the voices there are), got {n_voices}"
            )


def synthesize(
    out_dir: str | Path,
    *,
    minutes: float = 42.5,
    test_minutes: float = 8.0,
    n_train_voices: int = 14,
    n_test_voices: int = 5,
    seed: int = 0,
    content: Content = "sentences",
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Make the corpus in `out_dir`, or take the one that is there if it was made the same way.

    The folder is empty until all of it is there: ``audio/*.flac`` (16 kHz, mono, 16 bits),
    ``train.jsonl``, ``test.jsonl`` and ``corpus.json``. A manifest line holds ``audio_filepath``
    (relative to the manifest), ``duration`` (s), ``text``, ``speaker`` and ``phones``, a list of
    [start_s, end_s, symbol] without gaps from 0 to ``duration``; silence is ``"sil"``. The ``text``
    of commands has slot tags; what is said stands in ``transcript``, and their mood in ``label``.

    Args:
        out_dir: the folder to make; its parents are made as needed.
        minutes: speech to train on, shared equally by the training voices; the last utterance of
            each voice may run over.
        test_minutes: likewise for the test voices.
        n_train_voices: voices to train on.
        n_test_voices: further voices, heard in the test part only.
        seed: draws the voices, their rates and pitches, the texts and the levels.
        content: sentences to pretrain on, or commands for downstream tasks.
        progress: called after each utterance with the seconds made and the seconds wanted.

    Returns:
        The paths of ``train.jsonl`` and ``test.jsonl``.

    Raises:
        InputError: an argument makes no sense, `out_dir` holds something else, or another process
            works there.
        ImportError: espeakng_loader, soundfile or soxr is absent.
    """
    recipe = _Recipe(
        minutes=minutes,
        test_minutes=test_minutes,
        n_train_voices=n_train_voices,
        n_test_voices=n_test_voices,
        seed=seed,
        content=content,
    )
    out_dir = Path(out_dir).resolve()
    with held(out_dir):
        if any(out_dir.iterdir()):
            return _reuse(out_dir, recipe)
        with written_aside(out_dir) as aside:
            (aside / "audio").mkdir(parents=True)
            _fill(aside, recipe, progress)
    return out_dir / "train.jsonl", out_dir / "test.jsonl"


def _reuse(folder: Path, recipe: _Recipe) -> tuple[Path, Path]:
    """The manifests of the complete corpus in `folder`, if it was made by `recipe`."""
    try:
        found = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"out_dir: expected a new folder or a complete demo corpus, got {folder} "
            "with something else in it"
        ) from None
    wanted = asdict(recipe)
    if found != wanted:
        raise InputError(f"out_dir: {folder} holds a corpus made with {found}, wanted {wanted}")
    manifests = folder / "train.jsonl", folder / "test.jsonl"
    for manifest in manifests:
        if not manifest.is_file():
            raise InputError(f"out_dir: {folder} has lost its {manifest.name}; remove the folder")
    return manifests


def _fill(folder: Path, recipe: _Recipe, progress: Progress | None) -> None:
    soundfile = require("soundfile", extra="train")
    soxr = require("soxr", extra="train")
    texts = sentences() if recipe.content == "sentences" else commands()
    train, test = cast_parts(recipe.n_train_voices, recipe.n_test_voices, recipe.seed, texts)
    plan = (("train", train, 60 * recipe.minutes), ("test", test, 60 * recipe.test_minutes))
    wanted_s = sum(seconds for _, _, seconds in plan)
    made_s = 0.0
    for name, part, seconds in plan:
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as manifest:
            for number, voice in enumerate(part.voices):
                rng = np.random.default_rng([recipe.seed, name == "test", number])
                share_s = seconds / len(part.voices)
                for entry, wave in _read_aloud(
                    part.sentences, voice, share_s, rng, soxr, moods=recipe.content == "commands"
                ):
                    path = folder / entry["audio_filepath"]
                    soundfile.write(path, wave, SAMPLE_RATE_HZ, subtype="PCM_16")
                    manifest.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    made_s += entry["duration"]
                    if progress is not None:
                        progress(made_s, wanted_s)
    description = {
        "recipe": asdict(recipe),
        "espeakng_loader": metadata.version("espeakng-loader"),
        "soxr": soxr.__version__,
        "seconds": round(made_s, 3),
    }
    with open(folder / "corpus.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(description, indent=2) + "\n")


def _read_aloud(
    sentences: list[str],
    voice: Voice,
    share_s: float,
    rng: np.random.Generator,
    soxr: ModuleType,
    *,
    moods: bool,
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Manifest entries and waveforms of one voice, until its share of the part is made."""
    made_s, number = 0.0, 0
    with Speaker() as speaker:
        while made_s < share_s:
            if number % len(sentences) == 0:  # again from the start, in another order
                order = rng.permutation(len(sentences))
            text = sentences[order[number % len(sentences)]]
            rate = voice.rate + int(rng.integers(-8, 9))
            pitch = voice.pitch + int(rng.integers(-4, 5))
            pitch_range = voice.pitch_range
            answers = {"text": text}
            if moods:
                answers["transcript"] = spoken(text)
                answers["label"], mood = draw_mood(rng)
                rate, pitch = rate + mood.rate, pitch + mood.pitch
                pitch_range = min(max(pitch_range + mood.pitch_range, 0), 100)
            speech = speaker.say(
                spoken(text) if moods else text,
                voice=voice.name,
                rate=rate,
                pitch=pitch,
                pitch_range=pitch_range,
            )
            wave = _natural_level(_resample(speech, soxr), rng)
            duration_s = len(wave) / SAMPLE_RATE_HZ
            entry = {
                "audio_filepath": f"audio/{voice.name.replace('+', '_')}-{number:04d}.flac",
                "duration": duration_s,
                **answers,
                "speaker": voice.name,
                "phones": _phones_s(speech, duration_s),
            }
            yield entry, wave
            made_s += duration_s
            number += 1


def _resample(speech: Speech, soxr: ModuleType) -> np.ndarray:
    """``(S,)`` float32 at 16 kHz, in [-1, 1] but for the filter's overshoot."""
    samples = np.asarray(speech.samples, dtype=np.float32) / 32768
    return soxr.resample(samples, speech.sample_rate_hz, SAMPLE_RATE_HZ)


def _natural_level(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bring the RMS near that of recorded speech, with a slight variation and without clipping."""
    change_db = np.clip(
        rng.normal(0.0, _LEVEL_SPREAD_DB), -_MAX_LEVEL_CHANGE_DB, _MAX_LEVEL_CHANGE_DB
    )
    rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
    gain = _RMS * 10 ** (change_db / 20) / rms
    peak = float(np.abs(wave).max())
    return (wave * min(gain, _MAX_PEAK / peak)).astype(np.float32)


def _phones_s(speech: Speech, duration_s: float) -> list[list[float | str]]:
    """The phone labels in seconds (to the microsecond), from 0 to exactly `duration_s`."""
    labels = label_phones(speech.phones, np.asarray(speech.samples))
    starts_s = [round(start / speech.sample_rate_hz, 6) for start, _, _ in labels]
    ends_s = [*starts_s[1:], duration_s]
    symbols = [symbol for _, _, symbol in labels]
    return [list(phone) for phone in zip(starts_s, ends_s, symbols, strict=True)]
