"""Sufficient statistics and hard assignment against the definition."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.features import log_mel


def _statistics(frames, log_joint):
    r, x = torch.softmax(log_joint, 1), frames.double()
    return r.sum(0), r.T @ x, r.T @ x.square(), torch.logsumexp(log_joint, 1).sum()


def test_statistics_within_1e_6(case, oracle):
    expected = _statistics(case.frames, oracle(case.frames, case.mixture))
    got = ops.em_statistics(case.frames, case.mixture)
    for name, e, g in zip(got._fields, expected, got):
        assert g.dtype == torch.float64
        size = e.abs().max() if e.numel() else 0.0
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9 * float(size), msg=name)


def test_variance_survives_an_offset_of_a_thousand(drawn):
    """E[x^2] - E[x]^2 loses twice the digits of the offset; float64 has them to lose."""
    case = drawn(4000, 1, 3, offset=1000.0)
    statistics = ops.em_statistics(case.frames, case.mixture)
    mean = statistics.first / statistics.counts[:, None]
    variance = statistics.second / statistics.counts[:, None] - mean.square()
    expected = case.frames.double().var(0, correction=0)
    torch.testing.assert_close(variance[0], expected, rtol=1e-7, atol=0)


def test_halves_add_up_to_the_whole(drawn):
    case = drawn(500, 17, 13)
    whole = ops.em_statistics(case.frames, case.mixture)
    left = ops.em_statistics(case.frames[:123], case.mixture)
    right = ops.em_statistics(case.frames[123:], case.mixture)
    for w, a, b in zip(whole, left, right):
        torch.testing.assert_close(a + b, w, rtol=1e-12, atol=1e-9)


def test_small_chunks_change_nothing(drawn, monkeypatch):
    case = drawn(257, 8, 5)
    whole = ops.em_statistics(case.frames, case.mixture)
    monkeypatch.setattr("gmm_jepa.ops.mixture.CHUNK_VALUES", 8 * 16)
    for w, c in zip(whole, ops.em_statistics(case.frames, case.mixture)):
        torch.testing.assert_close(c, w, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_frames(drawn, oracle, dtype):
    case = drawn(60, 5, 7)
    frames = case.frames.to(dtype)
    expected = _statistics(frames, oracle(frames, case.mixture))
    for e, g in zip(expected, ops.em_statistics(frames, case.mixture)):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 1, 3), (0, 4, 3), (101, 37, 13), (2000, 600, 80)])
def test_nearest_centroid(shape, offset):
    N, K, D = shape
    frames, centroids = torch.randn(N, D) + offset, torch.randn(K, D) + offset
    distances = (frames.double()[:, None] - centroids.double()).square().sum(-1)
    labels, squared = ops.kmeans_assign(frames, centroids)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, distances.argmin(1))
    torch.testing.assert_close(squared.double(), distances.amin(1), rtol=1e-6, atol=0)


def test_the_first_of_equal_centroids_wins():
    centroids = torch.tensor([[3.0, 1.0], [0.5, 2.0], [0.5, 2.0]])
    labels, squared = ops.kmeans_assign(torch.tensor([[0.5, 2.0]] * 3), centroids)
    assert labels.tolist() == [1, 1, 1]
    assert squared.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(1, 1, 3), (0, 4, 3), (20_001, 37, 13), (2000, 600, 80)])
def test_statistics_of_nearest_centroids(shape):
    N, K, D = shape
    frames, centroids = torch.randn(N, D), torch.randn(K, D)
    labels, squared = ops.kmeans_assign(frames, centroids)
    one_hot = torch.nn.functional.one_hot(labels, K).double()
    x = frames.double()
    expected = (one_hot.sum(0), one_hot.T @ x, one_hot.T @ x.square(), -squared.double().sum())
    for e, g in zip(expected, ops.kmeans_statistics(frames, centroids), strict=True):
        assert g.dtype == torch.float64
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_features", [13, 600])
def test_statistics_of_nearest_centroids_on_cuda(n_features):
    """Beyond what the native kernels take, too; the same bits every time."""
    frames, centroids = torch.randn(20_001, n_features), torch.randn(37, n_features)
    expected = ops.kmeans_statistics(frames, centroids)
    first, second = (ops.kmeans_statistics(frames.cuda(), centroids.cuda()) for _ in range(2))
    for e, g, again in zip(expected, first, second, strict=True):
        torch.testing.assert_close(g.cpu(), e, rtol=1e-6, atol=1e-6)
        assert torch.equal(g, again)


def test_published_labels(shared):
    """The published WavLM-style labels are nearest centroids of log-mel frames."""
    from safetensors.torch import load_file

    golden = load_file(shared / "golden/wavlm_style/io.safetensors")
    stored = torch.load(shared / "golden/kmeans.pt", weights_only=True)
    centroids = stored["centroids"].float()
    frames = log_mel(golden["wav"].reshape(-1, 32_000))[:, :99].reshape(-1, 80)
    labels, _ = ops.kmeans_assign(frames, centroids)
    assert torch.equal(labels, golden["labels"].reshape(-1).long())


def test_user_errors(drawn):
    case = drawn(4, 3, 5)
    with pytest.raises(InputError, match=r"frames: expected \(N, D\)"):
        ops.em_statistics(case.frames[None], case.mixture)
    for op in (ops.kmeans_assign, ops.kmeans_statistics):
        with pytest.raises(InputError, match="frames, centroids"):
            op(case.frames, torch.zeros(3, 4))
        with pytest.raises(TypeError, match="frames"):
            op(torch.zeros(3, 5, dtype=torch.int32), torch.zeros(3, 5))


@pytest.mark.parametrize("n", [0, 9])
def test_registration_holds_what_it_promises(drawn, n):
    case = drawn(n, 3, 5)
    torch.library.opcheck(torch.ops.gmm_jepa.em_statistics.default, (case.frames, *case.mixture))
    for op in (torch.ops.gmm_jepa.kmeans_assign, torch.ops.gmm_jepa.kmeans_statistics):
        torch.library.opcheck(op.default, (case.frames, case.mixture.means))


def test_no_graph_break(drawn):
    case = drawn(20, 6, 5)

    def both(frames, mixture):
        labels, distances = ops.kmeans_assign(frames, mixture.means)
        return ops.em_statistics(frames, mixture), labels, distances

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    expected, got = both(case.frames, case.mixture), compiled(case.frames, case.mixture)
    torch.testing.assert_close(tuple(got[0]), tuple(expected[0]))
    assert torch.equal(got[1], expected[1])
