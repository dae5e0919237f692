"""Make a packed corpus; a run killed at any moment is taken up by the next, to the same bytes.

Which utterances go into which shard follows from their listed lengths alone. A shard counts as
done when its record in ``partial`` exists, which is written after it; ``pack.json`` is written
after everything. Each file is written aside, flushed to disk and renamed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError
from gmm_jepa.data.base import Corpus, hash_parts
from gmm_jepa.data.packed import (
    ENTRIES,
    FORMAT,
    INDEX,
    PARTIAL,
    PLAN,
    REJECTS,
    SUMMARY,
    VERSION,
    PackedCorpus,
    sha256,
    shard_name,
    to_int16,
)
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.data.workers import map_in_order
from gmm_jepa.errors import InputError
from gmm_jepa.files import UNFINISHED, written_aside
from gmm_jepa.locks import held


def pack_corpus(
    corpus: Corpus,
    out_dir: str | os.PathLike[str],
    *,
    rejects: RejectLog,
    shard_s: float = 3600.0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PackedCorpus:
    """Decode a corpus into int16 shards that are memory-mapped afterwards.

    Utterances that cannot be read are left out and recorded, here and in the pack's own
    ``rejects.jsonl``. Samples outside [-1, 1] are clipped, counted and warned of. Weights are not
    packed: they are given where the pack is opened.

    Args:
        corpus: what to pack.
        out_dir: new or empty, or a pack of the same corpus begun earlier.
        rejects: takes the utterances that cannot be read (those of earlier, killed runs too).
        shard_s: seconds of audio per shard, about; one shard is held in memory.
        workers: processes that decode; the pack is the same for any number.
        progress: called with utterances done and in all, after each.

    Raises:
        InputError: `out_dir` holds something else or a pack of other audio or settings, another
            process packs there, or nothing could be read.
    """
    if not shard_s > 0:
        raise InputError(f"shard_s must be positive, got {shard_s}")
    folder = Path(out_dir)
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "source_fingerprint": corpus.fingerprint,
        "shard_s": shard_s,
    }
    with held(folder):
        if _finished(folder, plan):
            lines = (folder / REJECTS).read_text().splitlines()
            rejects.extend(Reject(**json.loads(line)) for line in lines)
        else:
            _begin(folder, plan)
            starts = _shard_starts(corpus.durations_samples, shard_s)
            records = _write_shards(corpus, folder, starts, workers, progress)
            rejects.extend(Reject(**reject) for record in records for reject in record["rejects"])
            _finish(corpus, folder, plan, records)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    packed = PackedCorpus(folder)
    if packed.n_clipped_samples:
        warnings.warn(
            f"{packed.n_clipped_samples} samples in "
            f"{packed.summary['n_clipped_utterances']} utterances lay outside [-1, 1] and were "
            "clipped",
            stacklevel=2,
        )
    return packed


def _finished(folder: Path, plan: dict) -> bool:
    """Whether the folder already holds this very pack."""
    if not (folder / SUMMARY).is_file():
        return False
    summary = json.loads((folder / SUMMARY).read_text())
    _refuse_other(folder, summary, plan)
    return True


def _begin(folder: Path, plan: dict) -> None:
    plan_path = folder / PARTIAL / PLAN
    if plan_path.is_file():
        _refuse_other(folder, json.loads(plan_path.read_text()), plan)
        return
    for item in (*_items(folder), *_items(folder / PARTIAL)):
        if item.name not in (PARTIAL, PLAN, PLAN + UNFINISHED):
            raise InputError(
                f"{folder} is not empty and holds no pack ({item.name}, ...): give another folder"
            )
    (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
    _write(plan_path, _json(plan))


def _items(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _refuse_other(folder: Path, found: dict, plan: dict) -> None:
    differing = [
        "the audio differs"
        if key == "source_fingerprint"
        else f"{key} is {found.get(key)}, here {value}"
        for key, value in plan.items()
        if found.get(key) != value
    ]
    if differing:
        raise InputError(
            f"{folder} holds a pack made of other audio or settings ({'; '.join(differing)}): "
            "give another folder"
        )


def _shard_starts(durations_samples: np.ndarray, shard_s: float) -> np.ndarray:
    """First utterance of each shard: a new one begins with each full `shard_s` passed."""
    begins = np.cumsum(durations_samples) - durations_samples
    _, starts = np.unique(begins // max(1, round(shard_s * SAMPLE_RATE_HZ)), return_index=True)
    return starts


def _write_shards(
    corpus: Corpus,
    folder: Path,
    starts: np.ndarray,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[dict]:
    """Write the shards that are not there yet; the records of all."""
    records = _done(folder, len(starts))
    ends = [*starts[1:].tolist(), len(corpus)]
    first = int(starts[len(records)]) if len(records) < len(starts) else len(corpus)
    remaining = range(first, len(corpus))
    decoded = map_in_order(_Decode(corpus), remaining, workers=workers, prefetch=8)
    with closing(decoded):
        for number in range(len(records), len(starts)):
            members = range(int(starts[number]), ends[number])
            pieces, record = _fill_shard(members, decoded, len(corpus), progress)
            record["file"] = _write(folder / shard_name(number), _npy(pieces))
            del pieces  # before the next shard's are decoded
            _write(_record_path(folder, number), _json(record))
            records.append(record)
    return records


def _fill_shard(
    members: range,
    decoded: Iterator[tuple[torch.Tensor | None, int, Reject | None]],
    n_utterances: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[np.ndarray], dict]:
    """The samples of a shard's utterances, and its record."""
    record: dict = {"utterances": [], "samples": [], "rejects": [], "clipped": [0, 0]}
    pieces = [np.zeros(0, np.int16)]
    for i, (waveform, n_clipped, reject) in zip(members, decoded):
        if waveform is not None:
            pieces.append(waveform.numpy().copy())  # lets go of the worker's shared memory
            record["utterances"].append(i)
            record["samples"].append(len(waveform))
            record["clipped"][0] += n_clipped
            record["clipped"][1] += n_clipped > 0
        else:
            record["rejects"].append(reject._asdict())
        if progress is not None:
            progress(i + 1, n_utterances)
    return pieces, record


