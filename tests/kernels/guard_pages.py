"""Tensors between pages that nobody may touch, and a process that may die of them.

Triton's interpreter reads and writes real addresses, but mostly ones that belong to the process:
what a kernel reads beside its inputs goes unseen. Against a guard page it is a segmentation fault.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

PROT_NONE = 0  # mmap has no name for it
ROOT = Path(__file__).parents[2]
CHILD = """
import importlib, sys
module, function = sys.argv[1].split(":")
getattr(importlib.import_module(module), function)(*sys.argv[2:])
"""


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """A dense copy that begins right behind a guard page, or ends right before one.

    What is left of its pages is filled with bytes of 255: NaN in any floating type.
    """
    n_bytes = max(1, tensor.numel()) * tensor.element_size()
    n_pages = -(-n_bytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (n_pages + 2) * mmap.PAGESIZE)
    memory.write(b"\xff" * len(memory))
    last = (n_pages + 1) * mmap.PAGESIZE
    offset = last - n_bytes if at_end else mmap.PAGESIZE
    count = max(1, tensor.numel())
    dense = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (begin, begin + last):
        if libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return dense[: tensor.numel()].view(tensor.shape).copy_(tensor)


def run_in_child(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls `target`, "module:function", with `arguments` in a process of its own, interpreted."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, target, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@triton.jit
def _copy_one_kernel(x_ptr, out_ptr, index):
    tl.store(out_ptr, tl.load(x_ptr + index))


def read_beside(side: str) -> None:
    """A kernel reads one element too far: the process dies."""
    x, out = guarded(torch.zeros(1024), at_end=side == "end"), torch.empty(1)
    _copy_one_kernel[(1,)](x, out, len(x) if side == "end" else -1)
