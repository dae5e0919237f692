"""The espeak-ng synthesiser through ctypes, in a process of its own.

espeak-ng keeps static state from one utterance to the next (phase, flutter, noise), so the same
text gives other samples the second time; only a fresh process starts from a known state. `Speaker`
therefore runs this very file as a script: same requests in the same order, same samples. The
script needs nothing but the standard library and starts in a few hundredths of a second.

Source of the structures and constants: espeak-ng's ``speak_lib.h``, API revision 12.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from array import array
from dataclasses import dataclass
from typing import Any, BinaryIO

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS, _PHONEME_IPA, _DONT_EXIT = 0x0001, 0x0002, 0x8000
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_POS_CHARACTER, _CHARS_UTF8 = 1, 1
_PARAMETERS = {"rate": 1, "pitch": 3, "pitch_range": 4}


class _EventId(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # whole milliseconds
        ("sample", ctypes.c_int),  # the same place, exact
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Engine:
    """The library itself; one per process."""

    def __init__(self, library_path: str, data_path: str) -> None:
        self._library = ctypes.CDLL(library_path)
        os.chdir(data_path)  # the library cuts paths at 160 bytes, so it is given "."
        self._library.espeak_Synth.argtypes = (
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )
        options = _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT
        self.sample_rate_hz = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, b".", options
        )
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak-ng found no voices in {data_path}")
        self._samples = bytearray()
        self._phones: list[tuple[int, str]] = []
        self._callback = _SynthCallback(self._collect)  # kept, or it would be freed
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, wave: Any, n_samples: int, events: Any) -> int:
        if wave and n_samples > 0:
            self._samples += ctypes.string_at(wave, 2 * n_samples)
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == _EVENT_PHONEME:
                name = event.id.string.decode("utf-8", errors="ignore")  # may be cut at 8 bytes
                self._phones.append((event.sample, name))
            index += 1
        return 0

    def say(self, text: str, voice: str, **parameters: int) -> tuple[bytes, list[tuple[int, str]]]:
        """Speak `text`: int16 samples in native order, and (onset sample, IPA) for each phone."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        for name, value in parameters.items():
            self._library.espeak_SetParameter(_PARAMETERS[name], value, 0)
        self._samples.clear()
        self._phones.clear()
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(
            data, len(data), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status != 0:
            raise RuntimeError(f"espeak-ng refused {text!r} (status {status})")
        self._library.espeak_Synchronize()
        return bytes(self._samples), list(self._phones)


def _serve(engine: _Engine, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer one JSON line with one JSON line and the samples, until the requests end."""
    for line in requests:
        samples, phones = engine.say(**json.loads(line))
        header = {"n_bytes": len(samples), "phones": phones, "rate_hz": engine.sample_rate_hz}
        replies.write(json.dumps(header).encode() + b"\n" + samples)
        replies.flush()


@dataclass(frozen=True, kw_only=True)
class Speech:
    """One synthesised utterance."""

    samples: array[int]
    """int16"""
    sample_rate_hz: int
    phones: list[tuple[int, str]]
    """(onset in samples, IPA name); the name is empty for pauses and for glides within a phone"""


class Speaker:
    """A fresh espeak-ng process, used as a context manager.

    Raises:
        ImportError: `espeakng_loader`, which brings the library and its voices, is absent.
    """

    def __init__(self) -> None:
        from gmm_jepa.errors import require  # not at the top: the script runs without the package

        loader = require("espeakng_loader", extra="demo")
        # -I: neither the working folder nor the environment changes what the script imports.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, loader.get_library_path(), loader.get_data_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def say(
        self, text: str, *, voice: str, rate: int = 175, pitch: int = 50, pitch_range: int = 50
    ) -> Speech:
        """Synthesise one utterance.

        Args:
            text: what to say.
            voice: language and variant, for example ``"en-us+f1"``.
            rate: words per minute, 80 to 450.
            pitch: 0 to 100; 50 is the voice's own.
            pitch_range: 0 (monotone) to 100.

        Raises:
            RuntimeError: espeak-ng could not; the message is its process's last line.
        """
        request = {
            "text": text,
            "voice": voice,
            "rate": rate,
            "pitch": pitch,
            "pitch_range": pitch_range,
        }
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        header_line = self._process.stdout.readline()
        if not header_line:
            self._fail()
        header = json.loads(header_line)
        samples = array("h")
        samples.frombytes(self._process.stdout.read(header["n_bytes"]))
        phones = [(onset, name) for onset, name in header["phones"]]
        return Speech(samples=samples, sample_rate_hz=header["rate_hz"], phones=phones)

    def _fail(self) -> None:
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else "the espeak-ng process ended without a word")


if __name__ == "__main__":
    _serve(_Engine(sys.argv[1], sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
