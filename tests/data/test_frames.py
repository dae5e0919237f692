"""Log-mel streams: samples and mini-batches do not depend on the number of processes."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from gmm_jepa.data import windows as windows_module
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.frames import LogMelStream, draw_frames
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.data.windows import WINDOWS_AHEAD, read_ahead
from gmm_jepa.features import LogMelSpec
from tests.audio import write_corpus

SPEC = LogMelSpec(n_mels=20)


@pytest.fixture(scope="module")
def whole_corpus(tmp_path_factory):
    manifest = write_corpus(tmp_path_factory.mktemp("audio"), 14)
    return open_corpus([manifest], rejects=RejectLog(None))


@pytest.fixture(params=[60.0, 0.31], ids=["whole", "in windows"])
def corpus(request, whole_corpus, monkeypatch):
    """Utterances that are read at once, or in several windows."""
    monkeypatch.setattr(windows_module, "WINDOW_S", request.param)
    return whole_corpus


def stream(corpus, **options) -> LogMelStream:
    return LogMelStream(corpus, SPEC, rejects=RejectLog(None), **options)


def rows_of(parts) -> Counter:
    """Multiset of rows, whatever their order."""
    return Counter(row.numpy().tobytes() for part in parts for row in part)


def test_batches_hold_every_frame_once(corpus):
    frames = stream(corpus)
    first, second = torch.cat(list(frames)), torch.cat(list(frames))
    assert len(first) == frames.n_frames
    assert torch.equal(first, second)


@pytest.mark.parametrize("world_size", [2, 3, 20, 200])
def test_processes_share_the_windows(corpus, world_size):
    """Also those of one long utterance; each knows how many frames it has."""
    for part in (corpus, corpus.select([3])):
        shares = [stream(part, rank=r, world_size=world_size) for r in range(world_size)]
        held = [list(share) for share in shares]
        assert [sum(map(len, batches)) for batches in held] == [share.n_frames for share in shares]
        assert rows_of(f for batches in held for f in batches) == rows_of(stream(part))
    windows = -(-int(corpus.durations_samples[3]) // int(0.31 * 16_000))
    is_cut = windows_module.WINDOW_S < 1.0
    assert sum(bool(batches) for batches in held) == (min(windows, world_size) if is_cut else 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_mini_batches_are_those_of_one_process(corpus, world_size):
    alone = [list(part) for part in stream(corpus).mini_batches(300)]
    shares = [
        [list(part) for part in stream(corpus, rank=r, world_size=world_size).mini_batches(300)]
        for r in range(world_size)
    ]
    assert len(alone) == stream(corpus).n_mini_batches(300) > 2
    for number, expected in enumerate(alone):
        found = [frames for share in shares for frames in share[number]]
        assert rows_of(found) == rows_of(expected)
    assert rows_of(f for part in alone for f in part) == rows_of(stream(corpus))


def test_mini_batches_begin_where_asked(corpus):
    whole = [torch.cat(list(part)) for part in stream(corpus).mini_batches(300)]
    rest = [torch.cat(list(part)) for part in stream(corpus).mini_batches(300, first=2)]
    assert all(map(torch.equal, whole[2:], rest))
    assert len(rest) == len(whole) - 2


@pytest.mark.parametrize("world_size", [1, 2, 20])
def test_a_sample_does_not_depend_on_the_processes(corpus, world_size):
    parts = [stream(corpus, rank=r, world_size=world_size).sample(200) for r in range(world_size)]
    total, found = sum(rows for rows, _ in parts), sum(f.long() for _, f in parts)
    assert total.shape == (200, SPEC.n_mels)
    assert (found == 1).all()
    everything = torch.cat(list(stream(corpus)))
    expected = everything[torch.from_numpy(draw_frames(len(everything), 200, seed=0))]
    assert torch.equal(total, expected)


def test_a_sample_of_more_than_there_is_is_everything(corpus):
    rows, found = stream(corpus).sample(10**9)
    assert found.all()
    assert torch.equal(rows, torch.cat(list(stream(corpus))))


def test_frames_are_drawn_uniformly():
    hits = np.zeros(50)
    for seed in range(400):
        hits[draw_frames(50, 10, seed=seed)] += 1
    assert hits.sum() == 4000
    assert np.abs(hits - 80).max() < 5 * np.sqrt(80 * 0.8)


def test_windows_of_a_long_utterance_are_found(tmp_path):
    """Frames past the first window of a file come from that window."""
    manifest = write_corpus(tmp_path, 2, seconds=(61.0, 62.0))
    corpus = open_corpus([manifest], rejects=RejectLog(None))
    rows, found = stream(corpus).sample(500)
    everything = torch.cat(list(stream(corpus)))
    assert found.all()
    assert len(everything) == stream(corpus).n_frames
    drawn = torch.from_numpy(draw_frames(len(everything), 500, seed=0))
    assert torch.equal(rows, everything[drawn])


def test_reading_ahead_keeps_the_order_and_a_bound():
    started = []

    def work(item: int) -> int:
        started.append(item)
        return item * item

    results = read_ahead(work, range(100))
    for expected in range(20):
        assert next(results) == expected**2
    assert len(started) <= 20 + WINDOWS_AHEAD
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_an_error_while_reading_ahead_reaches_the_caller():
    def work(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    results = read_ahead(work, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
