"""Several processes: whose gradients are averaged with whose, and parameters of which each process holds a
shard.

DistributedDataParallel and FSDP2 (`fully_shard`) average gradients over W processes. A micro-batch's share of
the step's loss is its share of *all* processes' loss, so its own loss is multiplied by W times that. Under
FSDP2 a parameter is a shard of itself outside of its module's forward and backward, and whole inside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from ghost.errors import GhostConfigError, ProtocolError, UnsupportedModelError


@dataclass(frozen=True)
class Ranks:
    """The processes that average the gradients of a step.

    Attributes:
        rank: This process's number among them.
        world_size: How many there are, W.
        group: Through which they talk; None for the default group.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    def refuse_different(self, digest: str, what: str) -> None:
        """Raise `GhostConfigError` where `what`, which all ranks should have alike, has several digests."""
        if self.world_size == 1:
            return
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, digest, group=self.group)
        other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
        if other is not None:
            raise GhostConfigError(
                f"{what} of rank {other} differs from rank 0's: give every rank the same rows, against which "
                "it scores the samples of its own batches."
            )

    def all_rows(self, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
        """The ranks' rows of some tensors, one rank's behind the other's, and which of them are this one's.

        Ranks may have different numbers of rows. Those of several ranks are in the host's memory.
        """
        rows = len(next(iter(own.values())))
        if self.world_size == 1:
            return dict(own), slice(0, rows)
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, {key: tensor.cpu() for key, tensor in own.items()}, group=self.group)
        sizes = [len(next(iter(theirs.values()))) for theirs in found]
        first = sum(sizes[: self.rank])
        return {key: torch.cat([theirs[key] for theirs in found]) for key in own}, slice(first, first + rows)

    def refuse_other_weights(self, weights: Tensor) -> None:
        """Raise `ProtocolError` where ranks have decided differently on the samples of all of them."""
        if self.world_size == 1:
            return
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, weights.tolist(), group=self.group)
        other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
        if other is not None:
            raise ProtocolError(
                f"the policy's weights on rank {other} differ from rank 0's: it should decide by what it is "
                "given alone, and draw random numbers from a generator seeded by the iteration."
            )


ALONE = Ranks()


def ranks_of(model: nn.Module, ddp_info: Any) -> Ranks:
    """The processes whose gradients a loop averages, told by the model's wrapper or by GhostSuite's
    `ddp_info`.

    Args:
        model: As the loop calls it: in DistributedDataParallel, under `fully_shard`, or plain.
        ddp_info: A mapping or object with `ddp`, whether the loop averages over all processes; or None.

    Raises:
        GhostConfigError: There are several processes, and nothing that averages their gradients.
        UnsupportedModelError: The model is spread over processes in another way.
    """
    wrapper = ddp_wrapper(model)
    if wrapper is not None:
        group = wrapper.process_group
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UnsupportedModelError(
                "the model is in FullyShardedDataParallel, which flattens parameters: use fully_shard "
                "(FSDP2) instead."
            )
    sharded = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        return _ranks_of_shards(sharded)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    if ddp_info is None:
        raise GhostConfigError(
            f"world_size is {dist.get_world_size()}, and the model is in neither DistributedDataParallel nor "
            "fully_shard, so that every process would train alone: wrap it, or give ddp_info={'ddp': False} "
            "if they should."
        )
    averaged = ddp_info.get("ddp") if isinstance(ddp_info, Mapping) else getattr(ddp_info, "ddp", None)
    return Ranks(dist.get_rank(), dist.get_world_size()) if averaged else ALONE


def _ranks_of_shards(parameter: DTensor) -> Ranks:
    mesh = parameter.device_mesh
    if not all(isinstance(placement, Replicate) for placement in parameter.placements[:-1]):
        raise UnsupportedModelError(
            f"parameters are split along several axes of processes ({parameter.placements}), as in tensor "
            "parallelism: scores are of models under fully_shard or DistributedDataParallel alone."
        )
    if mesh.size() != dist.get_world_size():
        raise UnsupportedModelError(
            f"the model is spread over {mesh.size()} of {dist.get_world_size()} processes: shard it over all."
        )
    return Ranks(dist.get_rank(), mesh.size())


def ddp_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around the model, compiled or not."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return model if isinstance(model, DistributedDataParallel) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and `torch.compile` wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to the model or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Put shards in the place of parameters that a forward without a backward has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_type(module: object) -> type[Any]:
    """The module's class, without the one that `fully_shard` puts before it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def device_of(parameter: Tensor) -> torch.device:
    """Where a parameter takes part in computations; shards may be kept in the host's memory."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all ranks; another tensor is its own."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fetched(tensor: Tensor, device: torch.device) -> Tensor:
    """The whole of a tensor on `device`, wherever it is kept."""
    return gathered(tensor).to(device)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; another tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(columns: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shards `[C, …]` of tensors `[C, *shape]` that are split as the parameter is; for another
    parameter they are the tensors.
    """
    if not isinstance(parameter, DTensor):
        return columns
    placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in parameter.placements]
    shape = torch.Size((len(columns), *parameter.shape))
    return DTensor.from_local(
        columns,
        parameter.device_mesh,
        placements,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def sum_over_shards(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Numbers that were added up over the local shards of `parameters`, added up over the ranks too."""
    mesh = next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)
    if mesh is not None:
        values = values.clone()
        dist.all_reduce(values, group=mesh.get_group(mesh.ndim - 1))
    return values


def gradients(loss: Tensor, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of a loss by `parameters`; every `.grad` is left alone.

    Under `fully_shard` they are shards, averaged over the ranks.

    Raises:
        ProtocolError: `fully_shard` was told not to reduce gradients now.
    """
    if not is_sharded(model):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    # Only a backward of its own makes FSDP2 reduce: `autograd.grad` would leave the shards without one.
    reshard(model)  # the loss's forward has left some whole, which are other tensors than their shards
    every = list(model.parameters())
    kept = [p.grad for p in every]
    for p in every:
        p.grad = None
    loss.backward()
    found = [p.grad for p in parameters]
    for p, grad in zip(every, kept, strict=True):
        p.grad = grad
    if all(grad is None for grad in found):
        raise ProtocolError(
            "the validation pass left no gradients: call set_requires_gradient_sync(False) only after the "
            "step's first micro-batch is attached, and set it back before the next step."
        )
    return found
