"""A run's checkpoints: when one is due, what is in it, and going on behind the newest that is whole."""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.resume import files, state
from runners.resume.earlier import refuse_edited_config, saved_fingerprint
from runners.resume.files import Checkpoint, Facts
from runners.resume.state import Trained
from runners.tracking import NullTracker
from runners.world import World

log = logging.getLogger(__name__)

TRAINED = "training.pt"  # weights, optimizer, schedule, loss scale


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        step: Optimizer steps that are done.
        manager: The manager's state.
        loop: The training loop's.
    """

    step: int
    manager: Mapping[str, Any]
    loop: Mapping[str, Any]
    _random: Mapping[str, Any]
    _trained: Mapping[str, Any]

    def load(self, trained: Trained) -> None:
        """Bring back weights, optimizer, schedule, loss scale and random state.

        Raises:
            ConfigError: The model has other parameters.
        """
        trained.load(self._trained)
        trained.set_random_state(self._random)


class Checkpoints:
    """The folder `checkpoints/` of a run directory, as one of the run's processes uses it."""

    def __init__(self, cfg: DictConfig, tracker: NullTracker, world: World) -> None:
        self._out = Path(cfg.output_dir)
        self._every: int | None = cfg.trainer.checkpoint_every
        self._keep: int = cfg.trainer.keep_checkpoints
        self._tracker = tracker
        self._world = world

    def is_due(self, done: int) -> bool:
        """Whether one is to be written after so many steps."""
        return self._every is not None and done % self._every == 0

    def start(self) -> Start | None:
        """Where to go on: behind the newest whole checkpoint; None for a run that has none. Metrics that were
        recorded after it are cut off, since they will be recorded again.

        Raises:
            ConfigError: All checkpoints are damaged, or the newest is of another number of processes or of
                another config than the saved one.
        """
        found = self._world.broadcast(self._world.on_main(self._newest))
        if self._world.is_main:
            self._tracker.go_back(0 if found is None else found.facts.metrics_bytes)
        if found is None:
            return None
        log.info("Going on behind step %d, from %s.", found.facts.step, found.folder)
        own = state.load(found.folder / self._own_name())
        shards = found.folder / self._shards_name()
        trained = state.load(shards if shards.exists() else found.folder / TRAINED)
        return Start(found.facts.step, own["manager"], own["loop"], own["random"], trained)

    def write(
        self, step: int, trained: Trained, manager: Mapping[str, Any], loop: Mapping[str, Any],
        random: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Save the state behind so many steps; the checkpoint appears once all processes have written.

        Args:
            manager: The manager's state, taken now: its score rows are on disk.
            loop: The training loop's.
            random: The random state; by default that of now.

        Raises:
            OSError: The system does not take it; nothing of it is left then.
        """
        began = time.perf_counter()
        partial = self._partial(step)
        try:
            own = {"manager": manager, "loop": loop, "random": random or trained.random_state()}
            state.save(own, partial / self._own_name())
            if trained.is_sharded:
                state.save(trained.state(), partial / self._shards_name())
            elif self._world.is_main:
                state.save(trained.state(), partial / TRAINED)
            self._world.barrier()
            if self._world.is_main:
                folder = files.seal(partial, self._facts(step), self._keep)
                log.info("Checkpoint %s, in %.1f s.", folder, time.perf_counter() - began)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._world.barrier()

    def _newest(self) -> Checkpoint | None:
        if not files.folders(self._out):
            self._start_again()
            return None
        found = files.newest_whole(self._out)
        if found is None:
            raise ConfigError(
                f"{self._out / files.FOLDER} has no checkpoint that is whole, so the run cannot go on: "
                "restore one, or start again in another directory"
            )
        written_by, now = found.facts.world_size, self._world.world_size
        if written_by != now:
            raise ConfigError(
                f"{found.folder} was written by world_size={written_by} processes, and this run has "
                f"world_size={now}: start it with {written_by}"
            )
        refuse_edited_config(self._out, found.facts.fingerprint)
        return found

    def _start_again(self) -> None:
        """Remove what an unfinished run has scored before its first checkpoint; that is scored again."""
        scores = self._out / "scores"
        if scores.exists():
            shutil.rmtree(scores)
        if self._tracker.metrics_bytes():
            log.warning("%s has an unfinished run without a checkpoint: starting again at step 0.", self._out)

    def _facts(self, step: int) -> Facts:
        return Facts(
            step, self._world.world_size, saved_fingerprint(self._out), self._tracker.metrics_bytes()
        )

    def _partial(self, step: int) -> Path:
        if self._world.is_main:
            partial = files.partial_folder(self._out, step)
        self._world.barrier()
        return self._world.broadcast(partial if self._world.is_main else None)

    def _own_name(self) -> str:
        return f"rank-{self._world.rank:05d}.pt"

    def _shards_name(self) -> str:
        return f"training-{self._world.rank:05d}.pt"
