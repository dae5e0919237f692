"""Every op inside one graph of `torch.compile(fullgraph=True)`: same values, same gradients."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa import LogMelSpec, ops
from gmm_jepa.ops import Ensemble


def _everything(waveform, lengths, tables, mixture, labels, weights, scale, averages):
    """A scalar that every op has a part in, and what carries no gradient."""
    frames = ops.log_mel(waveform, lengths, *tables, hop=320, floor=1e-6).flatten(0, 1)
    both = Ensemble((mixture, mixture._replace(means=mixture.means + 0.1)), (0.3, 0.7))
    posterior = ops.gmm_posterior(frames, mixture, temperature=3.0)
    mean = ops.gmm_posterior(frames, both, temperature=3.0)
    likelihood = ops.gmm_log_likelihood(frames, mixture)
    best, index = ops.gmm_topk(frames, mixture, 1)
    logits = 2.0 * (frames @ mixture.means.T).tanh() * scale
    losses = (
        ops.masked_kl(logits, frames, weights, mixture).loss,
        ops.masked_kl(logits, frames, weights, both).loss,
        ops.masked_kl_targets(logits, posterior, weights).loss,
        ops.masked_cross_entropy(logits, labels, weights).loss,
        ops.masked_mse(logits, mean, weights),
    )
    ops.ema_update([averages], [posterior.detach().mean(0)], 0.5)
    total = sum(losses) + (posterior * mean).sum() + 1e-3 * likelihood.sum()
    return total, best, index


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),
        ("cpu", "inductor"),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_one_graph_holds_them_all(drawn, device, backend):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec, K = LogMelSpec(), 6
    mixture = ops.Mixture(*(p.to(device) for p in drawn(1, K, 80).mixture))
    waveform = 0.1 * torch.randn(2, 1700, device=device)
    lengths = torch.tensor([1700, 900], device=device)
    N = 2 * (1700 // 320 + 1)
    labels = torch.arange(N, device=device) % K
    weights = (torch.arange(N, device=device) % 3 > 0).float() / N
    results = []
    for function in (_everything, torch.compile(_everything, fullgraph=True, backend=backend)):
        x = waveform.clone().requires_grad_()
        scale, averages = torch.ones(K, device=device).requires_grad_(), torch.zeros(K).to(device)
        tables = (spec.window(device), spec.filters(device))
        total, best, index = function(x, lengths, tables, mixture, labels, weights, scale, averages)
        total.backward()
        results.append((total.detach(), best, index, averages, scale.grad, x.grad))
    for eager, compiled in zip(*results):
        size = float(eager.abs().max())
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4 * size)
    assert float(results[0][4].abs().max()) > 0
    assert float(results[0][5].abs().max()) > 0
