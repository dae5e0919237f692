import itertools

import pytest

from gmm_jepa.objectives.schedules import interpolate, learning_rate, progress


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_schedules_meet_both_ends_and_fall(shape):
    values = [interpolate(1.0, 0.01, progress(step, 50), shape) for step in range(50)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(values))


def test_midpoints_follow_the_formulas():
    assert interpolate(1.0, 0.01, 0.5, "linear") == pytest.approx(0.505)
    assert interpolate(1.0, 0.01, 0.5, "cosine") == pytest.approx(0.505)
    assert interpolate(1.0, 0.01, 0.5, "exponential") == pytest.approx(0.1)
    assert interpolate(1.0, 0.01, 0.25, "cosine") > interpolate(1.0, 0.01, 0.25, "linear")


def test_a_constant_stays_at_its_start():
    assert interpolate(0.7, 0.01, 0.9, "constant") == 0.7


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        interpolate(1.0, 0.0, 0.5, "sudden")


def test_a_run_of_one_step_starts_at_the_start():
    assert progress(0, 1) == 0.0


def test_learning_rate_rises_to_its_peak_and_falls():
    rates = [
        learning_rate(step, 100, peak=1e-3, warmup_share=0.1, shape="cosine") for step in range(100)
    ]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(1e-5)


def test_without_warmup_the_rate_is_the_peak_at_once():
    assert learning_rate(0, 10, peak=1e-5, warmup_share=0.0, shape="constant") == 1e-5
