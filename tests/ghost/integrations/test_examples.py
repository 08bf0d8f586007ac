"""The loops in README.md and docs/integrations.md run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[3]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the example leaves behind."""
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(code, "example", "exec"), found)
    return found


def test_the_readme_s_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, *_ = examples("README.md")
    assert len(code.splitlines()) <= 24
    values = run(code, tmp_path, monkeypatch)["values"]
    assert 50 <= int((values.argsort()[:100] < 100).sum()) <= 80


def test_the_trainers_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face, lightning = examples("docs/integrations.md")
    run(hugging_face, tmp_path, monkeypatch)
    assert len(pq.read_table(tmp_path / "scores" / "values.parquet")) == 50
    run(lightning, tmp_path, monkeypatch)
    assert len(pq.read_table(tmp_path / "digits" / "values.parquet")) == 1500
