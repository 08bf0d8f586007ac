"""Runs of a command that makes several, one after another in this process, each in a directory of its own."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from analysis.runs import Run, load_run
from analysis.tracking_store import resolve_uri
from conf.errors import ConfigError, UserError
from conf.help_text import typed
from runners.mlflow_store import open_store
from runners.progress import duration
from runners.tracking import build_tracker, flatten
from runners.tracking_record import RECORD_FILE, RUNNING, Record
from runners.train import recorded_run
from runners.upload import bring_up_to_date, close_killed

log = logging.getLogger(__name__)

RECORD, JOURNAL, ASIDE = "retrain.yaml", "finished.txt", "unfinished"


class Runs:
    """Runs that go on where an earlier call of the same command ended.

    A run that an earlier call finished is taken as it is; what is left of an unfinished one is moved to
    `unfinished/`, and it starts anew.
    """

    def __init__(self, out: Path, cwd: Path, total: int, parent_run_id: str | None) -> None:
        """Prepare; nothing is made before `made`.

        Args:
            out: The command's directory.
            cwd: Where the command was typed.
            total: How many runs there will be.
            parent_run_id: The MLflow run that the runs are shown under; None: none.
        """
        self._out = out
        self._cwd = cwd
        self._total = total
        self._parent_run_id = parent_run_id
        self._journal = out / JOURNAL
        self._finished = set(self._journal.read_text().splitlines()) if self._journal.exists() else set()
        self._met = 0
        self._seconds: list[float] = []  # of the runs that were made here

    def made(self, group: str, seed: int, cfg: DictConfig) -> Run:
        """The finished run `group/seed-N`.

        Raises:
            ConfigError, DataError, GhostError: as `runners.train.run`.
        """
        name = f"{group}/seed-{seed}"
        folder = self._out / name
        self._met += 1
        if name in self._finished:
            log.info("Run %d of %d: %s is there.", self._met, self._total, name)
            return replace(load_run(folder), name=name)
        log.info("Run %d of %d: %s%s", self._met, self._total, name, self._remaining())
        self._set_aside(folder, cfg.tracking)
        cfg.output_dir = str(folder)
        began = time.monotonic()
        self._make(folder, cfg, {"retrain.group": group, "retrain.seed": str(seed)})
        self._seconds.append(time.monotonic() - began)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        return replace(load_run(folder), name=name)

    def _make(self, folder: Path, cfg: DictConfig, tags: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        with (
            logged_to(folder / "run.log"),
            build_tracker(cfg.tracking, folder, self._cwd, parent_run_id=self._parent_run_id) as tracker,
        ):
            recorded_run(cfg, tracker, tags)

    def _set_aside(self, folder: Path, tracking: DictConfig) -> None:
        """Move what an unfinished run left out of the way."""
        if not folder.exists():
            return
        name = "-".join(folder.parts[-2:])
        number = 0
        while (target := self._out / ASIDE / f"{name}-{number}").exists():
            number += 1
        target.parent.mkdir(exist_ok=True)
        folder.replace(target)
        log.warning("%s was not finished: what is left of it is now in %s", folder, target)
        if self._parent_run_id is not None and (target / RECORD_FILE).exists():
            end_killed(target, tracking, self._cwd)

    def _remaining(self) -> str:
        """An estimate of the time left, once a run has been timed."""
        if not self._seconds:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return f" (about {duration(mean * (self._total - self._met + 1))} left)"


def end_killed(folder: Path, tracking: DictConfig, cwd: Path) -> None:
    """End the MLflow run of an attempt that was killed; the run that starts anew has one of its own."""
    try:
        record = Record.read(folder)
        if record.status == RUNNING and close_killed(record, folder, ended=True):
            store = open_store(resolve_uri(tracking.uri, cwd), tracking.experiment)
            bring_up_to_date(record, folder, store)
    except UserError as error:
        log.warning("MLflow still shows the unfinished run as it was: %s", error)


def begin(cfg: DictConfig, out: Path, record: str = RECORD) -> None:
    """Write the command's config into its directory, or hold it against the one that is there.

    Args:
        record: The file's name.

    Raises:
        ConfigError: A key has another value than when the directory was begun.
    """
    path = out / record
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if not path.exists():
        OmegaConf.save(resolved, path)
        return
    # Written and read again, as the other was.
    old = flatten(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    new = flatten(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(resolved))))  # type: ignore[arg-type]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{name}={typed(new.get(name))} is not what hydra.run.dir={out} was begun with: type "
                f"{name}={typed(old.get(name))}, or choose another directory"
            )


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """What is logged in the block goes to this file too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
