"""Against the published code: outputs, losses and every gradient of its small golden models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gmm_jepa.models import JepaModel, export_published, load_published
from gmm_jepa.models.layouts import layout_of
from gmm_jepa.models.published import published_config, to_published

safetensors = pytest.importorskip("safetensors.torch")

KL_WEIGHT = 0.7
ZERO_BY_MATHEMATICS = re.compile(r"^layer_attention\.k_proj\.bias$|^layers\.\d\.k_proj\.bias$")
EXACT = ("conformer_plain", "transformer")
VARIANTS = ["conformer_plain", "conformer_daam_relpos", "transformer", "wavlm_style"]


class Golden(NamedTuple):
    folder: Path
    model: JepaModel
    io: dict[str, Tensor]


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    folder = shared / "golden" / request.param
    model = load_published(folder / "portable_step7.pt", folder / "config.json")
    return Golden(folder, model, safetensors.load_file(folder / "io.safetensors"))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def forward(golden: Golden, lengths: Tensor | None) -> dict[str, Tensor]:
    model, io = golden.model, golden.io
    waveform, keep = io["wav"][:, 0], io["mask_keep"]
    if model.predictor is None:
        return forward_wavlm_style(model, io, lengths)
    z = model.encode(waveform, lengths).output
    target = model.teach(waveform, lengths).output
    prediction = model.predict(z, keep, None if lengths is None else torch.full((3,), 99))
    logits = model.cluster_head(z)
    masked = keep == 0
    jepa = (prediction - target)[masked].square().mean()
    p = io["posteriors"][masked]
    kl = (p * (p.clamp(min=1e-30).log() - logits[masked].log_softmax(-1))).sum(-1).mean()
    return {
        "z_online": z.transpose(1, 2),
        "z_target": target.transpose(1, 2),
        "z_pred": prediction.transpose(1, 2),
        "cluster_logits": logits,
        "loss_jepa": jepa,
        "loss_kl": kl,
        "loss_total": jepa + KL_WEIGHT * kl,
    }


def forward_wavlm_style(
    model: JepaModel, io: dict[str, Tensor], lengths: Tensor | None
) -> dict[str, Tensor]:
    keep = io["mask_keep"]
    features = model.encode(io["wav"][:, 0], lengths, keep=keep).output
    logits = model.cluster_head(features)
    masked = keep == 0
    loss = torch.nn.functional.cross_entropy(logits[masked], io["labels"][masked].long())
    return {"features": features, "logits": logits, "loss": loss}


@pytest.mark.parametrize("masks", [False, True], ids=["whole", "masks"])
def test_outputs_losses_and_gradients(golden: Golden, masks: bool) -> None:
    lengths = torch.full((3,), 32000) if masks else None
    golden.model.zero_grad()
    results = forward(golden, lengths)
    for name, got in results.items():
        assert relative_error(got.detach(), golden.io[name]) < 1e-4, name

    results.get("loss_total", results.get("loss")).backward()
    gradients = {k: p.grad for k, p in golden.model.named_parameters() if p.grad is not None}
    got = to_published(gradients, layout_of(golden.model))
    expected = {k[5:]: v for k, v in golden.io.items() if k.startswith("grad.")}
    assert got.keys() == expected.keys()
    noise = [k for k in got if ZERO_BY_MATHEMATICS.match(k)]
    for name in noise:
        assert (got.pop(name) - expected.pop(name)).abs().max() < 1e-7
    plain = golden.folder.name in EXACT
    for name in got:
        assert relative_error(got[name], expected[name]) < (1e-3 if plain else 0.15), name
    together = [torch.cat([g[k].flatten() for k in got]) for g in (got, expected)]
    assert relative_error(*together) < (1e-3 if plain else 2e-2)


def test_teacher_layers(golden: Golden) -> None:
    if "target_layer_0" not in golden.io:
        pytest.skip("the golden data hold no teacher's layers for this kind")
    with torch.no_grad():
        layers = golden.model.teacher(golden.io["wav"][:, 0]).layers
    assert len(layers) == 3
    for i, layer in enumerate(layers):
        expected = golden.io[f"target_layer_{i}"]
        assert relative_error(layer.transpose(1, 2), expected) < 1e-4


def test_export_is_exact_and_total(golden: Golden) -> None:
    published = torch.load(golden.folder / "portable_step7.pt", weights_only=True)
    exported = export_published(golden.model, step=7, total_seconds=123.5)
    assert exported.keys() == published.keys()
    assert (exported["step"], exported["total_seconds"]) == (7, 123.5)
    for part in set(published) - {"step", "total_seconds"}:
        assert exported[part].keys() == published[part].keys()
        for name, tensor in published[part].items():
            assert exported[part][name].dtype == tensor.dtype
            assert torch.equal(exported[part][name], tensor), name


def test_config_comes_back(golden: Golden) -> None:
    published = json.loads((golden.folder / "config.json").read_text())
    ours = published_config(golden.model)
    expected = {name: published[name] for name in ours if name in published}
    assert {name: ours[name] for name in expected} == expected
    assert set(ours) <= set(published)
