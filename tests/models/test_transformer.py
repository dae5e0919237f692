"""The transformer encoder: frame count, padding, gate, and masking at the input of any encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.models import TransformerConfig, TransformerEncoder, build_encoder
from gmm_jepa.models.padding import frame_mask
from gmm_jepa.models.transformer import KERNELS, STRIDES, GlobalGatedBias

from .small import FULL, TRANSFORMER, ragged_batch, shake


def test_frames_and_their_places() -> None:
    config = TransformerConfig()
    assert config.hop_samples == 320
    assert config.n_frames(32_000) == 99
    assert [config.n_frames(n) for n in (0, 639, 640, 959, 960)] == [0, 0, 1, 1, 2]
    # Frame 0 sees samples 0 to 639 and lies in their middle.
    field = 1
    for kernel, stride in zip(KERNELS[::-1], STRIDES[::-1]):
        field = (field - 1) * stride + kernel
    assert field == 640
    assert config.frame_centre_samples == (field - 1) / 2


@pytest.mark.parametrize("relative_bias", [True, False])
def test_padding_changes_nothing(relative_bias: bool) -> None:
    torch.manual_seed(0)
    encoder = shake(TransformerEncoder(replace(TRANSFORMER, relative_bias=relative_bias)))
    encoder = encoder.double().eval()
    lengths = [9000, 5200, 960, 640, 639, 0]
    waveform, lengths_samples = ragged_batch(lengths, padding=float("nan"))
    padded = encoder(waveform.double(), lengths_samples)
    for row, n_samples in enumerate(lengths):
        n_frames = encoder.n_frames(n_samples)
        assert padded.lengths_frames[row] == n_frames
        assert (padded.output[row, n_frames:] == 0).all()
        if n_frames:
            alone = encoder(waveform[row : row + 1, :n_samples].double())
            for ours, theirs in zip(padded.layers, alone.layers):
                torch.testing.assert_close(ours[row, :n_frames], theirs[0], atol=1e-12, rtol=1e-10)


def test_the_gate_is_the_formula_s_and_sees_real_frames_only() -> None:
    torch.manual_seed(0)
    bias = shake(GlobalGatedBias(3, 4, n_buckets=8, max_distance=10)).double()
    q = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    gate = bias.gate(q, frame_mask(torch.tensor([5, 2]), 5))
    for row, n in enumerate((5, 2)):
        g = q[row, :, :n].mean(dim=(0, 1))
        u, r = torch.sigmoid(bias.gate_u.weight @ g), torch.sigmoid(bias.gate_r.weight @ g)
        expected = 1 + u * bias.scale * r
        torch.testing.assert_close(gate[row], expected[:, None].expand(3, 5))


@pytest.mark.parametrize("config", [FULL, TRANSFORMER], ids=["conformer", "transformer"])
def test_a_masked_frame_tells_nothing_of_itself(config) -> None:
    torch.manual_seed(0)
    encoder = shake(build_encoder(config)).eval()
    token = torch.randn(config.code_dim)
    waveform, lengths = ragged_batch([6400, 3200])
    n_frames = encoder.n_frames(6400)
    keep = torch.rand(2, n_frames) > 0.5
    masked = encoder(waveform, lengths, keep=keep, mask_token=token)
    plain = encoder(waveform, lengths)
    for row, n in enumerate(masked.lengths_frames.tolist()):
        hidden, seen = ~keep[row, :n], keep[row, :n]
        assert torch.equal(masked.layers[0][row, :n][hidden], token.expand(int(hidden.sum()), -1))
        assert torch.equal(masked.layers[0][row, :n][seen], plain.layers[0][row, :n][seen])
    everything = torch.zeros(2, n_frames, dtype=torch.bool)
    silent = encoder(waveform, lengths, keep=everything, mask_token=token)
    other = encoder(waveform.flip(1) * 3, lengths, keep=everything, mask_token=token)
    torch.testing.assert_close(silent.output, other.output)
    with pytest.raises(InputError, match="keep: expected shape"):
        encoder(waveform, lengths, keep=keep[:, 1:], mask_token=token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "code_dim: expected a multiple of heads = 5"),
        ({"layers": 0}, "layers: expected at least 1"),
        ({"n_buckets": 6}, "n_buckets: expected 4, 8"),
        ({"max_distance": 80}, "max_distance: expected more than"),
        ({"dropout": 1.0}, "dropout: expected a number in"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TRANSFORMER, **change)
