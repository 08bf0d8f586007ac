"""Mistakes on a command line, as Hydra reports them and as they are said."""

import pytest
from hydra.errors import MissingConfigException

from analysis.aggregate import command as aggregate
from analysis.compare import command as compare
from conf.hydra_errors import sentence
from tests.analysis.command_line import Command, in_process

__all__ = ["in_process"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("runs=code/bz2.py#4", "type \"runs='code/bz2.py#4'\", quotes within quotes"),
        ("runs=[a#1, b]", "type \"runs=['a#1','b']\", quotes within quotes"),
        ("runs={a: 1", "type key=value, with quotes around special characters"),
        ("runs=a,b", "runs=a,b has several values: write [...] for a list, or add -m to run.py"),
        ("nonsense", "'nonsense' is not an override: type key=value"),
    ],
)
def test_values_that_need_quotes_or_brackets(
    in_process: Command, argument: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_process(aggregate.main, argument) == 2
    assert said in capfd.readouterr().err


def test_a_command_of_one_thing_refuses_a_sweep(
    in_process: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_process(aggregate.main, "-m", "runs=a,b") == 2
    assert "-m is for run.py: this command does one thing at a time" in capfd.readouterr().err


def test_a_value_in_the_place_of_keys(in_process: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_process(compare.main, "groups=[a]", "baseline=a") == 2
    assert "groups=[a] is no place for a value: its keys have them" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("group", "name", "extra"),
    [("hydra/launcher", "submitit_slurm", "slurm"), ("hydra/sweeper", "optuna", "optuna")],
)
def test_a_missing_plugin_names_its_extra(group: str, name: str, extra: str) -> None:
    error = MissingConfigException("…", missing_cfg_file=f"{group}/{name}", options=["basic"])
    assert sentence(error, [], []) == f"{group}={name} needs a plugin: pip install 'ghostrunner[{extra}]'"
