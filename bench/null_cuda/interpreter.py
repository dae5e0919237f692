"""What Triton's interpreter lacks for kernels with loops over loaded bounds, and for bf16 products.

Its tensors hold scalars as arrays of one element, which NumPy 2.4 no longer takes for an index,
and bf16 as the bits of integers, which its product multiplies as such.
"""

from __future__ import annotations

import numpy as np


def mend_the_interpreter() -> None:
    """Let interpreted kernels loop to a bound from memory and multiply bf16 matrices."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    if getattr(patch, "mended", False):
        return

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def wide(matrix):
        if matrix.dtype.scalar != bfloat16:
            return matrix
        bits = matrix.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), float32)

    dot = builder.create_dot
    patched.mended = True
    interpreter._patch_lang_tensor = patched
    builder.create_dot = lambda self, a, b, *others: dot(self, wide(a), wide(b), *others)
