from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gmm_jepa.data.batches import BatchPlan
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.loader import RankView, make_loader
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.data.workers import WorkerError
from gmm_jepa.errors import InputError


@pytest.fixture
def corpus(speech_like):
    return open_corpus(speech_like, rejects=RejectLog())


@pytest.fixture
def plan(corpus):
    return planned(corpus)


def planned(corpus) -> BatchPlan:
    durations = corpus.durations_samples
    return BatchPlan(
        durations, corpus.weights, batch_samples=80_000, max_samples=20_000, min_samples=320
    )


def mixing(view: RankView) -> dict:
    """Mix each row with the next of the global batch; draw one number per global row."""
    draws = np.random.default_rng(view.step).random(view.n_rows)
    noisy = view.waveform.copy()
    for slot, row in enumerate(view.rows):
        if row < view.n_rows:
            other = view.read_row((int(row) + 1) % view.n_rows)[: noisy.shape[1]]
            noisy[slot, : len(other)] += other
    return {"noisy": noisy, "draw": view.take(draws, fill=-1.0), "note": f"step {view.step}"}


def loaded(corpus, plan, **options) -> list:
    options = {"stop_step": plan.n_batches() + 2} | options
    return list(make_loader(corpus, plan, **options))


def same(a, b) -> bool:
    return (
        a.step == b.step
        and torch.equal(a.waveform, b.waveform)
        and torch.equal(a.lengths_samples, b.lengths_samples)
        and torch.equal(a.utterance, b.utterance)
        and a.extras.keys() == b.extras.keys()
        and all(
            torch.equal(value, b.extras[key]) if torch.is_tensor(value) else value == b.extras[key]
            for key, value in a.extras.items()
        )
    )


def test_batches_hold_what_the_plan_says(corpus, plan):
    for step, batch in enumerate(loaded(corpus, plan)):
        rows = plan.batch(step)
        assert (batch.step, batch.epoch, batch.n_global_rows) == (
            step,
            rows.epoch,
            len(rows.utterance),
        )
        assert batch.waveform.dtype == torch.float32
        assert batch.waveform.shape == (len(rows.utterance), rows.padded_samples)
        assert batch.lengths_samples.tolist() == rows.n_samples.tolist()
        assert batch.utterance.tolist() == rows.utterance.tolist()
        assert batch.extras == {}
        assert batch.rejects == []
        assert batch.wait_s > 0
        for row, n in enumerate(rows.n_samples):
            if n:
                expected = corpus.read(rows.utterance[row], rows.start_samples[row], n)
                np.testing.assert_array_equal(batch.waveform[row, :n], expected)
            assert not batch.waveform[row, n:].any()


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_count_changes_nothing(corpus, plan, workers):
    here = loaded(corpus, plan, prepare=mixing)
    there = loaded(corpus, plan, prepare=mixing, workers=workers)
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert multiprocessing.active_children() == []


