"""The published checkpoint layout without golden files: round trips and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.models import JepaModel, export_published, load_published
from gmm_jepa.models.published import published_config

from .small import FULL, SMALL, shake


def write(folder: Path, model: JepaModel, change: Any = None) -> tuple[Path, Path]:
    checkpoint, config = folder / "checkpoint.pt", folder / "config.json"
    states = export_published(model)
    if change is not None:
        states["online"] = {name: tensor.clone() for name, tensor in states["online"].items()}
        change(states)
    torch.save(states, checkpoint)
    config.write_text(json.dumps(published_config(model)))
    return checkpoint, config


@pytest.mark.parametrize("config", [SMALL, FULL, replace(FULL, relative_bias=False)])
def test_round_trip(tmp_path: Path, config: Any) -> None:
    model = shake(JepaModel(config, n_clusters=5))
    loaded = load_published(*write(tmp_path, model))
    assert loaded.config == config
    assert loaded.n_clusters == 5
    assert not loaded.training
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["online"].pop("proj.bias"), "proj.bias is missing"),
        (lambda s: s["online"].update(extra=torch.zeros(1)), "extra is not part of this model"),
        (lambda s: s["online"].update({"proj.bias": torch.zeros(3)}), "proj.bias: expected shape"),
        (
            lambda s: s["online"]["conformers.1.rel_pos_bias.gate_u_vec"].add_(1),
            "differs from the shared rel_pos_bias.gate_u_vec",
        ),
        (lambda s: s.pop("target"), "expected entries online and target"),
    ],
)
def test_refusals(tmp_path: Path, change: Any, message: str) -> None:
    paths = write(tmp_path, JepaModel(FULL, n_clusters=5), change)
    with pytest.raises(InputError, match=message):
        load_published(*paths)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    checkpoint, config = write(tmp_path, JepaModel(SMALL, n_clusters=5))
    config.write_text(json.dumps({"kind": "wavlm"}))
    with pytest.raises(InputError, match="expected kind 'jepa_conformer', got 'wavlm'"):
        load_published(checkpoint, config)
