"""Values of CUDA tensors computed on the CPU, on the tensors' own memory, which is the host's."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = "cuda", torch.device("cpu")
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
NARROW = (torch.bfloat16, torch.float16)
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
INDEXED += ("aten::_unsafe_index", "aten::_unsafe_index_put")
"""Operations on a CUDA tensor that take indices from a CPU."""
NO_KERNEL = {"aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided"}
NO_KERNEL |= {"aten::is_pinned", "aten::new_empty", "aten::new_empty_strided", "aten::resize_"}
NO_KERNEL |= {"aten::record_stream", "aten::set_", "aten::squeeze_", "aten::unsqueeze_", "aten::t_"}
NO_KERNEL |= {"aten::transpose_", "aten::as_strided_", "aten::resize_as_"}
"""Operations that give or take memory, or change a tensor's shape, and launch nothing."""


def compute_on_the_host() -> None:
    """From now on, in all threads: torch's operations and Triton's kernels; gloo for NCCL."""
    HostValues().__enter__()
    _in_every_thread()
    _interpret_in_place()
    _talk_by_gloo()
    _show_values()


class HostValues(TorchDispatchMode):
    """Runs the CPU's kernel in place of CUDA's, on the same memory.

    The package's own operators, and those of other libraries, keep their CUDA kernels; what those
    call comes here.
    """

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = (arguments, options)
        name = function._schema.name
        if any(issubclass(kind, FakeTensor) for kind in types):  # it has no values
            return function(*arguments, **options)
        if any(kind not in PLAIN for kind in types):  # a distributed tensor does its part first
            return NotImplemented
        if not _is_on_cuda(given) or name in NO_KERNEL:
            return function(*arguments, **options)
        if function.namespace not in ("aten", "prims", "c10d", "_c10d_functional"):
            with self:
                return _own_kernel(function)(*arguments, **options)
        if _has_kernel(function, DispatchKey.CompositeImplicitAutograd):
            with self:
                return function.decompose(*arguments, **options)
        if _gives_a_view(function):
            return function(*arguments, **options)
        _check_devices(name, given)
        return _on_host(function, given)


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
    for key in (DispatchKey.CUDA, DispatchKey.CompositeExplicitAutograd):
        if _has_kernel(function, key):
            return functools.partial(function._op_dk, key)
    raise NotImplementedError(f"{function.name()} has no kernel for CUDA")


@functools.cache
def _gives_a_view(function: Any) -> bool:
    aliases = [argument.alias_info for argument in function._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _check_devices(name: str, given: Any) -> None:
    """Refuse tensors of two devices as CUDA's kernels do; numbers may lie on a CPU."""
    tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
    if name in INDEXED:
        tensors = tensors[:1]
        if not _is_cuda(tensors[0]):
            raise RuntimeError(f"{name}: indices on CUDA for a tensor on the CPU")
    devices = {str(t.device) for t in tensors if t.ndim or t.device.type == CUDA}
    if len(devices) > 1 and name not in COPIES:
        raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(devices))}")


def _on_host(function: Any, given: Any) -> Any:
    memory: dict[int, Tensor] = {}
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the host's: that, and CUDA's

    def host(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == CUDA:
            return CPU
        if isinstance(value, torch.Generator) and value.device.type == CUDA:
            return _generator(value)
        if not _is_cuda(value):
            return value
        on_cpu = on_host(value, memory)
        shared[id(on_cpu)] = (on_cpu, value)
        return on_cpu

    arguments, options = tree_map(host, given)
    options = {name: value for name, value in options.items() if name != "pin_memory"}
    result = _computed(function, arguments, options)
    for on_cpu, value in shared.values():
        if on_cpu.shape != value.shape:  # an `out` that was too small
            value.resize_(on_cpu.shape)
            on_host(value).copy_(on_cpu)
    device = _device_of_result(given)

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in shared:
            return shared[id(value)][1]
        return value if device is None else to_cuda(value, device)

    return tree_map(back, result)


def _device_of_result(given: Any) -> torch.device | None:
    """What is asked for, else where the first CUDA tensor is; None: the CPU."""
    asked = given[1].get("device")
    if asked is None:
        return next(value.device for value in tree_leaves(given) if _is_cuda(value))
    device = torch.device(asked)
    if device.type != CUDA:
        return None
    return device if device.index is not None else torch.device(CUDA, torch.cuda.current_device())


def _generator(of_cuda: torch.Generator) -> torch.Generator:
    """A CPU's with the same seed and place, which moves on as one for CUDA does."""
    seed, offset = of_cuda.initial_seed(), of_cuda.get_offset()
    of_cuda.set_offset(offset + 4)
    return torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * offset) % (1 << 63))


def _computed(function: Any, arguments: Any, options: Any) -> Any:
    """The CPU's result; of a convolution of 16 bits that in float32, rounded.

    oneDNN's bfloat16 of few channels goes wrong on some CPUs.
    """
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    is_convolution = function._schema.name.startswith("aten::convolution")
    if is_convolution and tensors[0].dtype in NARROW:
        wide = functools.partial(_cast, dtype=torch.float32)
        result = function(*tree_map(wide, arguments), **options)
        return tree_map(functools.partial(_cast, dtype=tensors[0].dtype), result)
    result = function(*arguments, **options)
    if function.namespace == "_c10d_functional" and isinstance(result, Tensor):
        return torch.ops._c10d_functional.wait_tensor(result)
    return result


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def on_host(tensor: Tensor, memory: dict[int, Tensor] | None = None) -> Tensor:
    """A CPU tensor of a CUDA tensor's memory, shape and strides.

    Args:
        tensor: any, empty or not.
        memory: bytes of storages by their address: tensors that share one on CUDA then share one.
    """
    storage = tensor.untyped_storage()
    if not tensor.numel() or not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = {} if memory is None else memory
    if storage.data_ptr() not in memory:
        address = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        memory[storage.data_ptr()] = torch.frombuffer(address, dtype=torch.uint8)
    whole = storage.nbytes() // tensor.element_size() * tensor.element_size()
    flat = memory[storage.data_ptr()][:whole].view(tensor.dtype)
    values = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    values = torch.conj(values) if tensor.is_conj() else values
    return torch._neg_view(values) if tensor.is_neg() else values


def to_cuda(values: Tensor, device: torch.device) -> Tensor:
    """A CUDA tensor with a CPU tensor's values and strides."""
    values = values.resolve_conj().resolve_neg()
    tensor = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=device)
    on_host(tensor).copy_(values)
    return tensor


def _in_every_thread() -> None:
    start = threading.Thread.start

    def with_values(self: threading.Thread) -> None:
        run = self.run

        def run_with_values() -> None:
            with HostValues():
                run()

        self.run = run_with_values
        start(self)

    threading.Thread.start = with_values


def _interpret_in_place() -> None:
    """Let Triton's interpreter work on the memory itself, one kernel at a time, and mend it."""
    from triton.runtime.interpreter import GridExecutor

    from bench.null_cuda.interpreter import mend_the_interpreter

    def host(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(host, value))
        if isinstance(value, Tensor) and not _is_cuda(value):
            raise ValueError("a kernel was given a tensor on the CPU, which no GPU can read")
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
        if type(tensor) not in PLAIN or not _is_cuda(tensor):
            return show(tensor, **options)
        return f"{show(on_host(tensor.detach()), **options)} on {tensor.device}"

    torch._tensor_str._str = shown
