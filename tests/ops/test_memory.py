"""What the ops hold at one time on a CPU, as torch's allocator sees it: chunks, not intermediates.

Intermediates here would be (N, K) or (N, n_fft) floats; each bound is a fraction of one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gmm_jepa import LogMelSpec, ops
from gmm_jepa.ops import Ensemble
from gmm_jepa.ops.log_mel import log_mel_reference
from gmm_jepa.ops.posterior import log_likelihood_reference, posterior_reference

MB = 1 << 20
N, K, D = 40_000, 512, 16
INTERMEDIATE = N * K * 4  # 82 MB


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at one time during `run`, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    del result
    now = peak = 0
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture(scope="module")
def tensors():
    """Frames, mixture, logits, weights."""
    torch.manual_seed(0)
    mixture = ops.Mixture(
        torch.randn(K).log_softmax(0), 3.0 * torch.randn(K, D), 0.1 + torch.rand(K, D)
    )
    weights = (torch.rand(N) < 0.5).float() / N
    return 3.0 * torch.randn(N, D), mixture, torch.randn(N, K), weights


def test_the_meter_sees_an_intermediate(tensors):
    """The plain chain, so that the tests below can fail."""
    _, _, logits, _ = tensors
    seen = peak_bytes(lambda: torch.softmax(logits, 1).sum())
    assert INTERMEDIATE <= seen < 1.1 * INTERMEDIATE
    seen = peak_bytes(lambda: torch.nn.functional.kl_div(torch.log_softmax(logits, 1), logits))
    assert seen >= 2 * INTERMEDIATE


CALLS = {
    "log-likelihood": lambda x, m, a, w: ops.gmm_log_likelihood(x, m),
    "log-likelihood, plain": lambda x, m, a, w: log_likelihood_reference(x, *m, "fast"),
    "argmax": lambda x, m, a, w: ops.gmm_topk(x, m, 1),
    "statistics": lambda x, m, a, w: ops.em_statistics(x, m),
    "masked KL": lambda x, m, a, w: ops.masked_kl(a, x, w, m),
    "masked KL, ensemble": lambda x, m, a, w: ops.masked_kl(a, x, w, Ensemble((m, m), (1, 1))),
    "masked KL, targets": lambda x, m, a, w: ops.masked_kl_targets(a, a, w),
    "masked cross-entropy": lambda x, m, a, w: ops.masked_cross_entropy(
        a, torch.zeros(N, dtype=torch.int64), w
    ),
    "masked MSE": lambda x, m, a, w: ops.masked_mse(a, a, w),
}


@pytest.mark.parametrize("name", CALLS)
def test_scalars_and_columns_hold_no_rows_by_components(tensors, name):
    # log-densities in chunks of 2^20 values, posteriors of 2^22: 16 MB, twice for an ensemble
    allowed = (48 if "ensemble" in name else 32) * MB
    assert peak_bytes(lambda: CALLS[name](*tensors)) < allowed < 0.7 * INTERMEDIATE


def test_a_gradient_adds_itself_alone(tensors):
    frames, mixture, logits, weights = tensors
    x = logits.clone().requires_grad_()
    seen = peak_bytes(lambda: ops.masked_kl(x, frames, weights, mixture).loss.backward())
    assert INTERMEDIATE <= seen < INTERMEDIATE + 32 * MB


@pytest.mark.parametrize("plain", [False, True])
def test_a_posterior_adds_itself_alone(tensors, plain):
    frames, mixture, _, _ = tensors
    options = (1.0, False, "fast", torch.float32)
    run = posterior_reference if plain else torch.ops.gmm_jepa.gmm_posterior
    seen = peak_bytes(lambda: run(frames, *mixture, *options))
    assert INTERMEDIATE <= seen < INTERMEDIATE + 16 * MB


@pytest.mark.parametrize("plain", [False, True])
def test_log_mel_holds_no_frames(plain):
    """Frames cut out and transformed would be 1.25 and 2.5 times the padded waveform."""
    spec, S = LogMelSpec(), 16_000 * 60
    waveform, lengths = 0.1 * torch.randn(4, S), torch.full((4,), S)
    arguments = (waveform, lengths, spec.window(), spec.filters(), 320, 1e-6, torch.float32)
    run = log_mel_reference if plain else torch.ops.gmm_jepa.log_mel
    padded = 4 * S * 4 + MB  # the plain path reflects rows into a copy of the waveform
    out = 4 * (S // 320 + 1) * 80 * 4
    assert peak_bytes(lambda: run(*arguments)) < padded + 3 * out
