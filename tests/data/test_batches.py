from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from gmm_jepa.data.batches import BatchPlan, rank_rows
from gmm_jepa.data.buckets import optimal_edges, segment_bounds, split_rows
from gmm_jepa.data.permute import permute, permute_one, uniform
from gmm_jepa.errors import InputError

RATE = 16_000


def log_normal(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(5), 0.7, n)) * RATE, 1, None).astype(np.int64)


def made(durations, weights=None, **options) -> BatchPlan:
    options = {"batch_samples": 60 * RATE, "max_samples": 15 * RATE, "min_samples": 1600} | options
    return BatchPlan(durations, weights, **options)


def epoch_rows(plan: BatchPlan, epoch: int, world_size: int = 1) -> Counter:
    """How often each (utterance, start, length) occurs in an epoch over all ranks."""
    seen: Counter = Counter()
    n_batches = plan.n_batches()
    for step in range(epoch * n_batches, (epoch + 1) * n_batches):
        batch = plan.batch(step)
        assert batch.epoch == epoch
        assert (batch.utterance >= 0).any()
        for rank in range(world_size):
            for row in rank_rows(len(batch.utterance), rank, world_size):
                if row < len(batch.utterance) and batch.utterance[row] >= 0:
                    triple = (batch.utterance[row], batch.start_samples[row], batch.n_samples[row])
                    seen[tuple(int(value) for value in triple)] += 1
    return seen


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1_000, 4_097, 100_003])
def test_permutation_is_one(n):
    places = permute(np.arange(n), n, 1, "a")
    np.testing.assert_array_equal(np.sort(places), np.arange(n))
    if n > 60:
        assert not np.array_equal(places, permute(np.arange(n), n, 2, "a"))
        assert abs(np.corrcoef(np.arange(n), places)[0, 1]) < 4 / np.sqrt(n)


def test_permutation_of_a_huge_list_costs_nothing_and_is_pinned():
    n = 10**15 + 37
    places = permute(np.array([0, 1, n - 1]), n, 3)
    assert places.tolist() == [permute_one(i, n, 3) for i in (0, 1, n - 1)]
    assert ((places >= 0) & (places < n)).all()
    pinned = permute(np.arange(8), 8, 0, 1, "batches").tolist()
    assert pinned == [0, 5, 4, 7, 3, 1, 6, 2]  # on every machine, in every version
    assert uniform(0, "a") == 0.6735265790506395


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_short_permutations_are_even(n):
    trials = 1_000
    counts = np.zeros((n, n))
    for key in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    expected = trials / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_segments_are_equal_consecutive_and_whole():
    durations = np.array([10, 100, 101, 305, 4, 99])
    utterance, start, n, n_short = segment_bounds(durations, 100, 5)
    assert n_short == 1
    assert utterance.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 5]
    assert start.tolist() == [0, 0, 0, 50, 0, 76, 152, 228, 0]
    assert n.tolist() == [10, 100, 50, 51, 76, 76, 76, 77, 99]


def test_edges_are_optimal_against_brute_force():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.choice(60, 9, replace=False)) + 1
    counts = rng.integers(1, 20, 9)

    def cost(edges) -> int:
        n_rows = np.bincount(np.searchsorted(edges, lengths), weights=counts)
        n_batches, rows = split_rows(n_rows, np.array(edges), 200)
        assert (n_batches * rows >= n_rows).all()
        assert (rows * np.array(edges) <= 200).all()
        return int((n_batches * rows * edges).sum())

    def best(b: int) -> int:
        return min(cost([*cut, lengths[-1]]) for cut in combinations(lengths[:-1].tolist(), b - 1))

    answers = optimal_edges(lengths, counts, 12, batch_samples=200)
    assert [len(edges) for edges, _ in answers] == list(range(1, 10))
    assert [cost(edges) for edges, _ in answers] == [best(b) for b in range(1, 10)]
    assert [held for _, held in answers] == [best(b) for b in range(1, 10)]


