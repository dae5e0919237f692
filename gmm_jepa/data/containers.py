"""What an audio file's container promises, checked against its size without decoding.

libsndfile quietly reads a cut WAV (RF64 and NIST SPHERE among them) or Ogg file up to the cut; this
is where the cut is noticed. FLAC and MP3 need no check here: their missing samples show when they
are decoded. Not noticed are cuts of AIFF, AU and W64, and of Ogg just between two pages.
"""

from __future__ import annotations

import os
import struct

_STREAMED_BYTES = 0x7FFF0000  # sizes from here on are what writers to a pipe put for "unknown"
_IN_DS64 = 0xFFFFFFFF  # of RF64: the size is in a chunk of its own
_SPHERE_HEADER_BYTES = 1024  # of all but exotic files
_OGG_TAIL_BYTES = 65536  # the longest Ogg page has 65,307 bytes


def missing_data(path: str, size_bytes: int) -> str | None:
    """Say what is missing from a WAV, SPHERE or Ogg file that was cut short.

    Args:
        path: the file.
        size_bytes: its size on disk.

    Returns:
        One phrase, or None where nothing is known to be missing (other containers included).

    Raises:
        OSError: the file cannot be opened or read.
    """
    with open(os.fsencode(path), "rb") as file:
        magic = file.read(12)
        if magic[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and magic[8:12] == b"WAVE":
            return _cut_wav(file, size_bytes, ">" if magic[:4] == b"RIFX" else "<")
        if magic[:8] == b"NIST_1A\n":
            file.seek(0)
            return _cut_sphere(file.read(_SPHERE_HEADER_BYTES), size_bytes)
        if magic[:4] == b"OggS":
            file.seek(max(0, size_bytes - _OGG_TAIL_BYTES))
            return _cut_ogg(file.read(_OGG_TAIL_BYTES))
    return None


def _cut_wav(file, size_bytes: int, order: str) -> str | None:
    position, frame_bytes, long_bytes = 12, 1, None
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return "the file ends before its audio data"
        name, n_bytes = struct.unpack(order + "4sI", header)
        if name == b"fmt ":
            head = file.read(16)
            if len(head) == 16:
                frame_bytes = max(1, struct.unpack_from(order + "H", head, 12)[0])
        if name == b"ds64":
            head = file.read(16)
            if len(head) == 16:
                long_bytes = struct.unpack_from("<Q", head, 8)[0]
        if name == b"data":
            held = size_bytes - position - 8
            if n_bytes == _IN_DS64 and long_bytes is not None:
                n_bytes = long_bytes
            elif n_bytes >= _STREAMED_BYTES:
                return None
            if held >= n_bytes:
                return None
            promised = n_bytes // frame_bytes
            return f"header promises {promised} samples, the file holds {held // frame_bytes}"
        position += 8 + n_bytes + (n_bytes & 1)


def _cut_sphere(header: bytes, size_bytes: int) -> str | None:
    lines = header.decode("ascii", "replace").split("\n")
    fields = {words[0]: words[2] for line in lines if len(words := line.split(None, 2)) == 3}
    if "," in fields.get("sample_coding", ""):  # compressed
        return None
    try:
        n_header = int(lines[1])
        promised = int(fields["sample_count"])
        frame_bytes = int(fields["sample_n_bytes"]) * int(fields.get("channel_count", 1))
    except (IndexError, KeyError, ValueError):
        return None
    held = (size_bytes - n_header) // max(1, frame_bytes)
    if held >= promised:
        return None
    return f"header promises {promised} samples, the file holds {max(0, held)}"


def _cut_ogg(tail: bytes) -> str | None:
    page = tail.rfind(b"OggS")
    if page < 0:
        return "the last Ogg page has no beginning"
    header = tail[page : page + 27]
    if len(header) < 27:
        return "the last Ogg page is cut"
    segments = tail[page + 27 : page + 27 + header[26]]
    if len(segments) < header[26] or page + 27 + header[26] + sum(segments) > len(tail):
        return "the last Ogg page is cut"
    return None
