"""Starts processes that run a command line of `run.py`, each forked from one that has imported everything.

Reads a JSON line a request and answers with one: `{"argv", "cwd", "log", "kill_at", "full_at"}` gives
`{"pid"}`, `{"wait": pid}` gives `{"status"}`, negative for a signal. The process leads a group of its own. It
counts how often it changes names on disk (renames, removals): right before the change `kill_at` it kills
itself with SIGKILL; from the change `full_at` on the system takes no byte that it writes to a file. One that
ends by itself writes their number to `<log>.changes`.
"""

import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import sklearn.datasets  # noqa: F401  (what runs import late, once for all)
import torch

import runners.project
import runners.train
from ghost.kernels import cpu
from runners import cli

CHANGES = ("replace", "rename", "unlink", "rmdir")


def main() -> None:
    """Serve until the input ends."""
    # What draws is imported by nobody's run directory, and takes longer than the training.
    runners.train.plot_run = lambda _: []  # type: ignore[assignment]
    runners.train.leave_report = lambda *_: None
    torch.set_num_threads(1)
    cpu.library()  # compiled once for all, and no change on disk that a run makes
    logs: dict[int, subprocess.Popen[bytes]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            logs.pop(request["wait"]).communicate()
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            with open(request["log"], "ab") as output:
                # Through a pipe, since what the process itself may write to files can be limited.
                log = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
            answer = {"pid": _forked(request, log)}
            logs[answer["pid"]] = log
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _forked(request: dict[str, Any], log: "subprocess.Popen[bytes]") -> int:
    assert log.stdin is not None
    pid = os.fork()
    if pid == 0:
        os.dup2(log.stdin.fileno(), 1)
        os.dup2(log.stdin.fileno(), 2)
        _run(**request)
    return pid


def _run(argv: list[str], cwd: str, log: str, kill_at: int | None, full_at: int | None) -> NoReturn:
    os.setsid()
    os.chdir(cwd)
    sys.argv = ["run.py", *argv]
    changes = itertools.count(1)
    for name in CHANGES:
        setattr(os, name, _counted(getattr(os, name), changes, kill_at, full_at))
    status = 1
    try:
        status = cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        if full_at is None:
            Path(f"{log}.changes").write_text(str(next(changes) - 1), encoding="utf-8")
        os._exit(status % 256)


def _counted(
    change: Callable[..., Any], changes: "itertools.count[int]", kill_at: int | None, full_at: int | None
) -> Any:
    def counted(*arguments: Any, **keys: Any) -> Any:
        number = next(changes)
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return change(*arguments, **keys)

    return counted


if __name__ == "__main__":
    main()
