"""Addresses beyond 32 bits, and memory that does not grow with an intermediate."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from gmm_jepa.ops import ensemble, triton_attention, triton_gmm
from tests import attention_cases

STRIDE = 2**30  # rows 0, 1, 2: the last begins at element 2^31


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same three rows in bf16, 2^30 elements apart; the pages between are never touched."""
    n, width = rows.shape
    memory = torch.empty(STRIDE * (n - 1) + width, dtype=torch.bfloat16, device=rows.device)
    far = memory.as_strided((n, width), (STRIDE, 1))
    far.copy_(rows)
    return far


@pytest.mark.parametrize(
    "op", ["posterior", "log_likelihood", "kl", "kl_targets", "cross_entropy", "mse"]
)
def test_addresses_have_64_bits(draw, op):
    frames, mixture, logits, _ = draw(3, 16, 16)
    weights = torch.ones(3, device=frames.device)
    frames, logits = frames.bfloat16(), logits.bfloat16()
    labels = torch.arange(3, device=frames.device)
    launch = {
        "posterior": lambda f, a: triton_gmm.gmm_posterior(
            f, *mixture, 1.0, False, "fast", torch.float32
        ),
        "log_likelihood": lambda f, a: triton_gmm.gmm_log_likelihood(f, *mixture, "exact"),
        "kl": lambda f, a: triton_gmm.masked_kl(a, f, weights, *mixture, 1.0, False)[0],
        "kl_targets": lambda f, a: triton_gmm.masked_kl_targets(a, frames, weights, False)[0],
        "cross_entropy": lambda f, a: triton_gmm.masked_cross_entropy(a, labels, weights, False)[0],
        "mse": lambda f, a: triton_gmm.masked_mse(a, frames, weights, False)[0],
    }[op]
    near = launch(frames, logits)
    if op in ("posterior", "log_likelihood"):
        far = launch(far_apart(frames), logits)
    else:
        far = launch(frames, far_apart(logits))
    assert torch.equal(near, far)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_addresses_of_features_have_64_bits(draw, precision):
    frames, mixture, _, _ = draw(3, 16, 9)
    frames = frames.bfloat16()
    memory = torch.empty(STRIDE // 4 * 8 + 3, dtype=torch.bfloat16, device=frames.device)
    far = memory.as_strided((3, 9), (1, STRIDE // 4))
    far.copy_(frames)
    near, got = (triton_gmm.gmm_log_likelihood(f, *mixture, precision) for f in (frames, far))
    assert torch.equal(near, got)


@pytest.mark.gpu
def test_outputs_beyond_32_bits(draw):
    """2^31 posteriors and more; the last row is right."""
    case = draw(7, 1024, 16)
    if case.frames.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    frames = case.frames.repeat(2**21 // 7 + 1, 1)
    got = triton_gmm.gmm_posterior(frames, *case.mixture, 1.0, False, "fast", torch.bfloat16)
    assert got.numel() > 2**31
    assert torch.equal(got[-7:], got[:7])


def extra_bytes(launch: Callable[[], object], output_bytes: int) -> int:
    """Peak of the CUDA allocator during a second call, less what was there and what comes out."""
    launch()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    launch()
    return torch.cuda.max_memory_allocated() - before - output_bytes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["log-likelihood", "argmax", "KL", "KL, ensemble", "targets", "cross-entropy", "MSE"]
)
def test_peak_memory_holds_no_intermediate(draw, name, chunks_of_rows):
    frames, mixture, logits, weights = draw(20_000, 512, 40)
    if frames.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    N = frames.shape[0]
    labels, targets = torch.arange(N, device=frames.device) % 512, torch.rand_like(logits)
    lists = [[p, p + 0.1, p + 0.2] for p in mixture]
    rows = 6000  # of an ensemble's 20,000, in four chunks
    chunks_of_rows(rows, 512)
    launch = {
        "log-likelihood": lambda: triton_gmm.gmm_log_likelihood(frames, *mixture, "fast"),
        "argmax": lambda: triton_gmm.gmm_topk(frames, *mixture, 1, 1.0),
        "KL": lambda: triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True),
        "KL, ensemble": lambda: triton_gmm.masked_kl_ensemble(
            logits, frames, weights, *lists, [0.5, 0.25, 0.25], 1.0, True
        ),
        "targets": lambda: triton_gmm.masked_kl_targets(logits, targets, weights, True),
        "cross-entropy": lambda: triton_gmm.masked_cross_entropy(logits, labels, weights, True),
        "MSE": lambda: triton_gmm.masked_mse(logits, targets, weights, True),
    }[name]
    of_rows = name in ("log-likelihood", "argmax")
    extra = extra_bytes(launch, N * 4 if of_rows else logits.numel() * 4)
    # order, ranks and partial sums: bytes a row; an ensemble holds the posteriors of one chunk
    # twice, their mean and those of the next of its mixtures
    chunk = 2 * 4 * rows * 512 if "ensemble" in name else 0
    assert extra < 100 * N + chunk


def test_an_ensemble_keeps_two_posteriors_at_a_time(draw, chunks_of_rows, monkeypatch):
    """The memory test above, where there is no allocator to ask."""
    frames, mixture, logits, weights = draw(90, 21, 13)
    lists = [[p, p + 0.1, p + 0.2] for p in mixture]
    chunks_of_rows(30, 21)
    made, alive = [], []

    def counted(*arguments) -> torch.Tensor:
        posteriors = triton_gmm.gmm_posterior(*arguments)
        made.append(weakref.ref(posteriors))
        alive.append(sum(of() is not None for of in made))
        return posteriors

    monkeypatch.setattr(ensemble, "_posterior", counted)
    options = ([0.5, 0.25, 0.25], 1.0, True)
    triton_gmm.masked_kl_ensemble(logits, frames, weights, *lists, *options)
    assert alive == [1, 2, 2] * 3


@pytest.mark.gpu
def test_peak_memory_of_attention_holds_no_scores():
    """B H T T scores would be 288 MB; partial sums along diagonals are an eighth of that."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = attention_cases.drawn(4, 8, 1500, 64).to("cuda", torch.bfloat16)
    scores, values = 4 * 8 * 1500 * 1500 * 4, 4 * 8 * 1500 * 64
    arguments = (*case.leaves, None, None, 0.0)
    forward = triton_attention.gated_bias_attention
    out, log_sum = forward(*arguments)
    assert extra_bytes(lambda: forward(*arguments), 2 * values) < scores // 8
    backward = triton_attention.gated_bias_attention_backward
    launch = lambda: backward(case.cotangent, out, log_sum, *arguments)  # noqa: E731
    assert extra_bytes(launch, 3 * 2 * values) < scores // 8
