"""The jobs of a sweep as they are typed: composed, checked and written down before the first one starts.

Hydra's own launchers compose a job's config where the job starts, from the files as they are by then. Here
the submitting process composes it, and the job reads `config.frozen.yaml`: what is edited while jobs wait
changes none of them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from conf.errors import ConfigError, UserError
from ghost.atomic import write_atomically
from runners.identity import differences, fingerprint
from runners.sweep.record import FROZEN_FILE, Status, read_job
from runners.validate import check


@dataclass(frozen=True, eq=False)
class Job:
    """One job of a sweep.

    Attributes:
        number: Its place in the sweep, from 0.
        overrides: What its config is composed with.
        own: Those of the overrides that tell it from other jobs.
        directory: Its run directory, absolute.
        cfg: Its config, with Hydra's own node.
        fingerprint: `runners.identity.fingerprint` of it.
    """

    number: int
    overrides: tuple[str, ...]
    own: tuple[str, ...]
    directory: Path
    cfg: DictConfig
    fingerprint: str

    @property
    def name(self) -> str:
        """`job 3 (seed=3)`."""
        return _name(self.number, self.own)


def compose_jobs(
    context: HydraContext, master: DictConfig, overrides: Sequence[Sequence[str]], first: int
) -> list[Job]:
    """The jobs of the given overrides, numbered from `first`.

    Raises:
        ConfigError: A job's config cannot work, or two jobs have one directory; nothing was written.
    """
    shared = {str(typed) for typed in master.hydra.overrides.task}
    if len(overrides) > 1:
        shared |= set.intersection(*map(set, overrides))
    jobs = []
    for number, all_ in enumerate(overrides, first):
        own = tuple(one for one in filter_overrides(all_) if one not in shared)
        jobs.append(_compose(context, master, number, tuple(all_), own))
    met: dict[Path, Job] = {}
    for job in jobs:
        if job.directory in met:
            raise ConfigError(
                f"hydra.sweep.subdir={job.cfg.hydra.sweep.subdir} is the directory of "
                f"{met[job.directory].name} and of {job.name}: leave it out, or let it tell jobs apart"
            )
        met[job.directory] = job
        refuse_other_run(job)
    return jobs


def _name(number: int, own: tuple[str, ...]) -> str:
    return f"job {number} ({' '.join(own)})" if own else f"job {number}"


def _compose(
    context: HydraContext, master: DictConfig, number: int, overrides: tuple[str, ...], own: tuple[str, ...]
) -> Job:
    cfg = context.config_loader.load_sweep_config(master, list(overrides))
    with open_dict(cfg.hydra):
        cfg.hydra.job.num = number
        cfg.hydra.job.id = f"{cfg.hydra.job.name}_{number}"
        cfg.hydra.sweep.dir = os.path.abspath(cfg.hydra.sweep.dir)
        cfg.hydra.sweep.subdir = str(cfg.hydra.sweep.subdir)
        directory = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
        cfg.hydra.runtime.output_dir = str(directory)
    try:
        with _of_hydra(cfg):
            check(run_config(cfg))
            return Job(number, overrides, own, directory, cfg, fingerprint(run_config(cfg)))
    except UserError as error:
        raise ConfigError(f"{_name(number, own)}: {error}") from error


def refuse_other_run(job: Job) -> None:
    """Raises `ConfigError` if the job's directory holds a run that computes something else, or one that has
    finished and is not to be skipped.
    """
    path = job.directory / "config.yaml"
    if not path.exists():
        return
    with _of_hydra(job.cfg):
        found = differences(run_config(job.cfg), OmegaConf.load(path))  # type: ignore[arg-type]
    if found:
        raise ConfigError(
            f"hydra.sweep.dir={job.directory.parent} holds another run where {job.name} belongs "
            f"({', '.join(found[:3])}): choose another directory"
        )
    record = read_job(job.directory)
    if not job.cfg.sweep.skip_finished and record is not None and record.status == Status.finished:
        raise ConfigError(
            f"sweep.skip_finished=false would run {job.name} again where it has finished: choose another "
            "hydra.sweep.dir"
        )


def freeze(job: Job) -> None:
    """Write the job's config into its directory, with every value in place."""
    with _of_hydra(job.cfg):
        own = OmegaConf.to_container(run_config(job.cfg), resolve=True, enum_to_str=True)
    hydra = OmegaConf.to_container(job.cfg.hydra, resolve=False, enum_to_str=True)
    assert isinstance(own, dict)
    assert isinstance(hydra, dict)
    own["output_dir"] = "${hydra:runtime.output_dir}"  # as composed: it says where Hydra has put the run
    for unused in ("help", "hydra_help"):
        del hydra[unused]
    text = OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra, **own}))
    job.directory.mkdir(parents=True, exist_ok=True)
    write_atomically(job.directory / FROZEN_FILE, lambda file: file.write(text.encode()))


def frozen_config(directory: Path) -> DictConfig:
    """The config that `freeze` wrote, with Hydra's node typed as Hydra wants it."""
    cfg = OmegaConf.load(directory / FROZEN_FILE)
    assert isinstance(cfg, DictConfig)
    typed = OmegaConf.structured(HydraConf)
    OmegaConf.set_struct(typed, False)  # Hydra adds keys of its own to it
    cfg.hydra = OmegaConf.merge(typed, cfg.hydra)
    return cfg


def run_config(cfg: DictConfig) -> DictConfig:
    """The config without Hydra's own node."""
    own = cfg.copy()
    OmegaConf.set_struct(own, False)
    del own["hydra"]
    return own


@contextmanager
def _of_hydra(cfg: DictConfig) -> Iterator[None]:
    """In the block `${hydra:…}` speaks of this job."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(cfg)
    try:
        yield
    finally:
        instance.cfg = before
