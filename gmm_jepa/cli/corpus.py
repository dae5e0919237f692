"""`gmm-jepa validate`, `pack` and `synthesize`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gmm_jepa.cli.parse import parse
from gmm_jepa.data.corpus import open_corpus, validate_corpus
from gmm_jepa.data.pack import pack_corpus
from gmm_jepa.data.packed import PackedCorpus, is_pack
from gmm_jepa.data.phone_labels import bad_phones
from gmm_jepa.data.rejects import OPTION, RejectLog, check_fraction
from gmm_jepa.data.synthesis import Content, synthesize
from gmm_jepa.progress import Bar


@dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """Read all audio and list what cannot be used; exit code 2 if that is too much."""

    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests, audio files or packed corpora."""
    rejects: Path = Path("rejects.jsonl")
    """Where unusable files and lines are listed, with the reason; an earlier list is replaced."""
    workers: int = 2
    """Decoding processes."""
    max_bad_fraction: float = 0.01
    """Share of unusable inputs that is put up with."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Decode a corpus once into memory-mapped 16-bit shards. Started again, it goes on."""

    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests or audio files."""
    out: Path
    """Folder of the packed corpus; give it as --audio to the other commands."""
    shard_s: float = 7200.0
    """Seconds of audio in a shard."""
    workers: int = 2
    """Decoding processes."""
    max_bad_fraction: float = 0.01
    """Share of unusable inputs that is put up with."""


@dataclass(frozen=True, kw_only=True)
class SynthesizeOptions:
    """Make English speech with espeak-ng: many voices, phone labels at sample accuracy."""

    out: Path
    """Folder of the corpus: train.jsonl, test.jsonl (other voices) and audio."""
    minutes: float = 42.5
    """Minutes of speech to train on."""
    test_minutes: float = 8.0
    """Minutes of speech to test on."""
    seed: int = 0
    """Of voices, texts and levels."""
    content: Content = "sentences"
    """sentences; or commands with slots and moods, for `gmm-jepa probe`."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point of the three commands."""
    return {"validate": _validate, "pack": _pack, "synthesize": _synthesize}[command](arguments)


def _validate(arguments: Sequence[str]) -> int:
    options = parse(ValidateOptions, "validate", arguments)
    check_fraction(options.max_bad_fraction)
    rejects = RejectLog(options.rejects, anew=True)
    corpus = open_corpus(options.audio, rejects=rejects)
    rejects.drop_earlier()
    n_found = len(corpus) + rejects.n_given
    for source in options.audio:
        if is_pack(Path(source)):
            PackedCorpus(source).verify()
    with Bar("reading audio", "utterance") as progress:
        usable = validate_corpus(corpus, rejects, workers=options.workers, progress=progress)
    print(f"{len(usable)} of {n_found} usable, {usable.total_s / 3600:.3f} h")
    warning = bad_phones(usable.entry(i) for i in range(len(usable)))
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    _conclude(rejects, n_found, rejects.n_given, options.max_bad_fraction)
    return 0


def _conclude(rejects: RejectLog, n_found: int, n_bad: int, max_bad_fraction: float) -> None:
    """Tell of the rejects; `n_bad` counts one as often as its source was given."""
    often = f"; counted {n_bad} times, as often as listed" if n_bad > rejects.count else ""
    print(rejects.summary() + often)
    rejects.check(n_found, max_bad_fraction, n_bad=n_bad, option=OPTION)


def _pack(arguments: Sequence[str]) -> int:
    options = parse(PackOptions, "pack", arguments)
    check_fraction(options.max_bad_fraction)
    rejects = RejectLog(options.out.with_name(options.out.name + ".rejects.jsonl"), anew=True)
    found = RejectLog()  # the file of a pack that is refused stays
    corpus = open_corpus(options.audio, rejects=found)
    n_found = len(corpus) + found.n_given
    with Bar("packing", "utterance") as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* were clipped")  # said below
        packed = pack_corpus(
            corpus,
            options.out,
            rejects=found,
            shard_s=options.shard_s,
            workers=options.workers,
            progress=progress,
        )
    print(f"{options.out}: {len(packed)} utterances, {packed.total_s / 3600:.3f} h")
    if packed.n_clipped_samples:
        print(f"{packed.n_clipped_samples} samples beyond full scale were clipped")
    rejects.extend(found)
    rejects.drop_earlier()
    _conclude(rejects, n_found, found.n_given, options.max_bad_fraction)
    return 0


def _synthesize(arguments: Sequence[str]) -> int:
    options = parse(SynthesizeOptions, "synthesize", arguments)
    with Bar("synthesising", "s") as progress:
        train, test = synthesize(
            options.out,
            minutes=options.minutes,
            test_minutes=options.test_minutes,
            seed=options.seed,
            content=options.content,
            progress=progress,
        )
    print(f"{train}\n{test}")
    return 0
