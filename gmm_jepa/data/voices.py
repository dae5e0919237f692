"""The demo corpus's cast: the voices, how each speaks, and who reads which sentences."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np

_ACCENTS = ("en-us", "en", "en-gb-x-rp")  # "en" is espeak-ng's name for British English

# Variants that sound like people and unlike each other. None has an echo, which would fill pauses.
_LOW = ("Alex", "Denis", "Gene", "Mario", "john", "m1", "m3", "m4", "m5", "m6", "m7", "m8", "max")
_HIGH = ("Andrea", "aunty", "belinda", "f1", "grandma", "linda", "steph")

N_VOICES = len(_LOW) + len(_HIGH)

_TEST_SENTENCES = 5
"""One sentence in so many is kept for the test part."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One speaker."""

    name: str
    """espeak-ng's language and variant, ``"en-us+f1"``; also the speaker's name in the manifest"""
    rate: int
    """words per minute"""
    pitch: int
    """0 to 100"""
    pitch_range: int
    """0 to 100"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one of the two manifests is made of."""

    voices: list[Voice]
    sentences: list[str]


def sentences() -> list[str]:
    """The sentences of the demo corpus, in the order of ``sentences.txt``."""
    text = resources.files("gmm_jepa.data").joinpath("sentences.txt").read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def cast_parts(
    n_train_voices: int, n_test_voices: int, seed: int, texts: list[str]
) -> tuple[Part, Part]:
    """A train and a test part without a voice or a text in common.

    Low voices, high voices and accents are spread over both. There are `N_VOICES` in all.
    """
    rng = np.random.default_rng([seed, 2])
    voices = _draw_voices(rng)
    texts = rng.permutation(texts).tolist()
    n_test_texts = len(texts) // _TEST_SENTENCES
    train = Part(voices=voices[:n_train_voices], sentences=texts[n_test_texts:])
    test = Part(
        voices=voices[n_train_voices : n_train_voices + n_test_voices],
        sentences=texts[:n_test_texts],
    )
    return train, test


def _draw_voices(rng: np.random.Generator) -> list[Voice]:
    places = [  # both groups spread evenly over the cast, so that each part gets its share
        ((index + 0.5) / len(group), variant)
        for group in (_LOW, _HIGH)
        for index, variant in enumerate(rng.permutation(group).tolist())
    ]
    return [
        Voice(
            name=f"{_ACCENTS[number % len(_ACCENTS)]}+{variant}",
            rate=int(rng.integers(140, 205)),
            pitch=int(rng.integers(35, 66)),
            pitch_range=int(rng.integers(35, 71)),
        )
        for number, (_, variant) in enumerate(sorted(places))
    ]