def test_resuming_at_a_step_gives_the_rest(corpus, plan):
    whole = loaded(corpus, plan, prepare=mixing)
    rest = loaded(corpus, plan, prepare=mixing, start_step=3, workers=1)
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert loaded(corpus, plan, start_step=2, stop_step=2) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_global_batch(corpus, plan, world_size):
    whole = loaded(corpus, plan, prepare=mixing)
    ranks = [
        loaded(corpus, plan, prepare=mixing, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert len({part.waveform.shape for part in parts}) == 1
        seen = 0
        for part in parts:
            for slot, row in enumerate(part.rows.tolist()):
                if row >= batch.n_global_rows:
                    assert part.lengths_samples[slot] == 0
                    assert part.utterance[slot] == -1
                    assert not part.waveform[slot].any()
                    assert part.extras["draw"][slot] == -1
                    continue
                seen += 1
                assert torch.equal(part.waveform[slot], batch.waveform[row])
                assert torch.equal(part.extras["noisy"][slot], batch.extras["noisy"][row])
                assert part.extras["draw"][slot] == batch.extras["draw"][row]
        assert seen == batch.n_global_rows


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_row_is_empty_and_recorded(corpus, plan, speech_like, workers):
    (speech_like / "07.wav").unlink()
    log = RejectLog()
    batches = loaded(corpus, plan, workers=workers, prepare=mixing)
    for batch in batches:
        log.extend(batch.rejects)
        for slot in (batch.utterance == 7).nonzero():
            assert batch.lengths_samples[slot] == 0
            assert not batch.waveform[slot].any()
    assert log.summary() == "1 rejected (1 missing)"
    assert sum(int((batch.utterance == 7).sum()) for batch in batches) >= 1


def failing(view: RankView) -> dict:
    if view.step == 2:
        raise KeyError("draws")
    return {}


def refusing(view: RankView) -> dict:
    raise InputError("mixing: at least two utterances are needed, got 1")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_one_clear_error(corpus, plan, workers):
    with pytest.raises(WorkerError, match=r"^item 2: KeyError: 'draws'\nTraceback"):
        loaded(corpus, plan, prepare=failing, workers=workers)
    with pytest.raises(InputError, match=r"^mixing: at least two utterances"):
        loaded(corpus, plan, prepare=refusing, workers=workers)
    assert multiprocessing.active_children() == []


def suicidal(view: RankView) -> dict:
    if view.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_killed_worker_is_told(corpus, plan):
    with pytest.raises(WorkerError, match="worker died"):
        loaded(corpus, plan, prepare=suicidal, workers=1)
    assert multiprocessing.active_children() == []


def test_leaving_early_leaves_no_workers(corpus, plan):
    for batch in make_loader(corpus, plan, stop_step=10_000, workers=2):
        if batch.step == 2:
            break
    del batch
    deadline = time.time() + 20
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []

    def interrupted() -> None:
        for batch in make_loader(corpus, plan, stop_step=10_000, workers=1):
            if batch.step == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    batches = make_loader(corpus, plan, stop_step=10_000, workers=1)
    next(batches)
    batches.close()


def signals(view: RankView) -> dict:
    return {
        "threads": torch.get_num_threads(),
        "blocked": sorted(int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }


def test_workers_are_quiet_and_single_threaded(corpus, plan):
    batch = loaded(corpus, plan, prepare=signals, workers=1)[0]
    assert batch.extras == {"threads": 1, "blocked": [signal.SIGINT, signal.SIGTERM]}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


RUNNING = """
import signal, sys
from gmm_jepa.data.batches import BatchPlan
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.loader import make_loader
from gmm_jepa.data.rejects import RejectLog

stop = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
corpus = open_corpus(sys.argv[1], rejects=RejectLog())
plan = BatchPlan(corpus.durations_samples, batch_samples=80_000, max_samples=20_000)
for batch in make_loader(corpus, plan, stop_step=10**9, workers=2):
    if batch.step == 0:
        print("running", flush=True)
    if stop:
        break
print("saved", flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_the_main_process_alone(speech_like, sent):
    command = [sys.executable, "-c", RUNNING, str(speech_like)]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert run.stdout.readline() == "running\n"
        os.killpg(run.pid, sent)
        out, err = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    if sent == signal.SIGTERM:
        assert (run.returncode, out, err) == (0, "saved\n", "")
    else:
        assert run.returncode == -signal.SIGINT
        assert err.endswith("\nKeyboardInterrupt\n")
        assert "Process" not in err  # the workers said nothing
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)  # nobody is left


def test_the_global_random_state_is_left_alone(corpus, plan):
    before = torch.get_rng_state()
    for workers in (0, 1):
        loaded(corpus, plan, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_used_again_once_a_batch_is_gone(corpus, plan, workers):
    kept = loaded(corpus, plan, prepare=mixing, stop_step=20)
    assert len({batch.waveform.data_ptr() for batch in kept}) == 20
    places = set()
    batches = make_loader(corpus, plan, stop_step=20, prepare=mixing, workers=workers)
    for batch, expected in zip(batches, kept, strict=True):
        assert same(batch, expected)
        places.add(batch.waveform.data_ptr())
    assert len(places) <= 4


def test_part_of_a_batch_keeps_its_memory(corpus, plan):
    batches = make_loader(corpus, plan, stop_step=20, workers=1)
    row = next(batches).waveform[0]
    before = row.clone()
    for _ in batches:
        pass
    assert torch.equal(row, before)


def test_spawned_workers_do_the_same(corpus, plan):
    here = loaded(corpus, plan, stop_step=2)
    there = loaded(corpus, plan, stop_step=2, workers=1, start_method="spawn")
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_bad_arguments_are_named(corpus, plan):
    for options, words in [
        ({"rank": 2, "world_size": 2}, "rank must be in"),
        ({"start_step": 5, "stop_step": 4}, "steps must run forwards"),
        ({"workers": -1}, "workers must be 0 or more"),
    ]:
        with pytest.raises(InputError, match=words):
            loaded(corpus, plan, **options)