def test_many_lengths_are_thinned():
    lengths = np.arange(1, 10_001)
    edges, _ = optimal_edges(lengths, np.ones(10_000), 8, batch_samples=10**9)[-1]
    assert edges[-1] == 10_000
    np.testing.assert_allclose(edges, np.arange(1_250, 10_001, 1_250), atol=20)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_segment_once_per_epoch_over_all_ranks(world_size):
    durations = log_normal(503)
    durations[17] = 100 * RATE
    plan = made(durations, seed=3)
    utterance, start, n, _ = segment_bounds(durations, 15 * RATE, 1600)
    wanted = Counter(zip(utterance.tolist(), start.tolist(), n.tolist()))
    for epoch in (0, 1, 1_000):
        assert epoch_rows(plan, epoch, world_size) == wanted


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_all_ranks_have_the_same_shapes(world_size):
    plan = made(log_normal(101), batch_samples=20 * RATE)
    for step in range(plan.n_batches()):
        rows = len(plan.batch(step).utterance)
        per_rank = [rank_rows(rows, rank, world_size) for rank in range(world_size)]
        assert len({len(r) for r in per_rank}) == 1
        assert len(per_rank[0]) >= 1
        assert set(range(rows)) <= set(np.concatenate(per_rank).tolist())


def test_shapes_are_few_and_fixed():
    plan = made(log_normal(2_000), batch_samples=120 * RATE)
    shapes = set(plan.shapes)
    assert len(shapes) <= 32
    for step in range(2 * plan.n_batches()):
        batch = plan.batch(step)
        assert (len(batch.utterance), batch.padded_samples) in shapes
        assert batch.padded_samples % 320 == 0
        assert batch.n_samples.max() <= batch.padded_samples
        assert len(batch.utterance) * batch.padded_samples <= 120 * RATE


def padding_of(plan: BatchPlan) -> float:
    real = held = 0
    for step in range(plan.n_batches()):
        batch = plan.batch(step)
        real += int(batch.n_samples.sum())
        held += len(batch.n_samples) * batch.padded_samples
    assert plan.padding() == pytest.approx(1 - real / held)
    return 1 - real / held


@pytest.mark.parametrize("batch_s", [30, 120, 480])
def test_padding_is_under_five_percent(batch_s):
    assert padding_of(made(log_normal(3_000), batch_samples=batch_s * RATE)) < 0.05
    rng = np.random.default_rng(1)
    uniform_lengths = rng.uniform(0.5, 30, 2_000) * RATE
    assert padding_of(made(uniform_lengths, batch_samples=batch_s * RATE)) < 0.05


