"""The networks through torch.compile, and without it where that fails.

What is compiled are encoder, teacher and predictor, or of sharded encoders every part by itself:
the loader's buckets fix their shapes, one graph a bucket (two where micro-batches leave a shorter
one). The cluster head takes as many rows as frames happen to be masked, another number at every
step: one graph for all numbers, and no CUDA graph. The losses are operators and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from gmm_jepa.models import JepaModel

BACKEND = "inductor"
GRAPHS_A_BUCKET = 6
"""Encoder, teacher and predictor, each for whole micro-batches and for a shorter last one."""


def compile_networks(
    model: JepaModel,
    *,
    n_buckets: int,
    report: Callable[[str], None],
    by_block: bool = False,
    cuda_graphs: bool = False,
) -> None:
    """Compile the networks when they first meet a shape; weights stay in place.

    Dropout draws other numbers than without compilation; without it the results are equal to
    rounding.

    Args:
        model: changed in place.
        n_buckets: padded lengths that will come at most; so many graphs are kept.
        report: gets one line if something cannot be compiled and all goes on without.
        by_block: compile front ends and blocks, not encoders, since sharded ones are gathered
            between them, which no graph can hold; equal blocks share one graph.
        cuda_graphs: replay them as CUDA graphs. The caller marks where a step begins, and what they
            gave before is overwritten then.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_A_BUCKET * n_buckets)
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, 4 * GRAPHS_A_BUCKET * n_buckets
    )
    shared = _Shared(report, "reduce-overhead" if cuda_graphs else None)
    networks = [network for network in (model.online, model.teacher) if network is not None]
    if by_block:
        networks = [part for whole in networks for part in (whole.front_end, *whole.blocks)]
    for network in (*networks, model.predictor):
        if network is not None:
            network.forward = _CompiledOrNot(network, shared)
    if model.cluster_head is not None:
        model.cluster_head.forward = _CompiledOrNot(model.cluster_head, shared, rows_vary=True)


class _Shared:
    """What the networks of a model have in common: how they are compiled, whether that failed."""

    def __init__(self, report: Callable[[str], None], mode: str | None) -> None:
        self.report, self.mode, self.failed = report, mode, False


class _CompiledOrNot:
    """A network's forward pass, compiled until that fails."""

    def __init__(self, network: nn.Module, shared: _Shared, *, rows_vary: bool = False) -> None:
        self._plain, self._shared = network.forward, shared
        mode = None if rows_vary else shared.mode
        self._compiled = torch.compile(self._plain, dynamic=rows_vary, backend=BACKEND, mode=mode)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._shared.failed:
            try:
                return self._compiled(*arguments, **options)
            except Exception as error:
                if not _is_of_the_compiler(error):
                    raise
                self._shared.failed = True
                reason = " ".join(str(error).split())[:200]
                self._shared.report(f"train.compile: goes on without, it failed: {reason}")
        return self._plain(*arguments, **options)


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether compiling failed, not what was compiled."""
    kinds = type(error).__mro__
    packages = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
    return isinstance(error, TorchDynamoException) or any(
        kind.__module__.startswith(packages) for kind in kinds
    )
