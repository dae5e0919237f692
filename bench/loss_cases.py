"""The masked losses as measured: forward and gradient, beside plain torch on the masked rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import floors
from bench.cases import Case, Run, frames_of, mixture_of, short_name
from bench.shapes import Shape
from gmm_jepa import ops
from gmm_jepa.ops.mixture import quadratic


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
    work = floors.masked_kl(len(rows), shape.components, shape.features, logit_bytes=dtype.itemsize)
    products = "float16 in three" if device == "cuda" else "float32"
    allowed = 2e-3 if dtype == torch.float32 else 2e-2
    return Case(
        "masked_kl + gradient",
        short_name(dtype),
        run,
        {"torch": _backward(peer)},
        lambda: _gradient_error(run, logits, _backward(peer)) / allowed,
        work,
        products,
        (logits,),
    )


def masked_kl_ensemble(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """KL to the mean of two mixtures' posteriors, against the plain chain on the masked rows."""
    first = mixture_of(shape, device)
    second = first._replace(means=first.means + 0.1)
    both = ops.Ensemble((first, second), (0.5, 0.5))
    frames = frames_of(shape, first)
    forms = [quadratic(mixture, torch.float32) for mixture in both.mixtures]
    logits = torch.randn(shape.frames, shape.components, device=device, dtype=dtype)
    logits.requires_grad_()
    weights = _masked(shape, device)
    rows = weights.nonzero().squeeze(1)

    def plain() -> Tensor:
        target = sum(0.5 * torch.softmax(form.log_joint(frames[rows]), 1) for form in forms)
        return F.kl_div(torch.log_softmax(logits[rows].float(), 1), target, reduction="batchmean")

    run = _backward(lambda: ops.masked_kl(logits, frames, weights, both).loss)
    peer = _backward(plain)
    sizes = (len(rows), shape.components, shape.features)
    return Case(
        "masked_kl of 2 mixtures + gradient",
        short_name(dtype),
        run,
        {"torch": peer},
        lambda: _gradient_error(run, logits, peer) / (2e-3 if dtype == torch.float32 else 2e-2),
        floors.masked_kl(*sizes, logit_bytes=dtype.itemsize, n_mixtures=2),
        "float16 in three" if device == "cuda" else "float32",
        (logits,),
    )


def masked_kl_targets(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Forward and gradient, against log-softmax and `kl_div` on the masked rows."""
    size = (shape.frames, shape.components)
    logits = torch.randn(size, device=device, dtype=dtype).requires_grad_()
    targets = torch.softmax(3.0 * torch.randn(size, device=device), 1).to(dtype)
    weights = _masked(shape, device)
    rows = weights.nonzero().squeeze(1)

    def plain() -> Tensor:
        log_q = torch.log_softmax(logits[rows].float(), dim=1)
        return F.kl_div(log_q, targets[rows].float(), reduction="batchmean")

    run = _backward(lambda: ops.masked_kl_targets(logits, targets, weights).loss)
    peer = _backward(plain)
    return Case(
        "masked_kl_targets + gradient",
        short_name(dtype),
        run,
        {"torch": peer},
        # bf16 targets do not sum to 1: the peer's gradient does not know
        lambda: _gradient_error(run, logits, peer) / (1e-4 if dtype == torch.float32 else 1e-2),
        floors.masked_kl_targets(len(rows), shape.components, in_bytes=dtype.itemsize),
        "float32",
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
    return Case(
        "masked_cross_entropy + gradient",
        short_name(dtype),
        run,
        {"torch": peer},
        lambda: _gradient_error(run, logits, peer) / (1e-4 if dtype == torch.float32 else 1e-2),
        floors.masked_cross_entropy(len(rows), shape.components, in_bytes=dtype.itemsize),
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
        short_name(dtype),
        run,
        {"torch": peer},
        lambda: _gradient_error(run, prediction, peer) / (1e-5 if dtype == torch.float32 else 1e-2),
        floors.masked_mse(len(rows), shape.channels, in_bytes=dtype.itemsize),
        "float32",
        (prediction,),
    )
