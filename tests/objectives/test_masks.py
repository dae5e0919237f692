import numpy as np
import pytest

from gmm_jepa.objectives.masks import _below, _words, draw_mask, masked_count

SHARE, SPAN = (0.40, 0.65), (10, 25)


def draw(length, seed=0, share=SHARE, span=SPAN):
    rng = np.random.default_rng(seed)
    return draw_mask(length, masked_count(length, rng, share=share), rng, span_frames=span)


def runs(mask):
    edges = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0]))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize("length", [30, 50, 99, 101, 749])
def test_masked_share_lies_in_its_bounds(length):
    shares = [draw(length, seed).mean() for seed in range(300)]
    half = 0.5 / length
    assert min(shares) >= SHARE[0] - half
    assert max(shares) <= SHARE[1] + half
    assert np.ptp(shares) > 0.2  # the whole range is used


def test_no_run_is_shorter_than_the_shortest_span():
    for seed in range(300):
        assert runs(draw(200, seed)).min() >= SPAN[0]


def test_spans_are_not_longer_than_the_longest_unless_they_touch():
    longest = [runs(draw(749, seed)).max() for seed in range(200)]
    assert np.median(longest) <= 2 * SPAN[1]
    assert min(longest) <= SPAN[1] + 15


@pytest.mark.parametrize(("length", "masked"), [(0, 0), (1, 1), (2, 1), (3, 1), (15, 8)])
def test_short_utterances_keep_a_frame_in_sight(length, masked):
    counts = {int(draw(length, seed).sum()) for seed in range(50)}
    assert masked in counts
    assert all(0 < count < length for count in counts) or length < 2


def test_every_frame_is_masked_about_equally_often():
    rate = np.mean([draw(100, seed) for seed in range(4000)], axis=0)
    assert 0.35 < rate[10:90].min() <= rate[10:90].max() < 0.75


def test_the_same_generator_state_gives_the_same_mask():
    np.testing.assert_array_equal(draw(120, 7), draw(120, 7))
    assert (draw(120, 7) != draw(120, 8)).any()


@pytest.mark.parametrize("span", [(1, 1), (1, 9), (5, 9), (10, 25)])
def test_any_span_range_fills_the_exact_count(span):
    for seed in range(100):
        length = 40 + seed
        mask = draw(length, seed, share=(0.5, 0.5), span=span)
        assert mask.sum() == round(0.5 * length)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 1000, 3 << 30, (1 << 32) - 1])
def test_numbers_are_those_of_the_generator(n):
    """The largest ranges reject a draw in four."""
    words = _words(np.random.default_rng(5))
    drawn = [_below(n, words) for _ in range(200)]
    assert drawn == np.random.default_rng(5).integers(0, n, size=200).tolist()


def test_masks_are_pinned():
    """A change would change all trainings."""
    edges = np.flatnonzero(np.diff(draw(300, 3).astype(int)))
    assert edges.tolist() == [15, 28, 39, 51, 70, 92, 104, 127, 144, 163, 171, 183, 208, 233]
