"""Manifest lines of LibriSpeech, IEMOCAP and Audio SNIPS as they are distributed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gmm_jepa.downstream.vocabulary import normalise
from gmm_jepa.errors import InputError
from gmm_jepa.files import refuse_existing, written_aside

Lines = Iterator[tuple[str, dict[str, Any]]]
"""Names of manifests, and lines of them."""

EMOTIONS = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}
"""IEMOCAP's four classes in SUPERB: excitement counts as happiness, the others are left out."""
SNIPS_SPEAKERS = {
    "train": ["Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"],
    "valid": ["Aditi", "Amy", "Geraint", "Nicole"],
    "test": ["Brian", "Emma", "Raveena", "Russell"],
}
"""Speakers of Audio SNIPS' parts in SUPERB."""

_TURN = re.compile(r"\[\d[\d.]* - \d[\d.]*\]\t(\S+)\t(\S+)\t")
_AUDIO = (".wav", ".flac", ".mp3", ".ogg")


def librispeech(folder: Path) -> Lines:
    """A manifest of every subset (``train-clean-100``, ...) with its transcripts.

    Args:
        folder: holds the subsets, each ``SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`` beside its
            FLAC files.

    Raises:
        InputError: nothing is found, a transcript has no audio, or a line is bad.
    """
    for transcripts in sorted(folder.glob("*/*/*/*.trans.txt")):
        speaker_folder = transcripts.parent.parent
        for number, line in _lines(transcripts):
            name, _, text = line.partition(" ")
            audio = transcripts.with_name(f"{name}.flac")
            if not text.strip():
                raise InputError(f"{transcripts}, line {number}: expected a name and a text")
            if not audio.is_file():
                raise InputError(f"{transcripts}, line {number}: no audio {audio.name}")
            yield (
                speaker_folder.parent.name,
                {
                    "audio_filepath": str(audio),
                    "id": name,
                    "speaker": speaker_folder.name,
                    "text": text.strip(),
                },
            )


def iemocap(folder: Path) -> Lines:
    """One manifest, ``iemocap``, of the utterances of four classes, with session and speaker.

    Args:
        folder: holds ``Session1`` to ``Session5``.

    Raises:
        InputError: nothing is found, or an utterance has no audio.
    """
    for evaluation in sorted(folder.glob("Session[1-5]/dialog/EmoEvaluation/Ses*.txt")):
        session = evaluation.parents[2]
        for number, line in _lines(evaluation):
            turn = _TURN.match(line)
            if turn is None or turn[2] not in EMOTIONS:
                continue
            name, label = turn[1], EMOTIONS[turn[2]]
            audio = session / "sentences" / "wav" / evaluation.stem / f"{name}.wav"
            if not audio.is_file():
                raise InputError(f"{evaluation}, line {number}: no audio {audio}")
            speaker = name[:5] + name.rsplit("_", 1)[-1][0]  # Ses01 and F or M
            yield (
                "iemocap",
                {
                    "audio_filepath": str(audio),
                    "id": name,
                    "session": session.name.removeprefix("Session"),
                    "speaker": speaker,
                    "label": label,
                },
            )


def audio_snips(folder: Path) -> Lines:
    """Manifests ``train``, ``valid`` and ``test`` of SUPERB's speakers, texts tagged.

    Args:
        folder: holds ``all.iob.snips.txt`` (lines of ``SPEAKER-snips-PART-N BOS words EOS``, a
            tab, one tag a word, the intent last) and the audio in ``train``, ``valid``, ``test``.

    Raises:
        InputError: the list or all audio is absent, or a line is bad.
    """
    path = folder / "all.iob.snips.txt"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    sentences = {}
    for number, line in _lines(path):
        name, _, sentence = line.partition(" ")
        try:
            sentences[name] = tagged(sentence)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    for part, speakers in SNIPS_SPEAKERS.items():
        for audio in sorted((folder / part).rglob("*")):
            speaker = audio.stem.split("-")[0]
            known = audio.suffix.lower() in _AUDIO and audio.stem in sentences
            if known and speaker in speakers:
                text = sentences[audio.stem]
                line = {"audio_filepath": str(audio), "id": audio.stem, "speaker": speaker}
                yield part, {**line, "text": text}


def tagged(sentence: str) -> str:
    """Words and their tags as a text with slots.

    >>> tagged("BOS play mozart now EOS\\tO O artist O PlayMusic")
    'PLAY B-artist MOZART E-artist NOW'

    Args:
        sentence: ``BOS words EOS``, a tab, as many tags: ``O`` or a type, with or without ``B-``
            and ``I-``; the first belongs to BOS, the last names the intent. Equal neighbours are
            one slot unless a ``B-`` parts them. Words of punctuation only are left out.

    Raises:
        ValueError: words and tags do not fit, or a character is unknown.
    """
    words, tab, tags = sentence.partition("\t")
    pairs = list(zip(words.split(), tags.split()))
    if not tab or len(words.split()) != len(tags.split()) or len(pairs) < 3:
        raise ValueError("expected BOS words EOS, a tab, and as many tags")
    parts: list[str] = []
    opened, empty = "", True
    for word, tag in [*pairs[1:-1], ("", "O")]:
        kind = "" if tag == "O" else re.sub(r"^[BI]-", "", tag)
        if opened and (kind != opened or tag.startswith("B-")):
            parts[-1:] = [] if empty else [parts[-1], f"E-{opened}"]
            opened = ""
        if kind and not opened:
            parts.append(f"B-{kind}")
            opened, empty = kind, True
        said = normalise(word)
        if said:
            parts.append(said)
            empty = False
    return " ".join(parts)


KINDS: dict[str, Callable[[Path], Lines]] = {
    "librispeech": librispeech,
    "iemocap": iemocap,
    "audio-snips": audio_snips,
}


def write_manifests(
    read: Callable[[Path], Lines], folder: Path, out: Path
) -> list[tuple[Path, int]]:
    """Write the manifests of a corpus; paths in them are absolute.

    Args:
        read: one of `KINDS`.
        folder: of the corpus.
        out: folder of the manifests.

    Returns:
        Each manifest and its number of lines.

    Raises:
        InputError: see `read`; or a manifest exists. Nothing is written then.
    """
    manifests: dict[str, list[str]] = {}
    for name, line in read(folder.resolve()):
        manifests.setdefault(name, []).append(json.dumps(line) + "\n")
    if not manifests:
        raise InputError(f"{folder}: no utterance found; is this the corpus's own folder?")
    paths = {name: out / f"{name}.jsonl" for name in manifests}
    for path in paths.values():
        refuse_existing(path)
    for name, path in paths.items():
        with written_aside(path) as aside:
            aside.write_text("".join(manifests[name]), encoding="utf-8")
    return [(paths[name], len(lines)) for name, lines in manifests.items()]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8", errors="strict")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()
