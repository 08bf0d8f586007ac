"""The processes of a run: which of them this is, and what they tell each other."""

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError, UserError, first_line
from runners.launch import Launch, launched

T = TypeVar("T")

# As long as processes may take to start, and as one may take alone, over a tracking server say, while the
# others wait.
START_TIMEOUT, TIMEOUT = timedelta(minutes=5), timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes that train one model together; one process alone needs no group.

    Attributes:
        rank: This process's number among all, from 0.
        world_size: How many there are.
        local_rank: Its number on its own machine: that of the GPU it takes.
        command: What was typed before `run.py` to start them.
        store: Where they leave notes for each other; None for one alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    command: tuple[str, ...] = ("python",)
    store: dist.Store | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: it alone keeps metrics, tables and the MLflow run."""
        return self.rank == 0

    def terminal(self) -> IO[str]:
        """Where a live line of progress may go: one process has the terminal, the others go without."""
        return sys.stderr if self.is_main else StringIO()

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all processes; every process gets the sums."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest of each value over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values, operation)
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

    def agreed(self, call: Callable[[], T]) -> T:
        """The call's own result on each process, unless it raises a `UserError` on one: then all raise.

        Raises:
            UserError: What one of them raised; one that others raised says on which ranks it happened.
        """
        if self.world_size == 1:
            return call()
        result, error = None, None
        try:
            result = call()
        except UserError as caught:
            error = caught
        found: list[str | None] = [None] * self.world_size
        dist.all_gather_object(found, None if error is None else str(error))
        said = {text: [rank for rank, other in enumerate(found) if other == text] for text in found if text}
        if not said:
            return result  # type: ignore[return-value]  # what the call returned
        text, ranks = next(iter(said.items()))
        if ranks[0] == 0:
            raise ConfigError(text) from error
        raise ConfigError(f"rank {', '.join(map(str, ranks))}: {text}") from error

    def on_main(self, call: Callable[[], T]) -> T | None:
        """The call's result on the main process, None on the others; all wait for it, and fail with it.

        Raises:
            UserError: What the call raised.
        """
        return self.agreed(lambda: call() if self.is_main else None)


ALONE = World()

# torch.distributed has one group a process; this is what else is known of it.
_joined: World | None = None


@contextmanager
def joined_world() -> Iterator[World]:
    """The processes that were started with this one, as a group; left at the end, whatever happens.

    Within a block that has joined already, the same world again.

    Raises:
        ConfigError: They do not find each other.
    """
    global _joined
    launch = launched()
    if launch.world_size == 1 or _joined is not None:
        yield _joined or ALONE
        return
    _joined = _join(launch)
    try:
        yield _joined
    except BaseException as error:
        _release_frames(error)
        raise
    finally:
        _joined = None
        # A sharded model that outlives its group aborts the process at its end.
        gc.collect()
        dist.destroy_process_group()


def _join(launch: Launch) -> World:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    url = f"tcp://{launch.address}:{launch.port}"
    try:
        store, *_ = next(iter(dist.rendezvous(url, launch.rank, launch.world_size, timeout=START_TIMEOUT)))
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=TIMEOUT
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} does not find the others at {launch.address}:"
            f"{launch.port}: {first_line(error)}"
        ) from error
    return World(launch.rank, launch.world_size, launch.local_rank, launch.command, store)


def _release_frames(error: BaseException | None) -> None:
    """Let go of the local variables, the model among them, that an error's traceback holds."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
