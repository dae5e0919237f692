"""Checkpoints of the published code (arXiv 2602.09040): read them, and write them back whole.

The published layout holds ``online`` (encoder and heads) and ``target`` (the encoder alone), or
``model`` where there is no teacher, beside ``step`` and ``total_seconds``. Names differ from ours
by `gmm_jepa.models.layouts`; 1x1 convolutions are linear layers here, DAAM's four chunks are rows
of one tensor, and the shared position bias, of which the published layout keeps a copy under every
block, is stored once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json
from gmm_jepa.models.build import EncoderConfig
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.models.layouts import LAYOUTS, Layout, layout_of
from gmm_jepa.tensor_files import read_state

_BIAS = "rel_pos_bias."


def load_published(checkpoint: str | Path, config: str | Path) -> JepaModel:
    """Read a published checkpoint (.pt) and its config (.json); nothing is unpickled.

    Raises:
        InputError: the checkpoint holds no model, the config is of an unknown kind, or the one
            does not fit the other; the message names the parameter.
    """
    states = read_states(checkpoint)
    if not {"online", "model"} & set(states):
        raise InputError(f"{checkpoint}: not a published model (has {', '.join(map(str, states))})")
    settings = _read_settings(config)
    layout = LAYOUTS[settings["kind"]]
    model = JepaModel(
        config_from_published(settings),
        n_clusters=settings[layout.n_clusters],
        cluster_head=layout.cluster_head,
        predicts=layout.predicts,
    )
    parts = ("online", "target") if layout.predicts else ("model",)
    missing = set(parts) - set(states)
    if missing:
        raise InputError(
            f"{checkpoint}: expected entries {' and '.join(parts)}, got {', '.join(states)}"
        )
    ours = from_published(states[parts[0]], _student(model), layout)
    if layout.predicts:
        teacher = from_published(states["target"], _teacher(model), layout)
        ours |= {name.replace("online.", "teacher.", 1): tensor for name, tensor in teacher.items()}
    model.load_state_dict(ours)
    return model.eval()


def read_states(checkpoint: str | Path) -> dict[str, Any]:
    """The entries of a published file, without unpickling code.

    Raises:
        InputError: there is no such file, or it holds anything but tensors and plain values.
    """
    states = read_state(checkpoint, "not readable")
    if not isinstance(states, dict):
        raise InputError(f"{checkpoint}: expected a dictionary, got {type(states).__name__}")
    return states


def export_published(
    model: JepaModel, *, step: int = 0, total_seconds: float = 0.0
) -> dict[str, Any]:
    """The model in the published checkpoint layout, for `torch.save`; its config apart.

    Tensors share memory with the model.

    Raises:
        InputError: the published code has no model like it.
    """
    layout, n_layers = layout_of(model), model.config.layers
    student = to_published(
        _student(model), layout, bias_copies=layout.bias_copies(n_layers, with_heads=True)
    )
    states = {"model": student}
    if layout.predicts:
        copies = layout.bias_copies(n_layers, with_heads=False)
        teacher = to_published(_teacher(model), layout, bias_copies=copies)
        states = {"online": student, "target": teacher}
    return {**states, "step": step, "total_seconds": total_seconds}


def published_config(model: JepaModel) -> dict[str, Any]:
    """The model's settings as ``config.json`` of the published layout.

    Settings the published code has no name for appear under ours where they differ from it.
    """
    layout = layout_of(model)
    ours, default = _as_json(model.config), _as_json(layout.config())
    named = layout.config_names
    known = {theirs: ours[name] for name, theirs in named.items()}
    other = {
        k: v
        for k, v in ours.items()
        if k not in named and k not in layout.fixed and v != default[k]
    }
    return {"kind": layout.kind, **known, layout.n_clusters: model.n_clusters, **other}


def _as_json(config: EncoderConfig) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def config_from_published(settings: Mapping[str, Any]) -> EncoderConfig:
    """Inverse of `published_config`; entries of no concern to the encoder are passed over.

    Raises:
        InputError: a setting is missing or out of range.
    """
    layout = LAYOUTS[settings["kind"]]
    missing = sorted(set(layout.config_names.values()) - set(settings))
    if missing:
        raise InputError(f"config: {', '.join(missing)} missing for kind {layout.kind}")
    values = {ours: settings[theirs] for ours, theirs in layout.config_names.items()}
    own = {f.name for f in fields(layout.config)} - set(layout.config_names) - set(layout.fixed)
    other = {name: settings[name] for name in own if name in settings}
    return layout.config(**values, **other, **layout.fixed)


def to_published(
    tensors: Mapping[str, Tensor], layout: Layout, *, bias_copies: list[str] | None = None
) -> dict[str, Tensor]:
    """Rename and reshape tensors named as in `JepaModel` (parameters, or their gradients).

    Args:
        tensors: any part of the state without the teacher.
        layout: the published kind.
        bias_copies: prefixes under which the shared position bias appears again.
    """
    out = {
        theirs: view
        for ours, tensor in tensors.items()
        for theirs, view in layout.views(ours, tensor)
    }
    shared = {name: tensor for name, tensor in out.items() if name.startswith(_BIAS)}
    for prefix in bias_copies or []:
        out |= {prefix + name: tensor for name, tensor in shared.items()}
    return out


def from_published(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor], layout: Layout
) -> dict[str, Tensor]:
    """Tensors under our names, shaped as `like`; every entry of `state` must be accounted for.

    Raises:
        InputError: an entry is missing, left over, of another shape, or a copy of the position
            bias differs from the shared one.
    """
    out, used = {}, set()
    for ours, tensor in like.items():
        parts = []
        for theirs, view in layout.views(ours, tensor):
            if theirs not in state:
                raise InputError(f"checkpoint: {theirs} is missing")
            if state[theirs].shape != view.shape:
                raise InputError(
                    f"checkpoint: {theirs}: expected shape {tuple(view.shape)}, "
                    f"got {tuple(state[theirs].shape)}"
                )
            used.add(theirs)
            parts.append(state[theirs])
        out[ours] = torch.stack(parts).reshape(tensor.shape)
    for name in set(state) - used:
        _, is_copy, rest = name.rpartition(_BIAS)
        if not is_copy or _BIAS + rest not in used:
            raise InputError(f"checkpoint: {name} is not part of this model")
        if not torch.equal(state[name], state[_BIAS + rest]):
            raise InputError(f"checkpoint: {name} differs from the shared {_BIAS + rest}")
    return out


def _read_settings(config: str | Path) -> dict[str, Any]:
    settings = read_json(Path(config))
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if kind not in LAYOUTS:
        raise InputError(f"{config}: expected kind {' or '.join(LAYOUTS)}, got {kind!r}")
    if LAYOUTS[kind].n_clusters not in settings:
        raise InputError(f"{config}: {LAYOUTS[kind].n_clusters} is missing")
    return settings


def _student(model: JepaModel) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("teacher.")}


def _teacher(model: JepaModel) -> dict[str, Tensor]:
    return {f"online.{name}": tensor for name, tensor in model.teacher.state_dict().items()}
