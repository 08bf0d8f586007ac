"""The model as several processes train it: a copy in each (DDP), or a part in each (FSDP2)."""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from conf.errors import ConfigError
from runners.choices import Strategy, TaskName
from runners.tasks import model_task
from runners.world import World


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Let the model's blocks compute their activations again in the backward.

    Raises:
        ConfigError: The model cannot.
    """
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.activation_checkpointing=true is nothing that model={name} can do: type false"
        )
    # Reentrant checkpoints hide what happens inside from autograd, and so from scoring.
    model.activation_checkpointing_enable({"use_reentrant": False})


def wrapped(model: nn.Module, cfg: DictConfig, world: World, device: torch.device) -> nn.Module:
    """The model as `hardware.strategy` has it, with the main process's weights on all of them.

    With FSDP it is the same object: its parameters become parts of themselves, so the optimizer comes after.
    """
    if world.world_size == 1:
        return model
    if cfg.hardware.strategy == Strategy.fsdp:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)
        split(model, cfg, world, device)
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # A batch without images leaves the vision tower unused.
        find_unused_parameters=model_task(cfg.model) == TaskName.image_text,
    )


def split(model: nn.Module, cfg: DictConfig, world: World, device: torch.device) -> None:
    """FSDP2: each block a group of its own, gathered when it is used, and the rest with the root."""
    dtype = cfg.hardware.reduce_dtype
    over = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (world.world_size,)),
        mp_policy=MixedPrecisionPolicy(reduce_dtype=getattr(torch, dtype) if dtype else None),
        offload_policy=CPUOffloadPolicy() if cfg.hardware.offload else OffloadPolicy(),
    )
    for block in blocks(model):
        over(block)
    over(model)


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: gradients go over the processes only in a step's last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state of a model that is split, gathered on the main process; nothing on the others, which have to
    call this too.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twin = first.setdefault(id(parameter), name)
        if twin != name and name in state:
            state[name] = state[twin]  # tied weights are one tensor again
    return state


def blocks(model: nn.Module) -> list[nn.Module]:
    """A Hugging Face model's stacked blocks, as its class names them, but for those that share a parameter
    with the rest of the model; of other models none.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    names = model._no_split_modules or ()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for stack in stacks for block in stack if type(block).__name__ in names]
    uses = _uses(model)
    return [block for block in found if all(uses[key] == n for key, n in _uses(block).items())]


def _uses(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its `id`."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
