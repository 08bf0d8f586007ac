"""Before a sweep or a run begins: which launcher a sweep takes. Torch is not imported."""

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from conf.command import mistakes_end_it
from conf.errors import ConfigError
from conf.refuse import refuse
from runners.sweep.launchers import LAUNCHERS, registered


class BeginSweep(Callback):
    """Puts this project's launchers in the place of those that are typed: the same settings and ways to run,
    and configs that are frozen, one parent run, and finished jobs left out.
    """

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        with mistakes_end_it():
            if not config.sweep.skip_finished:
                refuse(config, "sweep.skip_finished", "has no effect without -m: leave it out")

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        choice = config.hydra.runtime.choices["hydra/launcher"]
        with mistakes_end_it():
            if choice not in LAUNCHERS:
                raise ConfigError(
                    f"hydra/launcher={choice} keeps no record of a sweep: type one of {', '.join(LAUNCHERS)}"
                )
        config.hydra.launcher._target_ = registered(choice)