def test_ranks_that_do_not_divide_the_rows_compute_empty_ones():
    plan = made(log_normal(3_000), batch_samples=480 * RATE)
    for world_size in (1, 3, 64):
        rows = [(-(-rows // world_size) * world_size, edge) for rows, edge in plan.shapes]
        batches = Counter(plan.batch(step).padded_samples for step in range(plan.n_batches()))
        held = sum(n * edge * batches[edge] for n, edge in rows)
        real = sum(plan.batch(step).n_samples.sum() for step in range(plan.n_batches()))
        assert plan.padding(world_size) == pytest.approx(1 - real / held)
    assert plan.padding() < 0.05 < 0.2 < plan.padding(64)


def test_looser_padding_needs_fewer_shapes():
    tight = made(log_normal(300), batch_samples=480 * RATE)
    loose = made(log_normal(300), batch_samples=480 * RATE, target_padding=0.2)
    assert loose.padding() <= 0.2
    assert len(loose.shapes) < len(tight.shapes)


@pytest.mark.parametrize("name", ["arctic", "digits"])
@pytest.mark.parametrize("batch_s", [60, 120, 480])
def test_padding_on_real_lengths(shared, name, batch_s):
    with open(shared / "speech" / f"{name}.jsonl") as file:
        durations = np.array([round(json.loads(line)["duration"] * RATE) for line in file])
    assert padding_of(made(durations, batch_samples=batch_s * RATE)) < 0.05


def test_batches_are_a_function_of_seed_and_step():
    durations = log_normal(400)
    plan, same, other = made(durations, seed=5), made(durations, seed=5), made(durations, seed=6)
    steps = [0, 1, plan.n_batches(), 10**9]
    for step in reversed(steps):
        np.testing.assert_array_equal(plan.batch(step).utterance, same.batch(step).utterance)
    first = [plan.batch(step).utterance.tolist() for step in range(10)]
    second = [plan.batch(plan.n_batches() + step).utterance.tolist() for step in range(10)]
    assert first != second
    assert first != [other.batch(step).utterance.tolist() for step in range(10)]


def test_weights_repeat_and_draw():
    durations = log_normal(600)
    weights = np.select([np.arange(600) % 4 == k for k in range(4)], [0.0, 0.3, 1.0, 2.5])
    plan = made(durations, weights)
    short = durations < 1600
    counts = np.zeros((20, 600))
    sizes = set()
    for epoch in range(20):
        seen = epoch_rows(plan, epoch)
        sizes.add(sum(seen.values()))
        utterances = Counter()
        for (utterance, _, _), n in seen.items():
            utterances[utterance] = max(n, utterances[utterance])
        for utterance, n in utterances.items():
            counts[epoch, utterance] = n
    assert max(sizes) - min(sizes) <= len(plan.shapes)  # a row of each may stay empty
    assert (counts[:, weights == 0] == 0).all()
    assert (counts[:, (weights == 1) & ~short] == 1).all()
    assert set(np.unique(counts[:, (weights == 2.5) & ~short])) == {2, 3}
    segments = np.ceil(durations / (15 * RATE))
    one = (segments == 1) & ~short
    for weight in (0.3, 2.5):
        assert counts[:, (weights == weight) & one].mean() == pytest.approx(weight, rel=0.08)
    drawn = counts[:, (weights == 0.3) & one].sum(axis=0)
    assert (drawn > 0).mean() > 0.9  # everyone's turn comes


@pytest.mark.parametrize(("n", "weight"), [(10, 0.1), (8, 0.25), (30, 0.02), (1, 0.6), (7, 1.3)])
def test_a_small_source_comes_as_often_as_its_weight_says(n, weight):
    """Beside a larger one with which it shares some lengths, or none."""
    durations = np.concatenate([log_normal(40), np.linspace(1, 15, n) * RATE]).astype(np.int64)
    weights = np.repeat([1.0, weight], [40, n])
    plan, n_epochs = made(durations, weights, seed=1), 400
    counts = np.zeros(n)
    for epoch in range(n_epochs):
        for (utterance, _, _), times in epoch_rows(plan, epoch).items():
            counts[max(utterance - 40, 0)] += times if utterance >= 40 else 0
    share = weight % 1
    deviation = np.sqrt(share * (1 - share) / n_epochs)
    assert np.abs(counts / n_epochs - weight).max() <= 4 * deviation


def test_short_utterances_are_counted():
    plan = made(np.array([100, 1_599, 1_600, 16_000]))
    assert plan.n_too_short == 2
    assert sum(epoch_rows(plan, 0).values()) == 2


@pytest.mark.parametrize("durations", [[16_000], [16_000] * 2, [1_600, 240_000], [240_001]])
def test_tiny_corpora(durations):
    plan = made(np.array(durations), batch_samples=1)
    seen = epoch_rows(plan, 7, world_size=3)
    assert sum(seen.values()) == len(segment_bounds(np.array(durations), 240_000, 1600)[0])


def test_bad_arguments_are_named():
    durations = np.array([16_000, 32_000])
    for change, words in [
        ({"batch_samples": 0}, "batch_samples"),
        ({"n_buckets": 0}, "n_buckets"),
        ({"min_samples": 0}, "min_samples"),
        ({"min_samples": 9 * RATE}, "min_samples must be in"),
        ({"weights": np.ones(3)}, "weights: one per utterance"),
        ({"weights": np.array([1, np.nan])}, "weights: 0 or more"),
        ({"weights": np.array([1, -1])}, "weights: 0 or more"),
        ({"weights": np.zeros(2)}, "no utterance to train on"),
        ({"weights": np.full(2, 0.4)}, "weights are so small"),
        ({"min_samples": 48_000}, "no utterance to train on: 2 given, 2 shorter"),
    ]:
        with pytest.raises(InputError, match=words):
            made(durations, **change)
    with pytest.raises(IndexError):
        made(durations).batch(-1)


def test_a_large_plan_is_quick_to_make_and_to_enter():
    durations = np.tile(log_normal(10_000), 30)
    plan = made(durations, batch_samples=480 * RATE)
    batch = plan.batch(10**10)
    assert batch.epoch == 10**10 // plan.n_batches()
    assert plan.padding() < 0.05
