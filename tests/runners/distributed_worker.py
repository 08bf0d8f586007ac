"""One of several processes that run command lines one after the other, in one group.

`python -m tests.runners.distributed_worker FILE [FAULT]`: FILE is a JSON list of lists of arguments. A fault
happens on the process of rank 1, in the third step.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from conf.errors import ConfigError
from runners import cli, train
from runners.launch import launched
from runners.world import joined_world


def crash() -> None:
    raise RuntimeError("the third update is too much")


def mistake() -> None:
    raise ConfigError("data.path=x is gone")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[], None]] = {"crash": crash, "mistake": mistake, "kill": kill}


def main(arguments: list[str]) -> int:
    """Runs the lines until one fails; returns its exit code."""
    train.plot_run = lambda *_: []  # type: ignore[attr-defined]
    train.leave_report = lambda *_: None  # type: ignore[attr-defined]
    for fault in arguments[1:]:
        _plant(FAULTS[fault])
    with joined_world():
        for line in json.loads(Path(arguments[0]).read_text()):
            sys.argv = ["run.py", *line]
            if code := cli.main():
                return code
            gc.collect()
    return 0


def _plant(fault: Callable[[], None]) -> None:
    steps = iter(range(100))
    clip = nn.utils.clip_grad_norm_

    def clip_or_fail(*given: Any) -> Any:
        if launched().rank == 1 and next(steps) == 2:
            fault()
        return clip(*given)

    nn.utils.clip_grad_norm_ = clip_or_fail


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
