import numpy as np
import pytest

from gmm_jepa.objectives.augmentation import MIX_DB, NOISE_DB, disturb_into


def signal(n, seed):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def call(waveform, other, seed, mix=0.0, noise=0.0, n_rows=4):
    """What is heard of the waveform."""
    heard = np.full_like(waveform, np.nan)
    disturb_into(
        heard,
        waveform,
        np.random.default_rng(seed),
        n_rows=n_rows,
        row=1,
        read_row=lambda row: other,
        mix_probability=mix,
        noise_probability=noise,
    )
    return heard


def ratio_db(clean, disturbed, where):
    added = (disturbed - clean)[where]
    return 10 * np.log10(np.mean(clean**2) / np.mean(added**2))


def test_mixing_covers_at_most_half_and_keeps_its_level():
    clean, other = signal(16000, 0), 0.1 * signal(9000, 1)
    for seed in range(100):
        disturbed = call(clean, other, seed, mix=1.0)
        changed = np.flatnonzero(disturbed != clean)
        assert 0 < np.ptp(changed) + 1 <= len(clean) // 2
        inside = slice(changed[0], changed[-1] + 1)
        assert MIX_DB[0] - 0.1 < ratio_db(clean, disturbed, inside) < MIX_DB[1] + 0.1


def test_noise_covers_everything_and_keeps_its_level():
    clean, other = signal(4000, 0), 5 * signal(700, 1)
    ratios = []
    for seed in range(100):
        disturbed = call(clean, other, seed, noise=1.0)
        assert disturbed.shape == clean.shape
        assert (disturbed != clean).mean() > 0.99
        ratios.append(ratio_db(clean, disturbed, slice(None)))
    assert NOISE_DB[0] - 0.1 < min(ratios) < 0
    assert 15 < max(ratios) < NOISE_DB[1] + 0.1


def test_probabilities_decide_how_often():
    clean, other = signal(100, 0), signal(100, 1)
    disturbed = [
        (call(clean, other, seed, mix=0.25, noise=0.25) != clean).any() for seed in range(2000)
    ]
    assert 0.45 < np.mean(disturbed) < 0.55


def test_the_input_is_never_changed():
    clean = signal(500, 0)
    before = clean.copy()
    for seed in range(20):
        call(clean, signal(500, 1), seed, mix=0.5, noise=0.5)
    np.testing.assert_array_equal(clean, before)


def test_the_other_row_is_never_the_row_itself():
    asked = []
    for seed in range(200):
        disturb_into(
            np.empty(50, np.float32),
            signal(50, 0),
            np.random.default_rng(seed),
            n_rows=3,
            row=1,
            read_row=lambda row: asked.append(row) or signal(50, 1),
            mix_probability=0.5,
            noise_probability=0.5,
        )
    assert set(asked) == {0, 2}


@pytest.mark.parametrize("other", [np.zeros(0, np.float32), np.zeros(40, np.float32)])
def test_an_empty_or_silent_other_adds_nothing(other):
    clean = signal(100, 0)
    np.testing.assert_array_equal(call(clean, other, 3, mix=1.0), clean)


@pytest.mark.parametrize("n", [0, 1])
def test_almost_no_samples_are_left_alone(n):
    clean = signal(n, 0)
    np.testing.assert_array_equal(call(clean, signal(10, 1), 0, noise=1.0), clean)


def test_a_lone_row_has_nothing_to_mix_with():
    clean = signal(100, 0)
    np.testing.assert_array_equal(call(clean, signal(10, 1), 0, mix=1.0, n_rows=1), clean)


def test_a_short_other_is_heard_again_and_again():
    other = signal(70, 1)
    disturbed = call(np.zeros(1000, np.float32) + 1, other, 5, noise=1.0) - 1
    np.testing.assert_allclose(disturbed[70:140], disturbed[:70], atol=1e-6)


def test_what_is_added_is_the_other_signal_times_a_gain():
    """Bit for bit what whole arrays give, wherever the stretch begins anew."""
    clean, other = signal(3000, 0), signal(1100, 1)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rng.uniform(), rng.integers(3)
        ratio_db, first = rng.uniform(*NOISE_DB), int(rng.integers(len(other)))
        added = np.tile(other, 4)[first : first + len(clean)]
        power, added_power = (float(np.dot(x, x)) / len(x) for x in (clean, added))
        gain = np.float32(np.sqrt(power / (added_power * 10 ** (ratio_db / 10))))
        np.testing.assert_array_equal(
            call(clean, other, seed, noise=1.0), clean + gain * added, strict=True
        )
