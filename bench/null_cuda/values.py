"""Values of CUDA tensors computed on the CPU, on the tensors' own memory, which is the host's."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = "cuda"
FROM_MANY_DEVICES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::index")
FROM_MANY_DEVICES += ("aten::_index_put", "aten::_unsafe_index")
NARROW = (torch.bfloat16, torch.float16)
NO_KERNEL = (
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
)
"""Operations that give or take memory and launch nothing: torch's own are right."""


def compute_on_the_host() -> None:
    """From now on, in all threads: torch's operations and Triton's kernels; gloo for NCCL."""
    HostValues().__enter__()
    _in_every_thread()
    _interpret_in_place()
    _talk_by_gloo()
    _show_values()


class HostValues(TorchDispatchMode):
    """Runs the CPU's kernel in place of CUDA's, on the same memory.

    The package's own operators, and torch's of other libraries, keep their CUDA kernels; what those
    call comes here.
    """

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = (arguments, options)
        name = function._schema.name
        if not _is_on_cuda(given) or name in NO_KERNEL:
            return function(*arguments, **options)
        if function.namespace in ("c10d", "_c10d_functional"):
            return _on_host(function, given, makes_cuda=True)
        if function.namespace not in ("aten", "prims"):
            with self:
                return _own_kernel(function)(*arguments, **options)
        if _has_kernel(function, DispatchKey.CompositeImplicitAutograd):
            with self:
                return function.decompose(*arguments, **options)
        if _gives_a_view(function):
            return function(*arguments, **options)
        if not name.startswith(FROM_MANY_DEVICES):
            _refuse_two_devices(name, given)
        device = options.get("device")
        makes_cuda = device is None or torch.device(device).type == CUDA
        return _on_host(function, given, makes_cuda=makes_cuda)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == CUDA


def _is_on_cuda(given: Any) -> bool:
    """Whether a tensor among the arguments is there, or the result is to be."""
    device = given[1].get("device")
    wanted = device is not None and torch.device(device).type == CUDA
    return wanted or any(_is_cuda(value) for value in tree_leaves(given))


@functools.cache
def _has_kernel(function: Any, key: DispatchKey) -> bool:
    return _dispatch_has_kernel_for_dispatch_key(function.name(), key)


def _own_kernel(function: Any) -> Any:
    """An operator's kernel for CUDA, or for any device."""
    keys = (DispatchKey.CUDA, DispatchKey.CompositeExplicitAutograd)
    key = next(key for key in keys if _has_kernel(function, key))
    return functools.partial(function._op_dk, key)


@functools.cache
def _gives_a_view(function: Any) -> bool:
    aliases = [argument.alias_info for argument in function._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


@functools.cache
def _returns_what_it_writes(function: Any) -> bool:
    returned = function._schema.returns
    return bool(returned) and returned[0].alias_info is not None


def _refuse_two_devices(name: str, given: Any) -> None:
    """As CUDA's kernels do; numbers may lie anywhere."""
    tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor) and value.ndim]
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(devices))}")


def _on_host(function: Any, given: Any, *, makes_cuda: bool) -> Any:
    hosts: dict[int, Tensor] = {}  # by the id of the host's tensor, which lives on in `arguments`

    def host(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == CUDA:
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == CUDA:
            return None
        if not _is_cuda(value):
            return value
        shared = on_host(value)
        hosts[id(shared)] = value
        return shared

    arguments, options = tree_map(host, given)
    options = {name: value for name, value in options.items() if name != "pin_memory"}
    wide = function._schema.name.startswith("aten::convolution")
    result = (_widened if wide else _plainly)(function, arguments, options)
    if _returns_what_it_writes(function) and isinstance(result, Tensor):
        return hosts.get(id(result), given[0][0])

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or not makes_cuda:
            return value
        return hosts[id(value)] if id(value) in hosts else to_cuda(value)

    return tree_map(back, result)


def _plainly(function: Any, arguments: Any, options: Any) -> Any:
    return function(*arguments, **options)


def _widened(function: Any, arguments: Any, options: Any) -> Any:
    """In float32 what is narrower: oneDNN's bfloat16 of few channels goes wrong on some CPUs."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    kind = tensors[0].dtype
    if kind not in NARROW:
        return function(*arguments, **options)

    def to(dtype: torch.dtype) -> Any:
        return lambda value: value.to(dtype) if isinstance(value, Tensor) else value

    return tree_map(to(kind), function(*tree_map(to(torch.float32), arguments), **options))


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor of a CUDA tensor's memory, shape and strides."""
    storage = tensor.untyped_storage()
    if not tensor.numel() or not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = storage.nbytes() // tensor.element_size()
    flat = torch.frombuffer(memory, dtype=torch.uint8)[: whole * tensor.element_size()]
    flat = flat.view(tensor.dtype)
    shared = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return torch.conj(shared) if tensor.is_conj() else shared


def to_cuda(values: Tensor) -> Tensor:
    """A CUDA tensor with a CPU tensor's values and strides."""
    values = values.resolve_conj().resolve_neg()
    device = torch.device(CUDA, torch.cuda.current_device())
    tensor = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=device)
    on_host(tensor).copy_(values)
    return tensor


def _in_every_thread() -> None:
    run = threading.Thread.run

    def with_values(self: threading.Thread) -> None:
        with HostValues():
            run(self)

    threading.Thread.run = with_values


def _interpret_in_place() -> None:
    """Let Triton's interpreter work on the memory itself, one kernel at a time, and mend it."""
    from triton.runtime.interpreter import GridExecutor

    from tests.kernels.interpreter import mend_the_interpreter

    def host(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(host, value))
        return on_host(value) if _is_cuda(value) else value

    def in_place(self, arguments, options):
        return list(map(host, arguments)), {name: host(v) for name, v in options.items()}

    lock, call = threading.RLock(), GridExecutor.__call__

    def one_at_a_time(self, *arguments, **options):
        with lock:  # it changes Triton's language for as long as it runs
            return call(self, *arguments, **options)

    GridExecutor._init_args_hst = in_place
    GridExecutor._restore_args_dev = lambda self, *arguments: None
    GridExecutor.__call__ = one_at_a_time
    mend_the_interpreter()


def _talk_by_gloo() -> None:
    init = dist.init_process_group

    def by_gloo(backend: Any = None, *arguments: Any, **options: Any) -> None:
        options.pop("device_id", None)  # what NCCL connects at once
        init("cpu:gloo,cuda:gloo", *arguments, **options)

    dist.init_process_group = by_gloo


def _show_values() -> None:
    """Print tensors with what they hold: printing leaves the mode."""
    show = torch._tensor_str._str

    def shown(tensor: Tensor, **options: Any) -> str:
        return show(on_host(tensor.detach()) if _is_cuda(tensor) else tensor, **options)

    torch._tensor_str._str = shown
