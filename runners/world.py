"""The processes of a run: which of them this is, and what they tell each other."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train one model together; one process alone needs no group.

    Attributes:
        rank: This process's number among all, from 0.
        world_size: How many there are.
        local_rank: Its number on its own machine: that of the GPU it takes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: it alone keeps metrics, tables and the MLflow run."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all processes; every process gets the sums."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says so."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=device)) > 0)

    def broadcast(self, value: Any) -> Any:
        """The main process's value (plain data), on every process."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


ALONE = World()
