"""Custom operators with a short way past PyTorch's dispatcher.

The dispatcher's layers for operators in Python take 20 us a call, and 110 with a gradient: of a
training step of the small conformer on two cores, a tenth. Where nothing looks on (no compiler, no
transform, no mode, no profiler) and the tensors are plain ones on a CPU, for which the operator has
a kernel, a call goes to kernel and gradient directly; autocast casts as it is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class Operator:
    """A `torch.library.custom_op` that mutates nothing; its registrations are that one's.

    Args:
        name: "gmm_jepa::name".
        reference: the kernel of devices that have no other, with a schema by its annotations.
    """

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self._op = torch.library.custom_op(name, reference, mutates_args=())
        self._name = name
        self._kernel: Callable[..., Any] | None = None  # of CPUs
        self._differentiable: type[torch.autograd.Function] | None = None
        self._wide: torch.dtype | None = None  # what autocast makes of floats on CPUs

    def register_kernel(self, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As `CustomOpDef.register_kernel`."""
        register = self._op.register_kernel(device)

        def both(kernel: Callable[..., Any]) -> Callable[..., Any]:
            if device == "cpu":
                self._kernel = kernel
            return register(kernel)

        return both

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As `CustomOpDef.register_fake`."""
        return self._op.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As `CustomOpDef.register_autograd`."""
        self._op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self._kernel(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(self._name, (torch.autograd.Function,), methods)

    def register_autocast(self, device: str, dtype: torch.dtype) -> None:
        """As `CustomOpDef.register_autocast`."""
        self._op.register_autocast(device, dtype)
        if device == "cpu":
            self._wide = dtype

    def __call__(self, *arguments: Any) -> Any:
        """The operator's outputs."""
        if not self._is_direct(arguments):
            return self._op(*arguments)
        if self._wide is None or not torch.is_autocast_enabled("cpu"):
            return self._run(arguments)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return self._run(tuple(map(self._cast, arguments)))

    def _is_direct(self, arguments: tuple[Any, ...]) -> bool:
        if self._kernel is None or torch.compiler.is_compiling():
            return False
        looked_on = (
            torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._ops._len_torch_dispatch_stack_pre_dispatch()
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
            or torch.overrides.has_torch_function(arguments)
        )
        return not looked_on and all(
            type(a) in (Tensor, nn.Parameter)
            and a.device.type == "cpu"
            and not (a.is_neg() or a._is_zerotensor())  # whose values are not in memory
            for a in arguments
            if isinstance(a, Tensor)
        )

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if self._differentiable is None:  # which the dispatcher has words for
                return self._op(*arguments)
            return self._differentiable.apply(*arguments)
        return self._kernel(*arguments)

    def _cast(self, value: Any) -> Any:
        """As autocast does: all floats but float64."""
        is_narrow = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._wide) if is_narrow and value.dtype != torch.float64 else value


def without_autocast(*operators: Operator | torch.library.CustomOpDef) -> None:
    """Let these run outside autocast on CPUs and CUDA, on float32: their precision is their own.

    It would take the matrix products of their plain torch to bfloat16: a posterior is then off by
    0.8.
    """
    for operator in operators:
        for device in ("cpu", "cuda"):
            operator.register_autocast(device, torch.float32)
