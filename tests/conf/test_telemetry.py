"""Importing the runners switches usage reports off, before the libraries that make them are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.telemetry import disable_telemetry, set_defaults

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def test_usage_reports_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    disable_telemetry()
    assert [os.environ[name] for name in VARIABLES] == ["true", "1", "true"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    set_defaults({"DO_NOT_TRACK": "true"})
    assert os.environ["DO_NOT_TRACK"] == "0"


def test_the_libraries_see_it_after_any_import_of_the_runners() -> None:
    """Each library reads its variable when it is imported; only a fresh process shows the order."""
    script = (
        "import sys, runners\n"
        "assert not {'mlflow', 'huggingface_hub'} & set(sys.modules)\n"
        "from huggingface_hub import constants\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "assert constants.HF_HUB_DISABLE_TELEMETRY and is_telemetry_disabled()\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "CI")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
