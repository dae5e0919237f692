"""Checkpoints of the published code (arXiv 2602.09040): read them, and write them back whole.

The published layout holds ``online`` (encoder and heads), ``target`` (the encoder alone), ``step``
and ``total_seconds``. Names differ from ours by the table below; 1x1 convolutions are linear
layers here, DAAM's four chunks are rows of one tensor, and the shared position bias, of which the
published layout keeps a copy under every block, is stored once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.daam import CHUNKS
from gmm_jepa.models.jepa import JepaModel

KIND = "jepa_conformer"

_RENAMES = [  # ours -> published, applied in turn
    (r"^online\.", ""),
    (r"^front_end\.stages\.", "encoder."),
    (r"^front_end\.projection\.", "proj."),
    (r"^front_end\.", ""),
    (r"\.residual\.", ".res."),
    (r"\.dilated\.", ".convs1."),
    (r"\.plain\.", ".convs2."),
    (r"\.snake\.alpha$", ".snake.a"),
    (r"\.daam\.offsets$", ".gaatn.layers.0.heads.{chunk}.mean_offsets"),
    (r"\.daam\.widths$", ".gaatn.layers.0.heads.{chunk}.c"),
    (r"^aggregation\.", "layer_attention."),
    (r"^cluster_head\.blocks\.(\d)\.norm\.", r"cluster_head.blocks.\1.0."),
    (r"^cluster_head\.blocks\.(\d)\.up\.", r"cluster_head.blocks.\1.1."),
    (r"^cluster_head\.blocks\.(\d)\.down\.", r"cluster_head.blocks.\1.4."),
    (r"^predictor\.in_proj\.", "predictor.0."),
    (r"^predictor\.block\.", "predictor.2."),
    (r"^predictor\.out_proj\.", "predictor.3."),
    (r"^blocks\.", "conformers."),
    (r"\.(ff[12])\.up\.", r".\1.0."),
    (r"\.(ff[12])\.down\.", r".\1.3."),
    (r"\.attention\.", "."),
    (r"\.convolution\.norm_in\.", ".conv.0."),
    (r"\.convolution\.up\.", ".conv.1."),
    (r"\.convolution\.depthwise\.", ".conv.3."),
    (r"\.convolution\.norm_out\.", ".conv.4."),
    (r"\.convolution\.down\.", ".conv.6."),
    (r"^relative_bias\.gate_u$", "rel_pos_bias.gate_u_vec"),
    (r"^relative_bias\.gate_r$", "rel_pos_bias.gate_w_vec"),
    (r"^relative_bias\.scale$", "rel_pos_bias.gate_scale_scalar"),
    (r"^relative_bias\.embedding\.", "rel_pos_bias.rel_pos_embed."),
]
_POINTWISE = re.compile(r"^(proj|predictor\.[03]|.*\.conv\.[16])\.weight$")
_CHANNELS_FIRST = re.compile(r"^mask_token$|\.snake\.a$")
_BIAS = "rel_pos_bias."

_CONFIG_NAMES = {
    "code_dim": "code_dim",
    "channels": "channels",
    "strides": "strides",
    "residual_blocks": "n_res",
    "layers": "n_conformer",
    "heads": "heads",
    "daam": "use_gaatn",
    "relative_bias": "use_rel_pos",
}


def load_published(checkpoint: str | Path, config: str | Path) -> JepaModel:
    """Read a published conformer checkpoint (.pt) and its config (.json); nothing is unpickled.

    Raises:
        InputError: the config is of another kind, or the checkpoint does not fit it; the message
            names the parameter.
    """
    settings = json.loads(Path(config).read_text())
    if settings.get("kind") != KIND:
        raise InputError(f"{config}: expected kind {KIND!r}, got {settings.get('kind')!r}")
    model = JepaModel(config_from_published(settings), n_clusters=settings["K"])
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)
    missing = {"online", "target"} - set(states)
    if missing:
        raise InputError(f"{checkpoint}: expected entries online and target, got {list(states)}")
    ours = from_published(states["online"], _student(model))
    teacher = from_published(states["target"], _teacher(model))
    ours |= {name.replace("online.", "teacher.", 1): tensor for name, tensor in teacher.items()}
    model.load_state_dict(ours)
    return model.eval()


def export_published(
    model: JepaModel, *, step: int = 0, total_seconds: float = 0.0
) -> dict[str, Any]:
    """The model in the published checkpoint layout, for `torch.save`; its config apart.

    Tensors share memory with the model.
    """
    n_layers = model.config.layers
    return {
        "online": to_published(_student(model), [*_block_copies(n_layers), "predictor.2."]),
        "target": to_published(_teacher(model), _block_copies(n_layers)),
        "step": step,
        "total_seconds": total_seconds,
    }


def published_config(model: JepaModel) -> dict[str, Any]:
    """The model's settings as ``config.json`` of the published layout.

    Settings the published code has no name for appear under ours where they differ from it.
    """
    ours, default = model.config.to_dict(), ConformerConfig().to_dict()
    known = {theirs: ours[name] for name, theirs in _CONFIG_NAMES.items()}
    other = {k: v for k, v in ours.items() if k not in _CONFIG_NAMES and v != default[k]}
    return {"kind": KIND, **known, "K": model.n_clusters, **other}


def config_from_published(settings: Mapping[str, Any]) -> ConformerConfig:
    """Inverse of `published_config`; entries of no concern to the encoder are passed over."""
    values = {ours: settings[theirs] for ours, theirs in _CONFIG_NAMES.items()}
    other = {f.name for f in fields(ConformerConfig)} - set(_CONFIG_NAMES)
    return ConformerConfig(**values, **{k: settings[k] for k in other if k in settings})


def to_published(
    tensors: Mapping[str, Tensor], bias_copies: list[str] | None = None
) -> dict[str, Tensor]:
    """Rename and reshape tensors named as in `JepaModel` (parameters, or their gradients).

    Args:
        tensors: any part of the state without the teacher.
        bias_copies: prefixes under which the shared position bias appears again.
    """
    out = {
        theirs: view for ours, tensor in tensors.items() for theirs, view in _views(ours, tensor)
    }
    shared = {name: tensor for name, tensor in out.items() if name.startswith(_BIAS)}
    for prefix in bias_copies or []:
        out |= {prefix + name: tensor for name, tensor in shared.items()}
    return out


def from_published(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, shaped as `like`; every entry of `state` must be accounted for.

    Raises:
        InputError: an entry is missing, left over, of another shape, or a copy of the position
            bias differs from the shared one.
    """
    out, used = {}, set()
    for ours, tensor in like.items():
        parts = []
        for theirs, view in _views(ours, tensor):
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


def _views(ours: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The published entries of one of our tensors, as views of it."""
    theirs = ours
    for pattern, replacement in _RENAMES:
        theirs = re.sub(pattern, replacement, theirs)
    if "{chunk}" in theirs:
        for chunk in range(CHUNKS):
            yield theirs.format(chunk=chunk), tensor[chunk]
    elif _POINTWISE.search(theirs):
        yield theirs, tensor[..., None]
    elif _CHANNELS_FIRST.search(theirs):
        yield theirs, tensor[None, :, None]
    else:
        yield theirs, tensor


def _student(model: JepaModel) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("teacher.")}


def _teacher(model: JepaModel) -> dict[str, Tensor]:
    return {f"online.{name}": tensor for name, tensor in model.teacher.state_dict().items()}


def _block_copies(n_layers: int) -> list[str]:
    return [f"conformers.{i}." for i in range(n_layers)]
