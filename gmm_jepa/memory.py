"""Memory that a step takes on each GPU.

Counted are parameters, gradients, AdamW's moments, the teacher, and what autograd keeps of the
forward pass, taken from a pass over fake tensors. Of a sharded training all of it but the last is
divided by the number of GPUs, and what is gathered for a while comes on top.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gmm_jepa.config import Recipe
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.models import JepaModel
from gmm_jepa.objectives.build import initial_model
from gmm_jepa.ops.fused import composed
from gmm_jepa.train.sharding import units

FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2


class Memory(NamedTuple):
    """Bytes that a step holds on each GPU."""

    parameters: float
    """Of all networks but the teacher."""
    gradients: float
    optimizer: float
    """AdamW's two moments."""
    teacher: float
    activations: float
    """What autograd keeps of the forward pass of a micro-batch."""
    labels: float = 0.0
    """The frozen encoder whose frames are clustered, of iterations after the first."""
    gathered: float = 0.0
    """Of sharded networks what is whole for a while: the root, two units, and the gradient of one
    as it is computed and as it is sent."""

    @property
    def total(self) -> float:
        """All of it; the work space of single operations comes on top."""
        return sum(self)


def memory_of(recipe: Recipe, rows: int, segment_s: float) -> Memory:
    """What a step over a micro-batch of so many rows of so many seconds holds, unsharded."""
    model = _fake_model(recipe)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    taught = 0 if model.teacher is None else sum(p.numel() for p in model.teacher.parameters())
    encoder = sum(p.numel() for p in model.online.parameters())
    return Memory(
        parameters=FLOAT32_BYTES * (sum(p.numel() for p in model.parameters()) - taught),
        gradients=FLOAT32_BYTES * learned,
        optimizer=2 * FLOAT32_BYTES * learned,
        teacher=FLOAT32_BYTES * taught,
        activations=_activation_bytes(model, recipe, rows, round(segment_s * SAMPLE_RATE_HZ)),
        labels=FLOAT32_BYTES * encoder if recipe.objective.iterations > 1 else 0.0,
    )


def sharded(whole: Memory, recipe: Recipe, gpus: int) -> Memory:
    """What each of several GPUs holds of it, see `gmm_jepa.train.sharding`."""
    train = recipe.train
    if not train.shard or gpus == 1:
        return whole
    sent = BFLOAT16_BYTES if train.reduce_precision == "bf16" else FLOAT32_BYTES
    gradients = whole.gradients / gpus
    if train.accumulate > 1:  # not sent, hence whole, until the last micro-batch
        gradients += whole.gradients * sent / FLOAT32_BYTES
    model = _fake_model(recipe)
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units(model)]
    root = sum(p.numel() for p in model.parameters()) - sum(sizes)
    computed = BFLOAT16_BYTES if train.precision == "bf16" else FLOAT32_BYTES
    return Memory(
        parameters=whole.parameters / gpus,
        gradients=gradients,
        optimizer=whole.optimizer / gpus,
        teacher=whole.teacher / gpus,
        activations=whole.activations,
        labels=whole.labels / gpus,
        gathered=FLOAT32_BYTES * root + (3 * computed + sent) * max(sizes),
    )


def _fake_model(recipe: Recipe) -> JepaModel:
    """The networks of a recipe, without memory for their tensors."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `copy.deepcopy` asks a fake tensor for its address
        model = initial_model(recipe).train()
    model.online.recomputes_blocks = recipe.train.checkpoint_blocks
    return model


def _activation_bytes(model: JepaModel, recipe: Recipe, rows: int, n_samples: int) -> float:
    """What is kept of a forward pass; of blocks that are computed again, the inside of one."""
    kept = _kept_bytes(model, recipe, rows, n_samples)
    if not model.online.recomputes_blocks:
        return kept
    model.online.recomputes_blocks = False
    whole = _kept_bytes(model, recipe, rows, n_samples)
    model.online.recomputes_blocks = True
    return kept + (whole - kept) / recipe.encoder.layers


def _kept_bytes(model: JepaModel, recipe: Recipe, rows: int, n_samples: int) -> float:
    """What autograd keeps of a forward pass on a GPU, parameters left out; half of it masked."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    objective = recipe.objective
    fake = next(model.parameters()).fake_mode
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")
    with fake, hooks, autocast, composed():
        lengths = torch.full((rows,), n_samples)
        encoded = model.encode(torch.zeros(rows, n_samples), lengths)
        frames = encoded.output
        if objective.needs_predictor:
            visible = torch.ones(frames.shape[:2], dtype=torch.bool)
            predicted = model.predict(frames, visible, encoded.lengths_frames)
            keep(predicted)
            frames = predicted if objective.head_input == "predictor" else frames
        if isinstance(model.cluster_head, nn.Module):
            flat = frames.flatten(0, 1)
            heard = flat if objective.unmasked_weight > 0 else flat[: -(-len(flat) // 2)]
            keep(model.cluster_head(heard))
        return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
