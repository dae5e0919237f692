"""Autocast must not reach into the ops: their precision is their own."""

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.features import LogMelSpec

K, D, N = 24, 80, 60
MIXTURE = ops.Mixture(
    torch.randn(K, generator=torch.Generator().manual_seed(1)).log_softmax(0),
    torch.randn(K, D, generator=torch.Generator().manual_seed(2)) * 3 - 6,
    torch.rand(K, D, generator=torch.Generator().manual_seed(3)) + 0.1,
)
BOTH = ops.Ensemble((MIXTURE, MIXTURE._replace(means=MIXTURE.means + 0.2)), (1.0, 2.0))
FRAMES = torch.randn(N, D, generator=torch.Generator().manual_seed(4)) * 3 - 6
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(5)) * 3
WEIGHTS = torch.full((N,), 1 / N)
SPEC = LogMelSpec()
CALLS = {
    "gmm_posterior": lambda: ops.gmm_posterior(FRAMES, MIXTURE),
    "gmm_posterior exact": lambda: ops.gmm_posterior(FRAMES, MIXTURE, precision="exact"),
    "gmm_posterior, logarithm": lambda: ops.gmm_posterior(FRAMES, MIXTURE, log=True),
    "gmm_log_likelihood": lambda: ops.gmm_log_likelihood(FRAMES, MIXTURE),
    "gmm_topk": lambda: ops.gmm_topk(FRAMES, MIXTURE, 3),
    "em_statistics": lambda: ops.em_statistics(FRAMES, MIXTURE),
    "kmeans_assign": lambda: ops.kmeans_assign(FRAMES, MIXTURE.means),
    "masked_kl": lambda: ops.masked_kl(LOGITS, FRAMES, WEIGHTS, MIXTURE),
    "gmm_posterior, ensemble": lambda: ops.gmm_posterior(FRAMES, BOTH),
    "masked_kl, ensemble": lambda: ops.masked_kl(LOGITS, FRAMES, WEIGHTS, BOTH),
    "masked_kl_targets": lambda: ops.masked_kl_targets(LOGITS, LOGITS.softmax(1), WEIGHTS),
    "masked_cross_entropy": lambda: ops.masked_cross_entropy(LOGITS, LOGITS.argmax(1), WEIGHTS),
    "masked_mse": lambda: ops.masked_mse(FRAMES, FRAMES + 0.1, WEIGHTS),
    "log_mel": lambda: ops.log_mel(
        FRAMES.flatten()[None],
        torch.tensor([FRAMES.numel()]),
        SPEC.window(),
        SPEC.filters(),
        hop=SPEC.hop_samples,
        floor=SPEC.floor,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_under_autocast(name):
    expected = CALLS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[name]()
    expected, found = ((t,) if isinstance(t, torch.Tensor) else t for t in (expected, found))
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradients_under_autocast_are_those_without():
    grads = []
    for enabled in (False, True):
        logits = LOGITS.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ops.masked_kl(logits, FRAMES, WEIGHTS, MIXTURE).loss.backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
