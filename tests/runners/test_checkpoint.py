"""`trainer.save_model`: what is written is what was trained, and a later run takes it."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from runners import train
from runners.models import build_model
from tests.runners.conftest import Line
from tests.runners.test_train import TOKENS, saved_config, write_tokens


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models of the runs that follow, as training leaves them."""
    built: list[nn.Module] = []

    def build(*arguments: object) -> nn.Module:
        built.append(build_model(*arguments))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(train, "build_model", build)
    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setattr(train, "leave_report", lambda *_: None)
    return built


@pytest.mark.parametrize("engine", ["graddotprod", "regular"])
def test_the_saved_weights_are_the_trained_ones(
    line: Line, tmp_path: Path, trained: list[nn.Module], engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens")
    assert line(*TOKENS, f"engine={engine}", "trainer.save_model=true", "hydra.run.dir=run") == 0
    folder = tmp_path / "run" / "model"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert str(folder.relative_to(tmp_path)) in capsys.readouterr().out
    cfg = saved_config(tmp_path / "run")
    cfg.model.path = str(folder)
    again = build_model(cfg.model, 50, None, None)
    for name, value in trained[0].state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    assert not list((tmp_path / "run").glob(".model*"))


def test_a_later_run_starts_from_them(line: Line, tmp_path: Path, trained: list[nn.Module]) -> None:
    write_tokens(tmp_path / "tokens")
    assert line(*TOKENS, "trainer.save_model=true", "hydra.run.dir=run") == 0
    assert line(*TOKENS, "model.path=run/model", "trainer.eval_only=true", "hydra.run.dir=again") == 0
    first, second = (model.state_dict() for model in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_saved_unless_asked(line: Line, tmp_path: Path, trained: list[nn.Module]) -> None:
    write_tokens(tmp_path / "tokens")
    assert line(*TOKENS, "hydra.run.dir=run") == 0
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("large", [False, True])
def test_weights_are_uploaded_only_when_asked(
    line: Line, tracked_cwd: Path, trained: list[nn.Module], large: bool
) -> None:
    write_tokens(tracked_cwd / "tokens")
    options = ["tracking=mlflow", f"tracking.upload_large={str(large).lower()}"]
    assert line(*TOKENS, "trainer.save_model=true", *options, "hydra.run.dir=run") == 0
    client = MlflowClient(f"sqlite:///{tracked_cwd / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    names = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert ("model" in names) == large
    assert {"config.yaml", "scores", ".hydra"} <= names
