"""The teacher's exponential moving average of the student, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops import lists


def ema_update(teacher: list[Tensor], student: list[Tensor], decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, tensor by tensor, in place.

    Args:
        teacher: floating-point tensors, changed in place; none requires a gradient.
        student: tensors of the same shapes, types and devices, left as they are.
        decay: 0 (copy the student) to 1 (leave the teacher).

    Raises:
        InputError: the lists do not match, or `decay` is outside 0..1.
    """
    if not 0.0 <= decay <= 1.0:
        raise InputError(f"decay: expected 0 to 1, got {decay}")
    if len(teacher) != len(student):
        raise InputError(
            f"student: expected as many tensors as the teacher's {len(teacher)}, got {len(student)}"
        )
    for i, (t, s) in enumerate(zip(teacher, student)):
        if t.shape != s.shape or t.dtype != s.dtype or t.device != s.device:
            raise InputError(
                f"student[{i}]: expected {t.dtype} {tuple(t.shape)} on {t.device}, "
                f"got {s.dtype} {tuple(s.shape)} on {s.device}"
            )
    if teacher:
        _ema_update(list(teacher), [s.detach() for s in student], float(decay))


@torch.library.custom_op("gmm_jepa::ema_update", mutates_args=("teacher",))
def _ema_update(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    if lists.are_native([*teacher, *student]):
        return lists.move_towards(teacher, student, 1.0 - decay)
    torch._foreach_lerp_(list(teacher), list(student), 1.0 - decay)


@_ema_update.register_fake
def _(teacher, student, decay):
    return None