def _done(folder: Path, n_shards: int) -> list[dict]:
    """Records of the shards that an earlier run finished, up to the first gap."""
    records = []
    for number in range(n_shards):
        path = _record_path(folder, number)
        if not path.is_file():
            break
        record = json.loads(path.read_text())
        shard = folder / shard_name(number)
        if not shard.is_file() or shard.stat().st_size != record["file"]["bytes"]:
            break
        records.append(record)
    return records


def _record_path(folder: Path, number: int) -> Path:
    return folder / PARTIAL / f"{shard_name(number)}.json"


class _Decode:
    """Read an utterance whole as int16: samples, how many were clipped, the reject if any."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus

    def __call__(self, i: int) -> tuple[torch.Tensor | None, int, Reject | None]:
        try:
            waveform, n_clipped = to_int16(self._corpus.read(i))
        except AudioError as error:
            return None, 0, self._corpus.reject(i, error)
        return torch.from_numpy(waveform), n_clipped, None


def _finish(corpus: Corpus, folder: Path, plan: dict, records: list[dict]) -> None:
    """Write entries, index, rejects and, last, the summary."""
    index = _index(records)
    rejected = [reject for record in records for reject in record["rejects"]]
    if len(index) == 0:
        raise InputError(
            f"none of {len(corpus)} utterances can be read; the first: "
            f"{rejected[0]['file']}: {rejected[0]['reason']}"
        )

    def entries() -> Iterator[bytes]:
        position, row = 0, 0
        for record in records:
            for i, n_samples in zip(record["utterances"], record["samples"]):
                entry = {**corpus.entry(i), "duration": n_samples / SAMPLE_RATE_HZ}
                line = json.dumps(entry).encode() + b"\n"
                index[row, 3] = position
                position, row = position + len(line), row + 1
                yield line

    files = [record["file"] for record in records]
    shards = [file["sha256"] for file in files]
    fingerprint = hash_parts("pack", *shards, np.ascontiguousarray(index[:, :3]).tobytes())
    files.append(_write(folder / ENTRIES, entries()))
    files.append(_write(folder / INDEX, _npy([index])))
    lines = (json.dumps(reject).encode() + b"\n" for reject in rejected)
    files.append(_write(folder / REJECTS, lines))
    summary = {
        **plan,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "n_utterances": len(index),
        "n_samples": int(index[:, 2].sum()),
        "n_rejected": len(rejected),
        "n_clipped_samples": sum(record["clipped"][0] for record in records),
        "n_clipped_utterances": sum(record["clipped"][1] for record in records),
        "fingerprint": fingerprint,
        "files": files,
    }
    _write(folder / SUMMARY, _json(summary))


def _index(records: list[dict]) -> np.ndarray:
    """(N, 4) int64: shard, first sample, samples, and room for the entry's position."""
    parts = []
    for number, record in enumerate(records):
        samples = np.array(record["samples"], np.int64)
        part = np.zeros((len(samples), 4), np.int64)
        part[:, 0], part[:, 1], part[:, 2] = number, np.cumsum(samples) - samples, samples
        parts.append(part)
    return np.concatenate(parts)


def _npy(pieces: Sequence[np.ndarray]) -> Iterator[bytes | memoryview]:
    """A file of arrays joined along the first axis, which are never copied together."""
    header = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(pieces[0])
    fields["shape"] = (sum(map(len, pieces)), *pieces[0].shape[1:])
    np.lib.format.write_array_header_1_0(header, fields)
    yield header.getvalue()
    for values in pieces:
        if values.size:
            yield np.ascontiguousarray(values).view(np.uint8).data


def _json(value: dict) -> Iterator[bytes]:
    yield json.dumps(value, indent=1).encode() + b"\n"


def _write(path: Path, blocks: Iterator[bytes | memoryview]) -> dict:
    """Write a file, whole or not at all; its name, size and SHA-256."""
    with written_aside(path) as aside:
        with aside.open("wb") as file:
            file.writelines(blocks)
        return {"name": path.name, "bytes": aside.stat().st_size, "sha256": sha256(aside)}
