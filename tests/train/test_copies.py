"""Batches arrive as they were sent."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa.objectives.batch import MaskedBatch
from gmm_jepa.train.copies import Copies


def drawn() -> MaskedBatch:
    waveform = torch.randn(2, 40_000)
    keep = torch.rand(2, 99) < 0.5
    rows = (~keep).flatten().nonzero().squeeze(1)
    weights = torch.rand(len(rows))
    lengths = torch.tensor([40_000, 31_000])
    return MaskedBatch(waveform, -waveform, lengths, keep, rows, weights, rows, weights, rows)


def test_on_a_cpu_nothing_is_copied():
    batch = drawn()
    for sent, arrived in zip(batch, Copies(torch.device("cpu"))(batch)):
        assert arrived is sent


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_are_whole_while_the_gpu_is_busy_and_memory_is_used_again():
    device = torch.device("cuda", 0)
    copies, busy = Copies(device), torch.randn(4096, 4096, device=device)
    sent = [drawn() for _ in range(8)]
    sums = []
    for batch in sent:
        torch.mm(busy, busy)  # keeps the computing stream behind the copies
        sums.append([tensor.double().sum() for tensor in copies(batch)])
    for batch, found in zip(sent, sums):
        for tensor, total in zip(batch, found):
            torch.testing.assert_close(total.cpu(), tensor.double().sum())
