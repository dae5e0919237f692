"""The trained part: recurrent layers, pooling, weighted sum, augmentation, batches."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gmm_jepa.downstream.augment import SpecAugment
from gmm_jepa.downstream.fit import train_batches
from gmm_jepa.downstream.model import BidirectionalLstm, CtcHead, PooledHead, Probe
from gmm_jepa.downstream.settings import AugmentSettings, settings_for
from gmm_jepa.downstream.tasks import Recognition

LENGTHS = torch.tensor([9, 1, 6])


def padded(width: int = 5, *, padding: float = 0.0) -> torch.Tensor:
    x = torch.randn(3, 9, width)
    for row, n in zip(x, LENGTHS):
        row[n:] = padding
    return x


def real(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(x, LENGTHS)])


def test_two_lstms_are_pytorchs_bidirectional_one_on_a_packed_batch():
    ours, theirs = BidirectionalLstm(5, 4), nn.LSTM(5, 4, batch_first=True, bidirectional=True)
    for name, parameter in theirs.named_parameters():
        side = ours.back if name.endswith("_reverse") else ours.ahead
        side.get_parameter(name.removesuffix("_reverse")).data.copy_(parameter.data)
    x = padded(padding=99.0)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(theirs(packed)[0], batch_first=True)
    torch.testing.assert_close(real(ours(x, LENGTHS)), real(expected))


@pytest.mark.parametrize("kind", ["ctc", "pooled"])
def test_padding_changes_no_answer(kind):
    if kind == "ctc":
        head = CtcHead(5, 7, projection=6, rnn_layers=2, rnn_width=4, dropout=0.3)
    else:
        head = PooledHead(5, 7, projection=6)
    probe = Probe(2, head, None).eval()
    x = padded()
    layers = torch.stack([x, 2 * x], dim=2)
    longer = nn.functional.pad(layers, (0, 0, 0, 0, 0, 4))
    made, other = probe(layers, LENGTHS), probe(longer, LENGTHS)
    if kind == "ctc":
        made, other = real(made), real(other)
    torch.testing.assert_close(made, other)


def test_layers_are_summed_evenly_at_the_start_and_their_weights_learn():
    probe = Probe(2, PooledHead(5, 3, projection=6), None)
    assert probe.layer_weights == [0.5, 0.5]
    x = padded()
    once = probe(torch.stack([x, 3 * x], dim=2), LENGTHS)
    twice = probe(torch.stack([2 * x, 2 * x], dim=2), LENGTHS)
    torch.testing.assert_close(once, twice)
    once.square().sum().backward()
    assert probe.weights.grad.abs().min() > 0


def test_pooling_is_a_mean_over_real_frames():
    head = PooledHead(5, 3, projection=6)
    x = padded(padding=7.0)
    for row, n, made in zip(x, LENGTHS, head(x, LENGTHS)):
        expected = head.classify(head.project(row[:n]).mean(0))
        torch.testing.assert_close(made, expected)


def test_superbs_head_has_superbs_size():
    probe = Recognition().build(13, 768, settings_for("asr", "superb"))
    linear = 768 * 1024 + 1024 + 2048 * 32 + 32
    lstm = sum(2 * 4 * 1024 * (width + 1024 + 2) for width in (1024, 2048))
    assert sum(p.numel() for p in probe.parameters()) == 13 + linear + lstm


def test_ctc_reads_greedily():
    task = Recognition()
    a, b, bar = task.vocabulary.encode("AB")[:3]
    path = [a, a, 0, a, b, b, 0, bar, bar, 2]
    logits = nn.functional.one_hot(torch.tensor([path, path]), 32).float()
    assert task.read(logits, torch.tensor([10, 3])) == ["AAB", "A"]


def test_masks_stay_inside_and_below_their_widths():
    settings = AugmentSettings(time_warp_frames=0, time_mask_frames=4, channel_mask_width=6)
    augment = SpecAugment(settings, seed=0)
    x, lengths = torch.ones(2, 60, 40), torch.tensor([60, 20])
    hidden_frames, hidden_channels = set(), set()
    for _ in range(50):
        made = augment(x, lengths)
        assert made.shape == x.shape
        assert set(made.unique().tolist()) <= {0.0, 1.0}
        assert not made[1, 20:].any()
        for row, n in zip(made, lengths.tolist()):
            hidden_frames.add(int((row[:n] == 0).all(1).sum()))
            hidden_channels.add(int((row[:n] == 0).all(0).sum()))
    assert max(hidden_frames) <= 2 * 3
    assert max(hidden_channels) <= 4 * 5
    assert len(hidden_frames) > 3
    assert len(hidden_channels) > 5
    assert x.min() == 1


def test_a_share_bounds_the_masks():
    augment = SpecAugment(AugmentSettings(time_warp_frames=0, mask_share=0.1), seed=0)
    made = torch.cat([augment(torch.ones(1, 40, 20), torch.tensor([40])) for _ in range(20)])
    assert (made == 0).all(2).sum(1).max() <= 2 * 4
    assert (made == 0).all(1).sum(1).max() <= 4 * 2


def test_warping_moves_frames_and_keeps_their_order():
    settings = AugmentSettings(time_masks=0, channel_masks=0)
    x = torch.arange(50.0)[None, :, None].expand(1, 50, 3).clone().requires_grad_()
    augment = SpecAugment(settings, seed=0)
    moved = 0.0
    for _ in range(10):
        made = augment(x, torch.tensor([50]))
        assert made.shape == x.shape
        assert (made[0].diff(dim=0) > -0.2).all()
        assert (made - x).abs().max() <= 8
        moved += (made - x).abs().max().item()
    assert moved > 5
    made.sum().backward()
    torch.testing.assert_close(augment(x[:, :8], torch.tensor([8])), x[:, :8])  # too short


@pytest.mark.parametrize("by_length", [True, False])
def test_every_utterance_once_an_epoch(by_length):
    lengths = np.array([5, 1, 9, 4, 7, 2, 8])
    batches = list(islice(train_batches(lengths, 3, by_length, 0), 9))
    for epoch in (batches[:3], batches[3:6], batches[6:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(7))
    if by_length:
        assert {frozenset(b) for b in batches} == {
            frozenset({1, 5, 3}),
            frozenset({0, 4, 6}),
            frozenset({2}),
        }
    assert batches == list(islice(train_batches(lengths, 3, by_length, 0), 9))
    assert batches[:3] != batches[3:6] or batches[3:6] != batches[6:]
