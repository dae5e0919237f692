"""Padding never changes a result: ragged batches against rows run alone and unpadded."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.models import ConformerConfig, ConformerEncoder, JepaModel
from gmm_jepa.models.padding import FrameGroupNorm, conv_length, frame_mask, zero_padding

from .small import FULL, SMALL, ragged_batch, shake

LENGTHS = [9000, 0, 1, 7, 383, 384, 703, 704, 2500, 8999, 5121, 4800]
"""Empty, below a frame (384 samples), one frame, fewer than DAAM's 8, primes and multiples."""

CONFIGS = {
    "plain": SMALL,
    "daam": replace(SMALL, daam=True),
    "bias": replace(SMALL, relative_bias=True),
    "unit_rms": replace(SMALL, unit_rms=True),
    "full": FULL,
    "odd_strides": replace(FULL, strides=(5, 2, 3)),
    "one_stage": replace(FULL, strides=(4,), channels=(3, 5)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_row_as_if_alone(config: ConformerConfig) -> None:
    check_rows(config, torch.float64, tolerance=1e-10)
    if not config.daam:
        check_rows(config, torch.float32, tolerance=1e-5)
    elif config.unit_rms:  # on quiet waveforms DAAM amplifies rounding up to 1e4 times
        check_rows(config, torch.float32, tolerance=1e-4)


def check_rows(config: ConformerConfig, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    encoder = shake(ConformerEncoder(config)).eval().to(dtype)
    lengths = [n for n in LENGTHS if n <= 3000] if len(config.strides) == 1 else LENGTHS
    waveform, lengths_samples = ragged_batch(lengths)
    waveform = waveform.to(dtype)
    with torch.no_grad():
        batch = encoder(waveform, lengths_samples)
        assert torch.equal(batch.lengths_frames, encoder.n_frames(lengths_samples))
        for row, n in enumerate(lengths):
            frames = int(batch.lengths_frames[row])
            alone = encoder(waveform[row : row + 1, :n])
            assert alone.output.shape[1] == frames
            assert (batch.output[row, frames:] == 0).all()
            for padded, single in zip(
                (batch.output, *batch.layers), (alone.output, *alone.layers), strict=True
            ):
                error = (padded[row, :frames] - single[0]).norm()
                assert error <= tolerance * single.norm()
            if frames:
                torch.testing.assert_close(batch.layer_weights[row], alone.layer_weights[0])


@pytest.mark.parametrize("padding", [0.3, 1e30, float("inf"), float("nan")])
def test_what_lies_in_the_padding_does_not_matter(padding: float) -> None:
    encoder = shake(ConformerEncoder(FULL))
    waveform, lengths = ragged_batch(LENGTHS)
    dirty = waveform.where(torch.arange(waveform.shape[1]) < lengths[:, None], padding)
    clean = encoder(waveform, lengths)
    got = encoder(dirty, lengths)
    assert torch.equal(got.output, clean.output)
    got.output.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_gradients_are_the_sum_over_rows_alone() -> None:
    model = shake(JepaModel(FULL, n_clusters=5)).double()
    lengths = [3000, 0, 380, 900, 2999, 2700]
    waveform, lengths_samples = ragged_batch(lengths)
    waveform = waveform.double()

    def gradients(rows: list[int], masked: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in [rows] if masked else [[row] for row in rows]:
            stop = None if masked else lengths[part[0]]
            z = model.encode(waveform[part, :stop], lengths_samples[part] if masked else None)
            keep = torch.arange(z.output.shape[1]).expand(z.output.shape[:2]) % 3 > 0
            prediction = model.predict(z.output, keep, z.lengths_frames if masked else None)
            logits = model.cluster_head(z.output)[(z.output != 0).any(-1)]
            (prediction.square().sum() + logits.square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together, alone = gradients([0, 1, 2, 3, 4, 5], True), gradients([0, 3, 4, 5], False)
    assert together.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-7, atol=1e-9, msg=name)


def test_rows_without_frames_give_zeros_and_zero_gradients() -> None:
    model = shake(JepaModel(FULL, n_clusters=5))
    waveform = torch.full((2, 4000), float("nan"))
    waveform[1, :100] = 0.1
    out = model.encode(waveform, torch.tensor([0, 100]))
    keep = torch.zeros(out.output.shape[:2])
    prediction = model.predict(out.output, keep, out.lengths_frames)
    assert (out.output == 0).all()
    assert (prediction == 0).all()
    assert out.layer_weights.isfinite().all()
    (prediction.sum() + out.output.sum()).backward()
    for name, parameter in model.online.named_parameters():
        assert parameter.grad is None or (parameter.grad == 0).all(), name


@pytest.mark.parametrize("n_samples", [0, 1, 5, 383])
def test_batches_shorter_than_one_frame(n_samples: int) -> None:
    model = JepaModel(FULL, n_clusters=5)
    for lengths in (None, torch.tensor([0, n_samples])):
        out = model.encode(torch.randn(2, n_samples), lengths)
        assert out.output.shape == (2, 0, FULL.code_dim)
        assert out.lengths_frames.tolist() == [0, 0]
        prediction = model.predict(out.output, torch.ones(2, 0), out.lengths_frames)
        assert prediction.shape == out.output.shape
        assert model.cluster_head(out.output).shape == (2, 0, 5)


def test_no_rows() -> None:
    out = ConformerEncoder(FULL)(torch.zeros(0, 4000), torch.zeros(0, dtype=torch.int64))
    assert out.output.shape == (0, 12, FULL.code_dim)


def test_group_norm_of_valid_frames() -> None:
    norm = shake(FrameGroupNorm(6))
    x = 5 + torch.randn(3, 9, 6)
    lengths = torch.tensor([9, 4, 1])
    mask = frame_mask(lengths, 9)
    dirty = zero_padding(x, mask) + 77 * (1 - mask.keep)
    got = norm(dirty, mask)
    for row, n in enumerate(lengths):
        alone = x[row : row + 1, :n].transpose(1, 2)
        expected = F.group_norm(alone, 1, norm.weight, norm.bias).transpose(1, 2)
        torch.testing.assert_close(got[row : row + 1, :n], expected)
        whole = norm(x[row : row + 1, :n], None)
        torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize(
    ("offset", "scale"),
    [(0, 1), (0, 1e-4), (100, 1), (1e4, 1)],
    ids=["plain", "small", "far", "farther"],
)
def test_group_norm_of_each_row_is_that_of_the_row_alone(offset: float, scale: float):
    """In float32, rubbish behind the rows, at most twice as far from float64 as without padding."""
    norm = shake(FrameGroupNorm(6))
    exact = copy.deepcopy(norm).double()
    lengths = torch.tensor([9, 4, 1, 0])
    mask = frame_mask(lengths, 9)
    x = offset + scale * torch.randn(4, 9, 6)
    x = torch.where(mask.keep > 0, x, 1e30)
    cotangent = torch.randn(4, 9, 6)

    def results(x: Tensor, norm: FrameGroupNorm, *, padded: bool) -> list[Tensor]:
        x = x.clone().requires_grad_()
        rows = norm(x, mask) if padded else [norm(x[i : i + 1, :n], None)[0] for i, n in real]
        outputs = [rows[i][:n] for i, n in real]
        loss = sum((out * cotangent[i, :n]).sum() for out, (i, n) in zip(outputs, real))
        return [*outputs, *torch.autograd.grad(loss, (x, norm.weight, norm.bias))]

    real = [(i, int(n)) for i, n in enumerate(lengths) if n]
    peer = results(x, norm, padded=False)
    oracle = results(x.double(), exact, padded=False)
    for got, p, e in zip(results(x, norm, padded=True), peer, oracle, strict=True):
        error, of_peer = (got - e).abs().max(), (p - e).abs().max()
        assert error <= 2 * of_peer + 1e-6 * e.abs().max()


def test_length_formula_is_the_convolutions() -> None:
    for kernel, stride, padding in [(7, 1, 3), (16, 8, 4), (10, 5, 2)]:
        options = {"stride": stride, "padding": padding}
        for n in (16, 17, 63, 64, 65):
            y = F.conv1d(torch.zeros(1, 1, n), torch.zeros(1, 1, kernel), **options)
            assert conv_length(n, kernel, **options) == y.shape[-1]
            assert conv_length(torch.tensor([n]), kernel, **options).item() == y.shape[-1]
