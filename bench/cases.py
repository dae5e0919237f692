"""What is measured: each op, its peers, its check and its least work.

Every case draws its own inputs, so that memory is that of one case at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Shape
from gmm_jepa import LogMelSpec, flops, ops
from gmm_jepa.ops.mixture import quadratic, row_chunks

Run = Callable[[], object]
CHECKED_ROWS = 512  # rows compared with the float64 oracle before anything is timed


class Case(NamedTuple):
    """One op at one shape."""

    name: str
    dtype: str
    run: Run
    peers: dict[str, Run]
    check: Callable[[], float]
    """largest error against float64, in units of what the contract allows: at most 1"""
    work: flops.Work
    products: str
    """the unit its products run on; a key of `bench.peaks.Peaks.flops_per_s`"""
    with_gradient: tuple[Tensor, ...] = ()
    """leaves whose gradient is cleared before every run"""


def mixture_of(shape: Shape, device: str) -> ops.Mixture:
    """Random, with the spread of log-mel."""
    K, D = shape.components, shape.features
    means = 2.5 * torch.randn(K, D) - 4.0
    return ops.Mixture(
        torch.log_softmax(torch.randn(K), 0).to(device),
        means.to(device),
        (0.3 + torch.rand(K, D)).to(device),
    )


def frames_of(shape: Shape, mixture: ops.Mixture) -> Tensor:
    """(N, D) float32, drawn from the mixture."""
    k = torch.randint(shape.components, (shape.frames,), device=mixture.means.device)
    noise = torch.randn(shape.frames, shape.features, device=k.device)
    return mixture.means[k] + mixture.variances[k].sqrt() * noise


def oracle_posterior(frames: Tensor, mixture: ops.Mixture) -> Tensor:
    """(n, K) float64, by the direct form, on the CPU, a component at a time in memory."""
    log_weights, means, variances = (p.double().cpu() for p in mixture)
    x = frames.double().cpu()
    joint = torch.stack(
        [
            log_weights[k] - 0.5 * ((x - means[k]).square() / variances[k]).sum(1)
            for k in range(len(means))
        ],
        dim=1,
    )
    constant = 0.5 * (2.0 * math.pi * variances).log().sum(1)
    return torch.softmax(joint - constant, dim=1)


def log_mel(shape: Shape, device: str, out_dtype: torch.dtype = torch.float32) -> Case:
    """Against torchaudio's transform and a logarithm."""
    import torchaudio

    spec, S = LogMelSpec(), shape.samples
    waveform = 0.1 * torch.randn(shape.rows, S, device=device)
    lengths = torch.full((shape.rows,), S, device=device)
    window, filters = spec.window(device), spec.filters(device)
    options = {"hop": spec.hop_samples, "floor": spec.floor}
    peer = {"n_fft": 400, "hop_length": 320, "n_mels": 80}
    transform = torchaudio.transforms.MelSpectrogram(16_000, **peer).to(device)
    wide = torchaudio.transforms.MelSpectrogram(16_000, **peer).double()

    def run():
        return ops.log_mel(waveform, lengths, window, filters, out_dtype=out_dtype, **options)

    def check() -> float:
        expected = torch.log(wide(waveform[-1:].double().cpu()) + spec.floor).mT
        error = (run()[-1:].double().cpu() - expected).abs()
        allowed = 1e-3 if out_dtype == torch.float32 else 0.05
        return float((error / torch.where(expected > math.log(1e-5), allowed, 1e-2)).max())

    on_cuda = device == "cuda"
    work = flops.log_mel(shape.frames, out_bytes=out_dtype.itemsize, folds=2 if on_cuda else 0)
    peers = {"torchaudio": lambda: torch.log(transform(waveform) + spec.floor).mT}
    products = "float16 in three" if on_cuda else "float32"
    return Case("log_mel", f"f32 -> {_short(out_dtype)}", run, peers, check, work, products)


def gmm_posterior(shape: Shape, device: str, out_dtype: torch.dtype = torch.float32) -> Case:
    """Against `addmm` and softmax in chunks, and scikit-learn on the CPU."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)

    def run():
        return ops.gmm_posterior(frames, mixture, out_dtype=out_dtype)

    def plain():
        out = frames.new_empty((shape.frames, shape.components), dtype=out_dtype)
        for rows in row_chunks(*out.shape):
            out[rows] = torch.softmax(form.log_joint(frames[rows]), dim=1)
        return out

    def check() -> float:
        error = run()[:CHECKED_ROWS].double().cpu()
        error -= oracle_posterior(frames[:CHECKED_ROWS], mixture)
        return float(error.abs().max()) / (1e-3 if out_dtype == torch.float32 else 5e-3)

    peers: dict[str, Run] = {"torch": plain}
    if device == "cpu":
        peer, data = scikit_learn(mixture), frames.numpy()
        peers["scikit-learn"] = lambda: peer.predict_proba(data)
    work = flops.gmm_posterior(
        shape.frames, shape.components, shape.features, out_bytes=out_dtype.itemsize
    )
    products = "float16 in three" if device == "cuda" else "bfloat16"  # the CPU may screen in it
    return Case("gmm_posterior", f"f32 -> {_short(out_dtype)}", run, peers, check, work, products)


def scikit_learn(mixture: ops.Mixture):
    """scikit-learn's estimator holding this mixture, in float32."""
    from sklearn.mixture import GaussianMixture

    log_weights, means, variances = (p.cpu().numpy() for p in mixture)
    model = GaussianMixture(len(means), covariance_type="diag", reg_covar=1e-6)
    model.weights_, model.means_ = np.exp(log_weights), means
    model.covariances_, model.precisions_cholesky_ = variances, variances**-0.5
    return model


