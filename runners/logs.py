"""Each process's log: a file of its own in the run directory, and one voice on the console."""

import logging
from pathlib import Path

from runners.resume.log_file import LogFile
from runners.world import World


def log_file(rank: int) -> str:
    """The name of a process's log in the run directory."""
    return "run.log" if rank == 0 else f"run-rank{rank:05d}.log"


def log_by_rank(world: World, directory: Path) -> None:
    """Give this process's records a file of their own; on the console, only the main process says more than
    warnings and errors. Hydra has set up logging for one process.
    """
    if world.is_main:
        return
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            own = LogFile(directory / log_file(world.rank))
            own.setFormatter(handler.formatter)
            root.addHandler(own)
            root.removeHandler(handler)
            handler.close()
        elif isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            handler.setFormatter(
                logging.Formatter(f"[%(asctime)s] %(levelname)s rank {world.rank}: %(message)s", "%H:%M:%S")
            )


def quieten_console() -> None:
    """From now on this process's records go to its file alone."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
