"""The linear probe: it finds what is there, nothing that is not, and the same twice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gmm_jepa.evaluate.labels import ProbeData
from gmm_jepa.evaluate.probe import LinearProbe, majority, run_probe, score

CPU = torch.device("cpu")


def blobs(n: int, *, gap: float) -> tuple[torch.Tensor, np.ndarray]:
    """Four classes on the corners of a square, with a huge offset and unequal scales."""
    classes = np.arange(n) % 4
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]) * gap
    x = corners[classes] + torch.randn(n, 2)
    return x * torch.tensor([1e-3, 50.0]) + torch.tensor([5.0, -400.0]), classes


def split(classes: np.ndarray, n_train: int) -> ProbeData:
    rows = np.arange(len(classes))
    return ProbeData(
        rows[:n_train],
        classes[:n_train],
        rows[n_train:],
        classes[n_train:],
        rows[n_train:] // 10,
        ["a", "b", "c", "d"],
    )


@pytest.mark.parametrize("n_train", [300, 2000])
def test_reaches_the_best_linear_answer(n_train: int) -> None:
    x, classes = blobs(n_train + 2000, gap=3.0)
    row = run_probe(x, split(classes, n_train), LinearProbe(), CPU)
    assert row is not None
    best = (0.5 * (1 + math.erf(1.5 / math.sqrt(2)))) ** 2  # 0.871
    assert row["accuracy"] == pytest.approx(best, abs=0.025)
    assert row["macro_f1"] == pytest.approx(row["accuracy"], abs=0.01)
    assert (row["n_train"], row["n_test"], row["dimensions"]) == (n_train, 2000, 2)


def test_noise_gives_chance_and_constants_do_no_harm() -> None:
    _, classes = blobs(3000, gap=0.0)
    x = torch.cat([torch.randn(3000, 3), torch.ones(3000, 2)], dim=1)
    row = run_probe(x, split(classes, 1500), LinearProbe(), CPU)
    assert row is not None
    assert row["accuracy"] == pytest.approx(0.25, abs=0.04)


def test_the_same_input_gives_the_same_bits() -> None:
    x, classes = blobs(1500, gap=2.0)
    y = torch.from_numpy(classes)
    first, second = (LinearProbe(steps=50).fit(x, y, 4) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    other = LinearProbe(steps=50, seed=1).fit(x, y, 4)
    assert not torch.equal(first.weight, other.weight)


def test_converges_to_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, classes = blobs(400, gap=2.0)
    probe = LinearProbe(penalty=1e-2)
    fitted = probe.fit(x, torch.from_numpy(classes), 4)
    x = x.double()
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    peer = linear_model.LogisticRegression(C=1 / (400 * 1e-2), tol=1e-8, max_iter=500)
    peer.fit(z, classes)
    ours = fitted.weight - fitted.weight.mean(0)
    np.testing.assert_allclose(ours, peer.coef_ - peer.coef_.mean(0), atol=1e-2)


def test_one_class_or_no_test_rows_is_no_task() -> None:
    x, classes = blobs(20, gap=1.0)
    data = split(classes, 20)
    assert run_probe(x, data, LinearProbe(steps=1), CPU) is None
    one = ProbeData(*[np.arange(4)] * 5, classes=["a"])
    assert run_probe(x, one, LinearProbe(steps=1), CPU) is None


def test_score_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, -1, 1])
    answers = np.array([0, 0, 1, 1, 0, 0])
    groups = np.array([7, 7, 7, 7, 9, 9])
    found = score(answers, truth, groups)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.25 / 6))
    # Group 7: 3 right of 4 (excess 1), group 9: 0 of 2 (excess -1).
    assert found["standard_error_utterances"] == pytest.approx(math.sqrt(2) / 6)
    f1 = [2 * 2 / (3 + 4), 2 * 1 / (2 + 2), 0.0]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))


def test_majority_is_the_commonest_of_training() -> None:
    data = ProbeData(
        np.arange(3), np.array([1, 1, 0]), np.arange(4), np.array([0, 1, 1, -1]), np.arange(4), []
    )
    assert majority(data) == pytest.approx(0.5)
