"""One process at a time in a run directory, and only where a run may begin or go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from conf.errors import ConfigError, UserError
from runners.resume.names import CONFIG_FILE, LOCK_FILE

if TYPE_CHECKING:
    from runners.world import World


def enter(cfg: DictConfig, directory: Path, key: str) -> FileLock | None:
    """Take a directory for this process, until the lock is released or the process ends, however it ends;
    None where there is no directory yet, and nobody to share it with.

    Args:
        cfg: The config, its directory aside.
        key: What names the directory on the command line.

    Raises:
        ConfigError: Another process runs there, it cannot be written, or it holds a run that this one would
            not go on with.
    """
    if not directory.is_dir():
        return None
    lock = _held(directory.resolve(), key)
    if (directory / CONFIG_FILE).exists():
        # Of all command lines only one that names such a directory pays for this import.
        from runners.resume.earlier import refuse_other_run

        try:
            refuse_other_run(cfg, directory, key)
        except UserError:
            lock.release(force=True)
            raise
    return lock


@contextmanager
def entered(cfg: DictConfig, directory: Path, key: str, world: "World") -> Iterator[None]:
    """The same for a block; of several processes the main one takes the directory. Raises as `enter`."""
    lock = world.on_main(lambda: enter(cfg, directory, key))
    try:
        yield
    finally:
        if lock is not None:
            lock.release(force=True)


def _held(directory: Path, key: str) -> FileLock:
    lock = FileLock(directory / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{key}={directory} is in use by another process: wait for it or stop it, or choose another "
            "directory"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{key}={directory} cannot be written ({error.strerror}): choose another directory"
        ) from error
    return lock
