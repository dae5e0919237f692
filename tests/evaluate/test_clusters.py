"""Measures of cluster tracks against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gmm_jepa.evaluate import clusters

# Two utterances: 0 0 1 | 1 1 2 0
LABELS = np.array([0, 0, 1, 1, 1, 2, 0])
OFFSETS = np.array([0, 3, 7])


def test_usage() -> None:
    found = clusters.usage(np.array([2, 2, 0, 0]))
    assert found == pytest.approx({"entropy": 0.5, "used": 2, "effective": 2.0, "top_share": 0.5})


def test_usage_of_nothing() -> None:
    found = clusters.usage(np.zeros(4, np.int64))
    assert found == {"entropy": 0.0, "used": 0, "effective": 0.0, "top_share": 0.0}


def test_pairs_stay_inside_utterances() -> None:
    left, right = clusters.adjacent_pairs(LABELS, OFFSETS)
    assert list(zip(left, right)) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 0)]


def test_pairs_with_empty_utterances_at_every_place() -> None:
    offsets = np.array([0, 0, 3, 3, 3, 7, 7])
    left, _ = clusters.adjacent_pairs(LABELS, offsets)
    assert len(left) == 5


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_no_frames(offsets: list[int]) -> None:
    none = np.zeros(0, np.int64)
    assert math.isnan(clusters.adjacent_consistency(none, np.array(offsets)))
    shown, table = clusters.top_transitions(none, np.array(offsets), n_clusters=3, top=2)
    assert shown.size == table.size == 0


def test_adjacent_consistency() -> None:
    assert clusters.adjacent_consistency(LABELS, OFFSETS) == pytest.approx(2 / 5)
    alone = np.array([4, 4, 4])
    assert math.isnan(clusters.adjacent_consistency(alone, np.array([0, 1, 2, 3])))


def test_top_transitions_are_probabilities_of_the_commonest() -> None:
    shown, table = clusters.top_transitions(LABELS, OFFSETS, n_clusters=5, top=2)
    assert sorted(shown.tolist()) == [0, 1]
    place = {int(c): i for i, c in enumerate(shown)}
    assert table[place[0], place[0]] == pytest.approx(1 / 2)
    assert table[place[0], place[1]] == pytest.approx(1 / 2)
    assert table[place[1], place[1]] == pytest.approx(1 / 2)  # the other half goes to cluster 2
    assert table[place[1], place[0]] == 0


def test_top_transitions_leave_unused_clusters_out() -> None:
    shown, table = clusters.top_transitions(LABELS, OFFSETS, n_clusters=100, top=50)
    assert sorted(shown.tolist()) == [0, 1, 2]
    np.testing.assert_allclose(table.sum(1), 1)


def test_clusters_that_follow_one_another_are_placed_side_by_side() -> None:
    chain = np.random.default_rng(0).permutation(12)
    steps = np.concatenate([np.arange(12), np.arange(10, 0, -1)])
    labels = np.tile(chain[steps], 5)
    shown, _ = clusters.top_transitions(labels, np.array([0, len(labels)]), n_clusters=12, top=12)
    places = [chain.tolist().index(c) for c in shown]
    assert places in (list(range(12)), list(range(11, -1, -1)))
