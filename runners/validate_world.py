"""Checks of what several processes can do together, before anything is built. Torch is not imported."""

from collections.abc import Sequence

from omegaconf import DictConfig

from conf.errors import ConfigError
from conf.help_text import typed
from conf.refuse import refuse
from runners.choices import TaskName
from runners.launch import Launch, torchrun_command
from runners.tasks import model_task


def check_hardware(cfg: DictConfig) -> None:
    """Raises `ConfigError` for keys of `hardware` that do not go together, however the run is started."""
    hardware = cfg.hardware
    if hardware.strategy != "fsdp":
        for key in ("offload", "reduce_dtype"):
            if hardware[key]:
                refuse(
                    cfg, f"hardware.{key}",
                    f"has no effect with hardware.strategy={hardware.strategy}: type hardware.strategy=fsdp",
                )  # fmt: skip
    elif cfg.dtype.autocast == "float16":
        refuse(
            cfg, "hardware.strategy",
            "splits gradients over processes, so that a gradient scaler sees no overflow of the others: type "
            "dtype=bf16_mixed, or hardware.strategy=ddp",
        )  # fmt: skip
    elif model_task(cfg.model) == TaskName.image_text:
        refuse(
            cfg, "hardware.strategy",
            f"gathers every block on all processes at once, and model={cfg.model.name} leaves out its vision "
            "tower where a batch has no image: type hardware.strategy=ddp",
        )  # fmt: skip
    if hardware.offload and hardware.device == "cpu":
        refuse(cfg, "hardware.offload", "has nowhere to move from with hardware.device=cpu: type false")
    if hardware.strategy == "none":
        return
    if hardware.processes == 1:
        refuse(
            cfg, "hardware.processes",
            f"leaves hardware.strategy={hardware.strategy} nothing to share: type hardware.strategy=none",
        )  # fmt: skip
    if cfg.engine.name == "gradprojlora":
        refuse(
            cfg, "hardware.strategy",
            "has no effect with engine=gradprojlora, which trains nothing: type hardware.strategy=none; any "
            "number of processes can write one store",
        )  # fmt: skip
    if cfg.verify:
        refuse(cfg, "hardware.strategy", "has no effect with verify=true: type hardware.strategy=none")


def check_world(cfg: DictConfig, launch: Launch) -> None:
    """Raises `ConfigError` where the processes that were started are not what the config needs."""
    hardware, started = cfg.hardware, launch.world_size
    if cfg.dry_run:
        _dry_run(cfg, started)
        return
    if hardware.processes is not None and hardware.processes != started:
        refuse(
            cfg, "hardware.processes",
            f"is not the number of processes that were started, {started}: type "
            f"{torchrun_command(hardware.processes)}",
        )  # fmt: skip
    if started == 1:
        if hardware.strategy != "none":
            refuse(
                cfg, "hardware.strategy",
                f"needs several processes, and this is one: type {torchrun_command(2)}, or "
                "hardware.strategy=none",
            )  # fmt: skip
        return
    if cfg.verify:
        refuse(cfg, "verify", f"checks scores in one process, and {started} were started: type python run.py")
    if cfg.engine.name == "gradprojlora":
        for key, one in (("rank", 0), ("world_size", 1)):
            if cfg.engine[key] != one:
                refuse(
                    cfg, f"engine.{key}",
                    f"is for runs that are started one by one, and this is one of {started} processes, which "
                    f"share the corpus by themselves: type engine.{key}={one}",
                )  # fmt: skip
    elif hardware.strategy == "none":
        refuse(
            cfg, "hardware.strategy",
            f"is for one process, and {started} were started: type hardware=ddp, or hardware=fsdp",
        )  # fmt: skip


def check_one_process(cfg: DictConfig, launch: Launch) -> None:
    """Raises `ConfigError` for several processes, started or asked for, of a command that is one."""
    if launch.world_size > 1:
        raise ConfigError(
            f"this command is one process, and {launch.world_size} were started: type python in place of "
            "what started them"
        )
    for key, one in (("strategy", "none"), ("processes", None)):
        if cfg.hardware[key] not in (one, 1):
            refuse(
                cfg, f"hardware.{key}",
                f"has no effect with this command, which is one process: type hardware.{key}={typed(one)}",
            )  # fmt: skip


def refuse_sweep(arguments: Sequence[str], launch: Launch) -> None:
    """Raises `ConfigError` for a sweep that each of several processes would begin."""
    if launch.world_size > 1 and {"-m", "--multirun"} & {*arguments}:
        raise ConfigError(
            f"-m starts jobs, and this is one of {launch.world_size} processes that would each start them: "
            "type python run.py -m with hydra/launcher=…, or this without -m"
        )


def _dry_run(cfg: DictConfig, started: int) -> None:
    if started > 1:
        refuse(cfg, "dry_run", f"builds nothing that {started} processes would share: type python run.py …")
    if cfg.hardware.strategy != "none" and cfg.hardware.processes is None:
        refuse(
            cfg, "hardware.processes",
            "leaves open how many processes would share the run: type hardware.processes=2, say",
        )  # fmt: skip
