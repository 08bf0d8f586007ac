"""`verify=true`: a table and a record, and an exit code that says whether the scores are right."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor, nn

from conf.command import FAILED, MISTAKE
from ghost.gradients import Materialised, OuterProducts, SampleGradients
from ghost.layers import base, register_layer
from ghost.layers.linear import LinearRule, as_tokens
from tests.runners.conftest import Line
from tests.runners.test_train import DIGITS, TOKENS, write_tokens


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    write_tokens(tmp_path / "tokens")
    return tmp_path / "run"


@pytest.fixture
def wrong_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose weight's gradient is twice what it should be."""
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))

    @register_layer(nn.Linear)
    class Doubled(LinearRule):
        def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
            x, grad = as_tokens(x), as_tokens(grad)
            return {"weight": OuterProducts(2 * grad, x), "bias": Materialised(grad.sum(1))}

        def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return super().forward(module, params, x)


RIGHT = [
    ["engine.val_mode=concat"],
    ["engine.val_mode=separate", "engine.val_batch_size=2", "trainer.gradient_accumulation_steps=3"],
    ["engine.val_mode=separate", "engine.bitwise=true", "dtype=bf16_mixed"],
    ["dtype=fp16_mixed", "layers=attn"],
    ["dtype=bf16", "model.config.resid_pdrop=0.1", "engine.algebra=fused"],
]


@pytest.mark.parametrize("options", RIGHT, ids=[option[-1] for option in RIGHT])
def test_right_scores_end_well(
    line: Line, folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert line(*TOKENS, "verify=true", *options, f"hydra.run.dir={folder}") == 0
    out = capsys.readouterr().out
    record = json.loads((folder / "verify.json").read_text())
    assert record["passed"] is True
    assert record["rows"] == (6 if "trainer.gradient_accumulation_steps=3" in options else 4)
    for row in record["layers"]:
        assert row["name"] in out
    assert "Passed on" in (folder / "run.log").read_text()
    assert {path.name for path in folder.iterdir()} == {".hydra", ".run.lock", "run.log", "verify.json"}


def test_tables_are_checked_too(line: Line, folder: Path) -> None:
    assert line(*DIGITS, "verify=true", f"hydra.run.dir={folder}") == 0
    assert json.loads((folder / "verify.json").read_text())["val_rows"] == 64


@pytest.mark.usefixtures("wrong_linear")
def test_wrong_scores_exit_with_1_and_name_the_layer(
    line: Line, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line(*DIGITS, "verify=true", f"hydra.run.dir={folder}") == FAILED
    printed = capsys.readouterr()
    record = json.loads((folder / "verify.json").read_text())
    assert record["passed"] is False
    assert set(record["failed"]) == {"0", "2", "4"}
    assert "FAILED" in printed.out
    last = printed.err.splitlines()[-1]
    assert "ERROR Failed on" in last
    assert repr(record["failed"][0]) in last
    assert "Traceback" not in printed.err


@pytest.mark.usefixtures("wrong_linear")
def test_a_sweep_goes_on_after_a_failed_check(line: Line, folder: Path) -> None:
    assert line("-m", *DIGITS, "verify=true", "seed=0,1", f"hydra.sweep.dir={folder}") == FAILED
    assert len(list(folder.glob("*/verify.json"))) == 2


def test_strict_refuses_to_train_with_gaps(
    line: Line, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = line(*TOKENS, "engine.strict=true", "layers=attn", f"hydra.run.dir={folder}")
    assert ended == MISTAKE
    assert "transformer.h.*.mlp.c_fc" in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "scores").exists()


def test_a_run_says_at_its_start_what_is_not_scored(
    line: Line, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runners.train.plot_run", lambda _: [])
    assert line(*TOKENS, "layers=attn", "trainer.max_steps=1", f"hydra.run.dir={folder}") == 0
    log = (folder / "run.log").read_text()
    assert "Family mlp: " in log
    assert "Not scored: transformer.h.*.mlp.c_fc in 2 layers (" in log
    coverage = json.loads((folder / "coverage.json").read_text())
    assert coverage["families"]["attn"]["scored_parameter_share"] == coverage["scored_parameter_share"]
