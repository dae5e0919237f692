"""Outputs and gradients of operators on CPUs, and how near they come to those in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gmm_jepa.ops import native

# Names of the native module's instruction sets, and the plain torch form.
KERNELS = [*native.instruction_sets(), "torch"]

needs_native = pytest.mark.skipif(
    not native.instruction_sets(), reason=f"native module: {native.status()}"
)
needs_products = pytest.mark.skipif(
    not native.multiplies_bfloat16(), reason="no products of bfloat16"
)


@contextlib.contextmanager
def on_kernel(name: str, module: ModuleType, fits: str) -> Iterator[str]:
    """Run on one of `KERNELS`; plain torch is what `module` takes where its `fits` is false."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(module, fits, lambda *tensors: False)
        else:
            native.use_instruction_set(name)
        try:
            yield name
        finally:
            native.use_instruction_set("")


def on_one_thread_and_two(run: Callable[[], list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of results."""
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return zip(*results, strict=True)


def cotangent(out: Tensor) -> Tensor:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return grad.to(out.dtype)


def results_of(
    function: Callable[..., Tensor], leaves: list[Tensor], options: dict, autocast: bool = False
) -> list[Tensor]:
    """Output and all gradients, padding's too, under one fixed gradient of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent(out))]


def largest(t: Tensor) -> float:
    return float(t.abs().max())


def norm(t: Tensor) -> float:
    return float(t.double().norm())


def assert_near(
    got: list[Tensor],
    peer: list[Tensor],
    exact: list[Tensor],
    *,
    factor: float,
    unit: float,
    size: Callable[[Tensor], float] = largest,
) -> None:
    """At most `factor` times the error of plain torch, and `unit` of the result or of one."""
    for number, (a, p, e) in enumerate(zip(got, peer, exact, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, torch.float32), number
        error, of_peer, scale = size(a - e), size(p - e), max(size(e), size(torch.ones_like(e)))
        assert error <= factor * of_peer + unit * scale, f"{number}: {error}, {of_peer} of {scale}"
