"""Parameters, gradients, moments and teacher in parts, one in each process (PyTorch's FSDP2).

A unit (an encoder's front end, one of its blocks, the predictor, the cluster head) is gathered
before it runs and dropped after it, and gathered once more for the gradient. What is used outside
of its own module's forward pass (mask token, position bias, layer aggregation) belongs to the root,
the objective: it is whole from the forward pass to the end of the backward pass.

Optimiser, gradient norm and teacher work on plain tensors, the parts that lie in this process.
Only a checkpoint is made of whole ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gmm_jepa.config import TrainConfig
from gmm_jepa.distributed import Processes
from gmm_jepa.models import JepaModel
from gmm_jepa.models.encoder import Encoder
from gmm_jepa.objectives.masked_prediction import MaskedPrediction


class Shards:
    """A sharded objective as one process holds it.

    Args:
        objective: sharded in place, and moved to the device unit by unit; its model has values
            in the main process, and none elsewhere (on the meta device).
        config: precisions of the forward pass and of the sums.
        peers: this process among its peers.

    Attributes:
        parameters: this process's parts of the learned parameters in the model's order, plain
            tensors over the same memory; empty where there are fewer rows than processes.
    """

    def __init__(self, objective: MaskedPrediction, config: TrainConfig, peers: Processes) -> None:
        _shard(objective, config, peers)
        self._is_main = peers.is_main
        self._sharded = [p for p in objective.model.parameters() if p.requires_grad]
        with torch.no_grad():
            self.parameters = [nn.Parameter(p.to_local()) for p in self._sharded]

    def take_gradients(self) -> None:
        """Move the gradients, in parts as well by now, to `parameters`."""
        for own, sharded in zip(self.parameters, self._sharded):
            own.grad = None if sharded.grad is None else sharded.grad.to_local()
            sharded.grad = None

    def gather_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A model's state dict made whole, one tensor at a time: on the CPU of the main process.

        Called by all processes; the others get empty tensors.
        """
        return {name: self._gather(value) for name, value in weights.items()}

    def split_weights(self, weights: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """The inverse: whole tensors, the same in all processes, as a sharded module has them."""
        own = like.state_dict()
        return {
            name: _split(value, own[name]) if name in own else value
            for name, value in weights.items()
        }

    def gather_moments(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """As `gather_weights`, of the state dict of an optimiser of `parameters`."""
        return self._of_moments(optimizer, lambda part, p: self._gather(_joined(part, p)))

    def split_moments(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `gather_moments`."""
        return self._of_moments(optimizer, lambda whole, p: _split(whole, p).to_local())

    def _of_moments(
        self, optimizer: dict[str, Any], change: Callable[[Tensor, DTensor], Tensor]
    ) -> dict[str, Any]:
        """The optimiser's state with every moment changed; numbers of steps stay."""
        state = {
            i: {k: v if v.dim() == 0 else change(v, self._sharded[i]) for k, v in held.items()}
            for i, held in optimizer["state"].items()
        }
        return {**optimizer, "state": state}

    def _gather(self, tensor: Tensor) -> Tensor:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().cpu() if self._is_main else torch.empty(0)


def units(networks: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: parts of every encoder, and the heads."""
    found: list[nn.Module] = []
    for module in networks.modules():
        if isinstance(module, Encoder):
            found += [module.front_end, *module.blocks]
        elif isinstance(module, JepaModel):
            found += [head for head in (module.predictor, module.cluster_head) if head is not None]
    return found


@contextlib.contextmanager
def gradient_sync(forward: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Gradients of a backward pass are summed over the processes only where that is wanted."""
    if wanted:
        yield
    elif isinstance(forward, DistributedDataParallel):
        with forward.no_sync():
            yield
    elif isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            forward.set_requires_gradient_sync(True)
    else:
        yield


def _shard(objective: MaskedPrediction, config: TrainConfig, peers: Processes) -> None:
    """Shard the units, then the root.

    In bf16 blocks and heads are gathered as bf16: their matrices, which autocast would round
    anyway, and the scales of their norms, which it would not. What enters a unit keeps its
    precision, and so the residual stream stays fp32; so do the front ends and the root, whose taps,
    density widths and biases are not rounded either without sharding.
    """
    mesh = init_device_mesh(peers.device.type, (peers.world_size,))
    summed = torch.bfloat16 if config.reduce_precision == "bf16" else torch.float32
    wide = MixedPrecisionPolicy(reduce_dtype=summed, cast_forward_inputs=False)
    narrow = dataclasses.replace(
        wide, param_dtype=torch.bfloat16 if config.precision == "bf16" else None
    )
    encoders = [module for module in objective.modules() if isinstance(module, Encoder)]
    front_ends = {encoder.front_end for encoder in encoders}
    for unit in units(objective):
        _fill(unit, objective.model, peers)
        fully_shard(unit, mesh=mesh, mp_policy=wide if unit in front_ends else narrow)
    _fill(objective, objective.model, peers)
    fully_shard(objective, mesh=mesh, mp_policy=wide)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            # A sum and a division after it, as gloo knows no mean; the same with nccl.
            module.set_force_sum_reduction_for_comms(True)
    # The backward pass gathers ahead what ran before a unit. Before the online front end ran the
    # teacher, which has no backward pass: it gathers itself, which is to say nothing.
    first = objective.model.online.front_end
    first.set_modules_to_backward_prefetch([first])


def _fill(unit: nn.Module, model: JepaModel, peers: Processes) -> None:
    """Give what of a unit is the model's, and not in parts yet, the main process's values."""
    trained = set(model.modules())  # what else the objective holds has values everywhere
    for module in unit.modules():
        held = _own_tensors(module)
        if not held or module not in trained or isinstance(held[0], DTensor):
            continue
        if not peers.is_main:
            module.to_empty(device=peers.device, recurse=False)
        for tensor in _own_tensors(module):
            dist.broadcast(tensor.detach().to(peers.device), src=0)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module, not of those inside."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _split(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in parts as another one is; as it is if that one is not in parts."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _joined(part: Tensor, like: DTensor) -> DTensor:
    """The parts of all processes as one tensor, in parts as another one is."""
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
