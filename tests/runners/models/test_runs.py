"""Whole runs of every tiny model, by the command line that a user types."""

import json
from math import isfinite
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from runners import train
from tests.runners.conftest import Line
from tests.runners.models.zoo import TINY

TEXT = ["data=text", "data.path=corpus", "data.val_samples=4"]
IMAGES = ["data=digits", "data.as_image=true"]
DATA = {
    "t5-tiny": [*TEXT, "data.task=seq2seq", "data.seq_len=32"],
    "bert-tiny": [*TEXT, "data.task=text_classes", "data.seq_len=16"],
    "vit-tiny": IMAGES,
    "resnet-tiny": IMAGES,
    "cnn": IMAGES,
    "mlp": ["data=digits"],
    "llava-tiny": ["data=digit_questions", "data.train_samples=24", "data.val_samples=6"],
}
SHORT = [
    "trainer.max_steps=3", "trainer.batch_size=4", "trainer.warmup_steps=0", "trainer.eval_batch_size=64",
    "trainer.eval_every=3", "trainer.overhead_probes=1", "hardware.threads=1", "tracking=none",
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> None:
    """Two domains of counting in words and in figures."""
    (tmp_path / "corpus").mkdir()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for name, count in (("words", lambda i: words[i % 9]), ("figures", str)):
        (tmp_path / "corpus" / f"{name}.txt").write_text(" ".join(count(i) for i in range(400)) + "\n")


@pytest.mark.parametrize("engine", ["regular", "graddotprod"])
@pytest.mark.parametrize("name", TINY)
def test_a_run(
    name: str, engine: str, line: Line, corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setattr(train, "leave_report", lambda *_: None)
    data = DATA.get(name, [*TEXT, "data.seq_len=16"])
    folder = tmp_path / "run"
    assert line(f"model={name}", *data, f"engine={engine}", *SHORT, f"hydra.run.dir={folder}") == 0
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(isfinite(row["val/loss"]) for row in rows if "val/loss" in row)
    if engine == "graddotprod":
        values = pq.read_table(folder / "values.parquet").column("value").to_pylist()
        assert len(values) == 12
        assert all(map(isfinite, values))
        assert json.loads((folder / "coverage.json").read_text())["scored_parameter_share"] == 1.0


@pytest.mark.parametrize("name", TINY)
def test_a_dry_run(
    name: str, line: Line, corpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DATA.get(name, [*TEXT, "data.seq_len=16"])
    assert line(f"model={name}", *data, "dry_run=true", f"hydra.run.dir={tmp_path}/run") == 0
    shown = capsys.readouterr().out
    assert f"{name}, " in shown
    assert "parameters in float32" in shown
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny", "bert-tiny", "resnet-tiny", "llava-tiny"])
def test_scores_are_those_of_plain_autograd(name: str, line: Line, corpus: None, tmp_path: Path) -> None:
    data = DATA.get(name, [*TEXT, "data.seq_len=16"])
    assert line(f"model={name}", *data, "verify=true", *SHORT, f"hydra.run.dir={tmp_path}/run") == 0
    record = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert record["total"]["relative"] < 1e-4
    assert not record["unscored"]
