"""How this process was started: alone, by torchrun, or as a task of a SLURM step. Torch is not imported."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from conf.errors import ConfigError

# Below the ports that Linux hands out by itself.
FIRST_PORT, PORTS = 16_000, 16_000
_RESOLVE_SECONDS = 30.0


@dataclass(frozen=True)
class Launch:
    """The processes that were started together.

    Attributes:
        rank: This process's number among all, from 0.
        world_size: How many there are.
        local_rank: Its number on its own machine.
        local_world_size: How many there are on its machine.
        address, port: Where they find each other.
        command: What was typed before `run.py`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0
    command: tuple[str, ...] = ("python",)


def launched(environ: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun's variables say, else what SLURM's say of the step that this process is a task of.

    Raises:
        ConfigError: They are incomplete, or no numbers.
    """
    if int_of(environ, "WORLD_SIZE", 1) > 1:
        return _by_torchrun(environ)
    # Not SLURM_NTASKS: a batch script has that as well, and is one process.
    if int_of(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _by_slurm(environ)
    return Launch()


def _by_torchrun(environ: Mapping[str, str]) -> Launch:
    world_size, local = int_of(environ, "WORLD_SIZE"), int_of(environ, "LOCAL_WORLD_SIZE")
    machines = world_size // local
    several = ("--nnodes", str(machines)) if machines > 1 else ()
    return Launch(
        rank=int_of(environ, "RANK"),
        world_size=world_size,
        local_rank=int_of(environ, "LOCAL_RANK"),
        local_world_size=local,
        address=text_of(environ, "MASTER_ADDR"),
        port=int_of(environ, "MASTER_PORT"),
        command=("torchrun", *several, "--nproc-per-node", str(local)),
    )


def _by_slurm(environ: Mapping[str, str]) -> Launch:
    world_size, machines = int_of(environ, "SLURM_STEP_NUM_TASKS"), int_of(environ, "SLURM_STEP_NUM_NODES")
    # Steps of one job may run at once on the same machine.
    place = int_of(environ, "SLURM_JOB_ID") * 31 + int_of(environ, "SLURM_STEP_ID")
    return Launch(
        rank=int_of(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=int_of(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on(int_of(environ, "SLURM_NODEID"), environ),
        address="127.0.0.1" if machines == 1 else first_host(text_of(environ, "SLURM_STEP_NODELIST")),
        port=FIRST_PORT + place % PORTS,
        command=("srun", "--ntasks", str(world_size), "python"),
    )


def _tasks_on(machine: int, environ: Mapping[str, str]) -> int:
    """How many tasks the step has on a machine, from SLURM's `2(x3),1`: three machines of two, one of one."""
    tasks: list[int] = []
    for part in text_of(environ, "SLURM_STEP_TASKS_PER_NODE").split(","):
        number, _, times = part.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks[machine]


def first_host(hosts: str) -> str:
    """The first machine of a SLURM node list such as `gpu[03-06,11]`.

    Raises:
        ConfigError: `scontrol`, which knows the notation, is missing or refuses.
    """
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        raise ConfigError(f"the step runs on {hosts}, and there is no scontrol to tell its first machine")
    asked = subprocess.run(
        [scontrol, "show", "hostnames", hosts],
        capture_output=True, text=True, timeout=_RESOLVE_SECONDS, check=False,
    )  # fmt: skip
    if asked.returncode or not asked.stdout.split():
        raise ConfigError(f"scontrol show hostnames {hosts} does not answer: {asked.stderr.strip()}")
    return asked.stdout.split()[0]


def text_of(environ: Mapping[str, str], name: str) -> str:
    """The variable; raises `ConfigError` where it is missing."""
    if not environ.get(name):
        raise ConfigError(f"{name} is not set, and the run was started as one of several processes")
    return environ[name]


def int_of(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The variable as a number; raises `ConfigError` where it is none, or missing without a default."""
    if default is not None and not environ.get(name):
        return default
    text = text_of(environ, name)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a whole number")
    return int(text)


def torchrun_command(processes: int) -> str:
    """What to type to start this command line in so many processes on this machine."""
    return shlex.join(["torchrun", "--nproc-per-node", str(processes), "run.py", *sys.argv[1:]])
