"""What of a training run changes with its steps, as files of a checkpoint and back.

Everything is plain values and tensors, read with `weights_only=True`. With FSDP2 each rank keeps its own
shards of weights and optimizer state; else every rank has the same, and one writes it.
"""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from conf.errors import ConfigError


@dataclass(frozen=True)
class Trained:
    """The objects whose state decides the coming steps, beside the random generators.

    Attributes:
        model: Without `torch.compile` or DistributedDataParallel around it.
        cuda_devices: GPUs that random numbers are drawn on.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    cuda_devices: list[torch.device]

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has but a part of the weights."""
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, schedule and loss scale; of sharded tensors this rank's part."""
        return {
            "model": _local(self.model.state_dict()),
            "optimizer": _local(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave.

        Raises:
            ConfigError: The model has other parameters.
        """
        own, saved = self.model.state_dict(), state["model"]
        if other := own.keys() ^ saved.keys():
            raise ConfigError(
                f"the checkpoint is not of this model, which differs in {min(other)}: go on with the "
                "libraries of environment.json, or start again in another directory"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(saved[name])
        self.optimizer.load_state_dict(self._with_shards(state["optimizer"]))
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])

    def _with_shards(self, state: dict[str, Any]) -> dict[str, Any]:
        """Optimizer state in which what lies beside a sharded parameter is sharded as it is."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = {
            number: {name: _sharded_as(params[number], value) for name, value in entries.items()}
            for number, entries in state["state"].items()
        }
        return {**state, "state": kept}

    def random_state(self) -> dict[str, Any]:
        """Of all generators that a step may draw from."""
        kind, words, position, has_gauss, cached = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(words, dtype=np.int64)), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self.cuda_devices],
        }

    def set_random_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `random_state` gave."""
        random.setstate(state["python"])
        kind, words, *rest = state["numpy"]
        np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        for device, own in zip(self.cuda_devices, state["cuda"], strict=True):
            torch.cuda.set_rng_state(own, device)


def _local(state: Any) -> Any:
    """Nested state in which sharded tensors are this rank's part."""
    if isinstance(state, DTensor):
        return state.to_local()
    if isinstance(state, Mapping):
        return {key: _local(value) for key, value in state.items()}
    return state


def _sharded_as(param: Tensor, value: Any) -> Any:
    if not isinstance(param, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    value = value.to(param.to_local().device)
    return DTensor.from_local(
        value, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


class _Sink:
    """A file for `torch.save`, which loses the system's reason where a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.refused = self.refused or error
            raise

    def flush(self) -> None:
        """`torch.save` asks for it; the caller flushes."""


def save(content: Any, path: Path) -> None:
    """`torch.save`, down to the disk.

    Raises:
        OSError: The system refuses it.
    """
    with path.open("wb") as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            if sink.refused is not None:
                raise sink.refused from error
            raise
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> Any:
    """What `save` wrote, in host memory."""
    return torch.load(path, weights_only=True, map_location="cpu")
