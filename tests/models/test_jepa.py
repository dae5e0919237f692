"""The JEPA model as training uses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.models import ConformerEncoder, JepaModel

from .small import FULL, SMALL, ragged_batch, shake


def loss_of(model: JepaModel, lengths: list[int]) -> torch.Tensor:
    waveform, lengths_samples = ragged_batch(lengths)
    out = model.encode(waveform, lengths_samples)
    target = model.teach(waveform, lengths_samples).output
    keep = torch.rand(out.output.shape[:2]) > 0.5
    prediction = model.predict(out.output, keep, out.lengths_frames)
    logits = model.cluster_head(out.output)
    return (prediction - target).float().square().mean() + logits.float().square().mean()


def test_frames_of_the_published_strides() -> None:
    encoder = ConformerEncoder(SMALL)
    assert encoder.hop_samples == 320
    assert encoder.frame_centre_samples == 191.5
    for n in (0, 1, 383, 384, 703, 704, 16000, 32000):
        frames = encoder(torch.randn(1, n)).output.shape[1]
        assert encoder.n_frames(n) == frames
        assert encoder.n_frames(torch.tensor([n])).tolist() == [frames]
    assert encoder.n_frames(32000) == 99


def test_one_seed_one_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(JepaModel(FULL, n_clusters=5).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_teacher_starts_as_the_online_encoder_and_follows_it() -> None:
    model = JepaModel(FULL, n_clusters=5)
    waveform, lengths = ragged_batch([4000, 3000])
    model.eval()
    z = model.encode(waveform, lengths).output
    torch.testing.assert_close(model.teach(waveform, lengths).output, z)
    before = [p.clone() for p in model.teacher.parameters()]
    shake(model.online)
    model.update_teacher(0.9)
    for old, new, online in zip(before, model.teacher.parameters(), model.online.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_teacher_takes_no_gradient_and_no_dropout() -> None:
    model = JepaModel(replace(FULL, dropout=0.5), n_clusters=5).train()
    assert model.online.training
    assert not any(module.training for module in model.teacher.modules())
    waveform, lengths = ragged_batch([4000, 3000])
    target = model.teach(waveform, lengths).output
    assert not target.requires_grad
    assert torch.equal(target, model.teach(waveform, lengths).output)
    first, second = (model.encode(waveform, lengths).output for _ in range(2))
    assert not torch.equal(first, second)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    """What DDP asks of a model without find_unused_parameters."""
    model = JepaModel(FULL, n_clusters=5)
    loss_of(model, [8000, 5000, 0]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    unused = {n for n in frozen if not n.startswith("teacher.")}
    assert unused == {
        f"online.aggregation.{layer}.{kind}"
        for layer in ("v_proj", "out_proj")
        for kind in ("weight", "bias")
    }


def test_predictor_sees_the_token_where_frames_are_masked() -> None:
    model = JepaModel(FULL, n_clusters=5).eval()
    z = torch.randn(1, 12, FULL.code_dim)
    keep = torch.arange(12)[None] % 2 == 0
    changed = torch.where(keep[..., None], z, torch.randn_like(z))
    got = model.predict(z, keep)
    assert torch.equal(got, model.predict(changed, keep))
    assert torch.equal(got, model.predict(z, keep.float()))
    assert not torch.equal(got, model.predict(z, torch.ones(1, 12)))


def test_bfloat16_autocast() -> None:
    model = JepaModel(FULL, n_clusters=5)
    waveform, lengths = ragged_batch([8000, 5000, 0, 500])
    full = model.encode(waveform, lengths).output.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model.encode(waveform, lengths)
        loss = loss_of(model, [8000, 5000, 0, 500])
    assert out.output.dtype == torch.float32
    assert (out.output - full).norm() / full.norm() < 0.03
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_without_breaks(masked: bool) -> None:
    encoder = ConformerEncoder(replace(FULL, residual_blocks=1, layers=1))
    waveform, lengths = ragged_batch([4000, 3000])
    arguments = (waveform, lengths) if masked else (waveform,)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments).output, encoder(*arguments).output)


def test_refusals() -> None:
    model = JepaModel(SMALL, n_clusters=5)
    with pytest.raises(InputError, match="waveform: expected a float tensor"):
        model.encode(torch.zeros(1, 4000, dtype=torch.int16))
    with pytest.raises(InputError, match="lengths_samples: expected one length a row"):
        model.encode(torch.zeros(2, 4000), torch.tensor([4000]))
    with pytest.raises(InputError, match="keep: expected shape"):
        model.predict(torch.zeros(1, 5, 16), torch.ones(1, 4))
    with pytest.raises(InputError, match="n_clusters"):
        JepaModel(SMALL, n_clusters=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (4, 8)}, "channels: expected one more entry"),
        ({"strides": (8, 8, 1)}, "strides of at least 2"),
        ({"heads": 3}, "multiple of heads = 3"),
        ({"code_dim": 18, "heads": 2}, "multiple of 4"),
        ({"conv_kernel": 4}, "odd"),
        ({"n_buckets": 10}, "n_buckets"),
        ({"max_distance": 80}, "max_distance"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": 0}, "layers"),
    ],
)
def test_config_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL, **change)
