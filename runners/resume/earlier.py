"""What an earlier process has left in a run directory, and whether a run may begin or go on in it."""

import json
import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from ghost.atomic import written_beside
from runners import identity
from runners.report import read_environment
from runners.resume import files
from runners.resume.names import CONFIG_FILE, FINISHED_FILE

log = logging.getLogger(__name__)

# What changes no number of a run that goes on: what is to be done about a step that it has not met, and where
# things are kept or computed twice to save memory.
_FREE_TO_CHANGE = ("trainer.non_finite=", "trainer.activation_checkpointing=", "engine.val_grad_device=")


def refuse_other_run(cfg: DictConfig, directory: Path, key: str) -> None:
    """Raises `ConfigError` unless the run in the directory is unfinished and has the same config.

    Args:
        cfg: The config, its directory aside.
        key: What names the directory on the command line.
    """
    if (directory / FINISHED_FILE).exists():
        raise ConfigError(
            f"{key}={directory} holds an earlier run, which has finished: choose another directory"
        )
    if cfg.dry_run or cfg.verify:
        raise ConfigError(f"{key}={directory} holds an earlier run: choose another directory")
    changed = [
        line
        for line in identity.differences(_reread(cfg, directory), saved_config(directory))
        if not line.startswith(_FREE_TO_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"{key}={directory} holds an unfinished run with another config, {', '.join(changed)}: type the "
            "same to go on with it, or choose another directory"
        )


def refuse_edited_config(directory: Path, fingerprint: str) -> None:
    """Raises `ConfigError` where the saved config is not the one with this fingerprint."""
    if saved_fingerprint(directory) != fingerprint:
        raise ConfigError(
            f"{directory / CONFIG_FILE} has been changed since the run's checkpoints were written: restore "
            "it, or start again in another directory"
        )


def saved_config(directory: Path) -> DictConfig:
    """The config that the run in the directory was begun with."""
    return OmegaConf.load(directory / CONFIG_FILE)  # type: ignore[return-value]


def saved_fingerprint(directory: Path) -> str:
    """`runners.identity.fingerprint` of it."""
    return identity.fingerprint(saved_config(directory))


def _reread(cfg: DictConfig, directory: Path) -> DictConfig:
    """The config written and read again, as the saved one was."""
    cfg = cfg.copy()
    cfg.output_dir = str(directory)  # known to Hydra only once the job has started
    resolved = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(resolved)))  # type: ignore[return-value]


def take_up(out: Path, data_fingerprint: str) -> dict[str, str]:
    """Make the directory of an unfinished run ready to go on in: what it has left half-written goes.

    Returns what its `environment.json` says; empty where there is no such run.

    Raises:
        ConfigError: It was of other data.
    """
    _remove_half_written(out)
    if not (out / CONFIG_FILE).exists():
        return {}
    environment = read_environment(out)
    was = environment.get("data.fingerprint", data_fingerprint)
    if was != data_fingerprint:
        raise ConfigError(
            f"the data of {out} have changed since its run was begun (fingerprint {data_fingerprint[:12]}, "
            f"not {was[:12]}): restore them, or start again in another directory"
        )
    (out / "traceback.txt").unlink(missing_ok=True)
    return environment


def tracked_run_id(out: Path) -> str | None:
    """The MLflow run of the unfinished run in the directory, to go on in."""
    return read_environment(out).get("mlflow.run_id")


def _remove_half_written(out: Path) -> None:
    for folder in (out, out / "scores", out / files.FOLDER):
        for path in folder.glob(".*.partial"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def mark_finished(out: Path) -> None:
    """Leave the record that the run came to its end and nothing of it is missing."""
    ended = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    with written_beside(out / FINISHED_FILE) as partial:
        partial.write_text(json.dumps({"finished": ended}) + "\n", encoding="utf-8")
