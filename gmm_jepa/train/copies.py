"""Batches on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.objectives.batch import MaskedBatch


class Copies:
    """Copies batches to a device; to a GPU on a stream of its own, beside what it computes.

    The processor runs ahead of the GPU, so the copy of a batch is under way while the step before
    is computed; only the step that needs it waits, on the GPU.

    Args:
        device: where the batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: MaskedBatch) -> MaskedBatch:
        """The batch on the device."""
        if self._stream is None:
            return MaskedBatch(*(tensor.to(self._device) for tensor in batch))
        with torch.cuda.stream(self._stream):
            copied = MaskedBatch(
                *(_pinned(tensor).to(self._device, non_blocking=True) for tensor in batch)
            )
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in copied:
            tensor.record_stream(computing)  # its memory is not given away before
        return copied


def _pinned(tensor: Tensor) -> Tensor:
    """In page-locked memory, from which a copy does not hold the processor up."""
    return tensor if tensor.is_pinned() else tensor.pin_memory()