def em_statistics(shape: Shape, device: str) -> Case:
    """One E-step and its sums, against the same in plain float32 torch, and scikit-learn's EM."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)

    def run():
        return ops.em_statistics(frames, mixture)

    def plain():
        counts = frames.new_zeros(shape.components)
        moments = frames.new_zeros(shape.components, 2 * shape.features)
        for rows in row_chunks(shape.frames, shape.components):
            features = form.features(frames[rows])
            share = torch.softmax(torch.addmm(form.bias, features, form.weight), dim=1)
            counts += share.sum(0)
            moments.addmm_(share.T, features)
        return counts, moments

    def check() -> float:
        some = frames[:CHECKED_ROWS]
        expected = oracle_posterior(some, mixture)
        got = ops.em_statistics(some, mixture)
        first = expected.T @ some.double().cpu()
        error = (got.first.cpu() - first).abs().max() / first.abs().max()
        return float(error) / 1e-6

    peers: dict[str, Run] = {"torch": plain}
    if device == "cpu":
        peer, data = scikit_learn(mixture), frames.numpy()
        peers["scikit-learn"] = lambda: peer._m_step(data, peer._e_step(data)[1])
    work = flops.em_iteration(shape.frames, shape.components, shape.features, candidates=10)
    return Case("em_statistics", "f32 -> f64", run, peers, check, work, "bfloat16")


def _masked(shape: Shape, device: str) -> Tensor:
    """(N,) weights of a mean over the masked frames, 0 elsewhere."""
    weights = (torch.rand(shape.frames, device=device) < shape.masked).float()
    return weights / weights.sum()


def _backward(loss: Callable[[], Tensor]) -> Run:
    return lambda: loss().backward()


def _gradient_error(run: Run, leaf: Tensor, peer: Run) -> float:
    """Largest difference of the gradients, of the largest value."""
    gradients = []
    for function in (run, peer):
        leaf.grad = None
        function()
        gradients.append(leaf.grad.double())
    leaf.grad = None
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def masked_kl(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Forward and gradient, against posterior, log-softmax and `kl_div` on the masked rows."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)
    logits = torch.randn(shape.frames, shape.components, device=device, dtype=dtype)
    logits.requires_grad_()
    weights = _masked(shape, device)
    rows = weights.nonzero().squeeze(1)

    def peer() -> Tensor:
        target = torch.softmax(form.log_joint(frames[rows]), dim=1)
        log_q = torch.log_softmax(logits[rows].float(), dim=1)
        return F.kl_div(log_q, target, reduction="batchmean")

    run = _backward(lambda: ops.masked_kl(logits, frames, weights, mixture).loss)
    work = flops.masked_kl(len(rows), shape.components, shape.features, logit_bytes=dtype.itemsize)
    products = "float16 in three" if device == "cuda" else "float32"
    allowed = 2e-3 if dtype == torch.float32 else 2e-2
    return Case(
        "masked_kl + gradient",
        _short(dtype),
        run,
        {"torch": _backward(peer)},
        lambda: _gradient_error(run, logits, _backward(peer)) / allowed,
        work,
        products,
        (logits,),
    )


def masked_cross_entropy(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Forward and gradient, against `cross_entropy` on the masked rows."""
    logits = torch.randn(shape.frames, shape.components, device=device, dtype=dtype)
    logits.requires_grad_()
    labels = torch.randint(shape.components, (shape.frames,), device=device)
    weights = _masked(shape, device)
    rows = weights.nonzero().squeeze(1)
    run = _backward(lambda: ops.masked_cross_entropy(logits, labels, weights).loss)
    peer = _backward(lambda: F.cross_entropy(logits[rows].float(), labels[rows]))
    traffic = 2.0 * len(rows) * shape.components * dtype.itemsize
    return Case(
        "masked_cross_entropy + gradient",
        _short(dtype),
        run,
        {"torch": peer},
        lambda: _gradient_error(run, logits, peer) / (1e-4 if dtype == torch.float32 else 1e-2),
        flops.Work(4.0 * len(rows) * shape.components, traffic),
        "float32",
        (logits,),
    )


def masked_mse(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Forward and gradient, against `mse_loss` on the masked rows."""
    size = (shape.frames, shape.channels)
    prediction = torch.randn(size, device=device, dtype=dtype).requires_grad_()
    target = torch.randn(size, device=device, dtype=dtype)
    weights = _masked(shape, device)
    rows = weights.nonzero().squeeze(1)
    run = _backward(lambda: ops.masked_mse(prediction, target, weights))
    peer = _backward(lambda: F.mse_loss(prediction[rows].float(), target[rows].float()))
    return Case(
        "masked_mse + gradient",
        _short(dtype),
        run,
        {"torch": peer},
        lambda: _gradient_error(run, prediction, peer) / (1e-5 if dtype == torch.float32 else 1e-2),
        flops.masked_mse(len(rows), shape.channels, in_bytes=dtype.itemsize),
        "float32",
        (prediction,),
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


EVERYWHERE = (log_mel, gmm_posterior, em_statistics, masked_kl, masked_cross_entropy, masked_mse)
ON_CUDA_TOO_IN_BFLOAT16 = (log_mel, gmm_posterior, masked_kl, masked_cross_entropy, masked_mse)


def makers(shape: Shape, device: str) -> list[Callable[[], Case]]:
    """Functions that make each case of a shape."""
    made = [lambda make=make: make(shape, device) for make in EVERYWHERE]
    if device == "cuda":
        half = torch.bfloat16
        made += [lambda make=make: make(shape, device, half) for make in ON_CUDA_TOO_IN_BFLOAT16]
    return made
