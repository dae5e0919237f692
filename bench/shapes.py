"""The shapes that every measurement runs at."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One batch of speech and one mixture."""

    rows: int
    """utterances, B"""
    seconds: float
    """of each utterance, at 16 kHz"""
    components: int
    """K"""
    features: int = 80
    """D, mels"""
    channels: int = 512
    """C of the latents"""
    masked: float = 0.5
    """share of frames that carry a loss"""

    @property
    def samples(self) -> int:
        """Of one row."""
        return round(16_000 * self.seconds)

    @property
    def frames(self) -> int:
        """Of all rows, one every 320 samples and one more."""
        return self.rows * (self.samples // 320 + 1)

    def describe(self) -> str:
        """One short line."""
        return f"{self.rows} x {self.seconds:g} s, K {self.components}, D {self.features}"


SHAPES = {
    "small": Shape(rows=4, seconds=4.0, components=256),
    "paper": Shape(rows=32, seconds=15.0, components=1024),
    "large": Shape(rows=128, seconds=20.0, components=4096),
}
