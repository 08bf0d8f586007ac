import json
from pathlib import Path

import pytest

from runners.metrics_log import MetricsLog


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_reserved_metric_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'step'"):
        MetricsLog(tmp_path).append(1, {"step": 1.0})


def test_unfinished_line_of_a_killed_process_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricsLog(tmp_path)
    metrics.path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    metrics.append(2, {"loss": 1.5})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 2.0), (2, 1.5)]
    assert "unfinished line" in caplog.text


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path)
    metrics.append(1, {"loss": 1.0})
    assert rows(tmp_path)[0]["loss"] == 1.0
    metrics.close()
    metrics.append(2, {"loss": 0.5})
    assert len(rows(tmp_path)) == 2
