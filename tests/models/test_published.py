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

from .small import FULL, SMALL, TRANSFORMER, shake

KINDS = {
    "conformer": (FULL, {}),
    "conformer without DAAM": (SMALL, {}),
    "conformer without position bias": (replace(FULL, relative_bias=False), {}),
    "transformer": (TRANSFORMER, {}),
    "WavLM-style": (
        replace(FULL, aggregation="last"),
        {"cluster_head": "linear", "predicts": False},
    ),
}


def write(folder: Path, model: JepaModel, change: Any = None) -> tuple[Path, Path]:
    checkpoint, config = folder / "checkpoint.pt", folder / "config.json"
    states = export_published(model)
    if change is not None:
        states["online"] = {name: tensor.clone() for name, tensor in states["online"].items()}
        change(states)
    torch.save(states, checkpoint)
    config.write_text(json.dumps(published_config(model)))
    return checkpoint, config


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, kind: str) -> None:
    config, options = KINDS[kind]
    model = shake(JepaModel(config, n_clusters=5, **options))
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
    with pytest.raises(InputError, match=r"expected kind jepa_conformer or .*, got 'wavlm'"):
        load_published(checkpoint, config)


def test_a_model_without_a_published_kind_is_refused() -> None:
    nearest = "no published kind is like it; the nearest, jepa_conformer, has "
    with pytest.raises(InputError, match=nearest + "the cluster head mlp, not linear"):
        export_published(JepaModel(SMALL, n_clusters=5, cluster_head="linear"))
    with pytest.raises(InputError, match=nearest + "aggregation attention, not last"):
        export_published(JepaModel(replace(SMALL, aggregation="last"), n_clusters=5))


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    checkpoint, config = write(tmp_path, JepaModel(SMALL, n_clusters=5))
    torch.save([1, 2], checkpoint)
    with pytest.raises(InputError, match="expected a dictionary, got list"):
        load_published(checkpoint, config)
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not readable"):
        load_published(checkpoint, config)
    with pytest.raises(InputError, match="no such file"):
        load_published(tmp_path / "absent.pt", config)
