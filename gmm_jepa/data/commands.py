"""Spoken commands with slots, for the demo's downstream tasks.

A command is written as slot filling wants it, ``set the B-device lamp E-device to B-colour red
E-colour``, and read aloud without its tags, in one of a few moods that differ in rate and pitch.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

TEMPLATES = (
    "set the {device} in the {room} to {colour}",
    "turn {state} the {device} in the {room}",
    "make the {device} {colour}",
    "play some {music} in the {room}",
    "wake me at {hour} on {day}",
    "book a table for {hour} on {day}",
    "remind me to water the {plant} on {day}",
)
SLOTS = {
    "device": ("lamp", "fan", "heater", "screen", "oven"),
    "room": ("kitchen", "bedroom", "hall", "garden", "office"),
    "colour": ("red", "blue", "green", "yellow", "white"),
    "state": ("on", "off"),
    "music": ("jazz", "opera", "folk", "techno"),
    "hour": ("five", "six", "seven", "eight", "nine"),
    "day": ("monday", "tuesday", "friday", "sunday"),
    "plant": ("roses", "palms", "tulips"),
}
_TAG = re.compile(r"\s*\b[BE]-\w+\s*")


@dataclass(frozen=True)
class Mood:
    """How a command is spoken, as differences to the voice's own."""

    rate: int
    """words per minute"""
    pitch: int
    pitch_range: int


MOODS = {
    "neutral": Mood(0, 0, 0),
    "sad": Mood(-35, -12, -25),
    "happy": Mood(15, 14, 30),
    "angry": Mood(50, -4, 15),
}
"""The labels of the demo's emotion recognition."""


def commands() -> list[str]:
    """All commands, tagged, each once."""
    written = []
    for template in TEMPLATES:
        kinds = re.findall(r"{(\w+)}", template)
        for values in itertools.product(*(SLOTS[kind] for kind in kinds)):
            tagged = {k: f"B-{k} {value} E-{k}" for k, value in zip(kinds, values)}
            written.append(template.format(**tagged))
    return written


def spoken(command: str) -> str:
    """A command without its tags."""
    return " ".join(_TAG.sub(" ", command).split())


def draw_mood(rng: np.random.Generator) -> tuple[str, Mood]:
    """One of the moods and its name, each as likely."""
    name = list(MOODS)[int(rng.integers(len(MOODS)))]
    return name, MOODS[name]
