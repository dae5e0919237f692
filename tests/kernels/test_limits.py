"""Addresses beyond 32 bits, and memory that does not grow with an intermediate."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa.ops import triton_gmm

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


@pytest.mark.gpu
def test_peak_memory_holds_no_intermediate(draw):
    frames, mixture, logits, weights = draw(20_000, 512, 40)
    if frames.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    launches = {
        "log-likelihood": (
            lambda: triton_gmm.gmm_log_likelihood(frames, *mixture, "fast"),
            frames.shape[0] * 4,
        ),
        "KL": (
            lambda: triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True),
            logits.numel() * 4,
        ),
    }
    for name, (launch, output_bytes) in launches.items():
        launch()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        launch()
        extra = torch.cuda.max_memory_allocated() - before - output_bytes
        assert extra < 100 * frames.shape[0], name  # order, ranks and partials: bytes a row
