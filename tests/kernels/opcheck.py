"""Run as a program: `torch.library.opcheck` of every op with its Triton kernel behind it.

    python tests/kernels/opcheck.py cpu|cuda

A process of its own, because on "cpu" it puts the kernels, interpreted, in the place of the CPU's.
"""

from __future__ import annotations

import sys

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from gmm_jepa.ops import losses, posterior, triton_gmm

N, K, D = 40, 9, 5


OF_LAYOUT = ("test_schema", "test_faketensor")
# opcheck's trace adds up all outputs: of losses it would want the gradient's own gradient.
OF_LOSSES = (*OF_LAYOUT, "test_autograd_registration")


def check(op: torch._ops.OpOverload, arguments: tuple, **options: tuple[str, ...]) -> None:
    """`opcheck`, which lets strides pass, and the strides that the op's description promises."""
    torch.library.opcheck(op, arguments, **options)
    mode = FakeTensorMode()

    def described(value: object) -> object:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        made = op(*arguments)
        with mode:
            promised = op(*tree_map(described, arguments))
    for real, fake in zip(tree_leaves(made), tree_leaves(promised), strict=True):
        assert real.stride() == fake.stride(), (op, real.stride(), fake.stride())


def main(device: str) -> None:
    if device == "cpu":
        for module, names in (
            (posterior, ("posterior", "log_likelihood", "topk")),
            (
                losses,
                (
                    "masked_kl",
                    "masked_kl_ensemble",
                    "masked_kl_targets",
                    "masked_cross_entropy",
                    "masked_mse",
                ),
            ),
        ):
            for name in names:
                kernel = name if module is losses else f"gmm_{name}"
                getattr(module, f"_{name}").register_kernel("cpu")(getattr(triton_gmm, kernel))
    torch.manual_seed(0)
    mixture = (
        torch.full((K,), 1 / K, device=device).log(),
        torch.randn(K, D, device=device),
        torch.rand(K, D, device=device) + 0.1,
    )
    frames = torch.randn(N, D, device=device, requires_grad=True)
    logits = torch.randn(N, K, device=device, requires_grad=True)
    targets = torch.softmax(torch.randn(N, K, device=device), 1)
    weights = torch.rand(N, device=device)
    labels = torch.randint(K, (N,), device=device)
    lists = [[p, p + 0.1] for p in mixture]
    ops = torch.ops.gmm_jepa
    float32 = torch.float32
    for op, arguments in (
        (ops.gmm_posterior, (frames, *mixture, 1.0, False, "fast", float32)),
        (ops.gmm_posterior, (frames, *mixture, 2.0, True, "exact", float32)),
        (ops.gmm_log_likelihood, (frames, *mixture, "exact")),
        (ops.gmm_topk, (frames.detach(), *mixture, 1, 1.0)),
        (ops.gmm_topk, (frames.detach(), *mixture, 3, 1.0)),
        (ops.gmm_posterior_ensemble, (frames, *lists, [1.0, 2.0], 2.0, True, "fast", float32)),
        (ops.gmm_topk_ensemble, (frames.detach(), *lists, [0.25, 0.75], 3, 2.0)),
    ):
        check(op.default, arguments)
    for op, arguments in (
        (ops.masked_kl, (logits, frames.detach(), weights, *mixture, 1.0, True)),
        (
            ops.masked_kl_ensemble,
            (logits, frames.detach(), weights, *lists, [0.25, 0.75], 1.0, True),
        ),
        (ops.masked_kl_targets, (logits, targets, weights, True)),
        (ops.masked_cross_entropy, (logits, labels, weights, True)),
        (ops.masked_mse, (logits, targets, weights, True)),
    ):
        check(op.default, arguments, test_utils=OF_LOSSES)
    # logits as a matrix product may leave them: transposed, and every other column of wider ones
    for logits in (
        torch.randn(K, N, device=device).T.requires_grad_(),
        torch.randn(N, 2 * K, device=device)[:, ::2].requires_grad_(),
    ):
        for op, arguments in (
            (ops.masked_kl, (frames.detach(), weights, *mixture, 1.0, True)),
            (ops.masked_kl_ensemble, (frames.detach(), weights, *lists, [0.25, 0.75], 1.0, True)),
            (ops.masked_kl_targets, (targets, weights, True)),
            (ops.masked_cross_entropy, (labels, weights, True)),
            (ops.masked_mse, (targets, weights, True)),
        ):
            check(op.default, (logits, *arguments), test_utils=OF_LAYOUT)


if __name__ == "__main__":
    main(sys.argv[1])
