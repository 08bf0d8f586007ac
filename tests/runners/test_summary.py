import io
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from runners.summary import SampleValue, domain_values, print_summary, replay_command, split_ends

NOTE = "plain gradient dot product; the optimizer is AdamW, so values are a first-order SGD proxy"


def records(values: list[float], prefix: str = "code:module.py:") -> list[dict]:
    return [
        {"sample_id": f"{prefix}{i}", "domain": "code" if i % 2 else "docs", "value": value, "times_seen": 2}
        for i, value in enumerate(values)
    ]


def printed(
    values: pa.Table | list[dict], width: int = 80, run_dir: Path = Path("/runs/one"), **changes: Any
) -> str:
    stream = io.StringIO()
    arguments: dict[str, Any] = {
        "previews": None,
        "ui_command": "mlflow ui --backend-store-uri sqlite:////a/long/path/to/a/store/mlflow.db --workers 1",
        "run_url": "http://127.0.0.1:5000/#/experiments/1/runs/"
        + 32 * "a"
        + "?workflowType=machine_learning",
        "replay_command": replay_command(["engine=graddotprod", "model=gpt2"]),
        "notes": [NOTE],
    } | changes
    print_summary(run_dir, values, console=Console(file=stream, width=width), **arguments)
    return stream.getvalue()


def column(text: str, title: str) -> list[str]:
    """First cells of the rows of one table, folded ones put together."""
    table = text[text.index(title) :].split("└")[0]
    return re.findall(r"^│ (.*?) *│", table, flags=re.MULTILINE)


def test_both_ends_in_order_and_none_twice() -> None:
    text = printed(records([0.1 * i for i in range(-6, 6)]))
    assert column(text, "Most helpful") == [f"code:module.py:{i}" for i in (11, 10, 9, 8, 7)]
    assert column(text, "Most harmful") == [f"code:module.py:{i}" for i in (0, 1, 2, 3, 4)]
    assert "+5.000e-01" in text
    assert "-6.000e-01" in text


def test_parquet_table_is_taken_as_well() -> None:
    rows = records([1.0, -1.0])
    assert printed(pa.Table.from_pylist(rows)) == printed(rows)


def test_few_samples_appear_once() -> None:
    rows = [SampleValue(str(i), "d", 3.0 - i, 1) for i in range(3)]
    highest, lowest = split_ends(rows)
    assert [row.sample_id for row in highest] == ["0", "1"]
    assert [row.sample_id for row in lowest] == ["2"]
    assert split_ends(rows[:1]) == (rows[:1], [])


@pytest.mark.parametrize(
    ("values", "present", "absent"),
    [([1.0, 2.0], "Least helpful", "Most harmful"), ([-1.0, -2.0], "Least harmful", "Most helpful")],
)
def test_headings_follow_the_signs(values: list[float], present: str, absent: str) -> None:
    text = printed(records(values))
    assert present in text
    assert absent not in text


def test_domains_with_mean_sum_count_and_share() -> None:
    rows = [SampleValue("a", "x", 3.0, 1), SampleValue("b", "x", -1.0, 1), SampleValue("c", "y", 5.0, 1)]
    y, x = domain_values(rows)
    assert (y.domain, y.mean, y.total, y.count, y.negative) == ("y", 5.0, 5.0, 1, 0.0)
    assert (x.domain, x.mean, x.total, x.count, x.negative) == ("x", 1.0, 2.0, 2, 0.5)
    assert "│ x      │ +1.000e+00 │ +2.000e+00 │       2 │     50 % │" in printed([vars(row) for row in rows])


def test_long_ids_are_folded_and_never_shortened() -> None:
    prefix = "interpreter:" + "/".join(f"part{i}" for i in range(20)) + ":[bold]x:"
    text = printed(records([1.0, -1.0], prefix))
    assert max(map(len, text.split("\n")[:20])) <= 80
    assert "…" not in text
    assert "".join(column(text, "Most helpful")) == prefix + "0"
    assert "".join(column(text, "Most harmful")) == prefix + "1"


def test_commands_and_links_can_be_copied_whole(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    text = printed(records([1.0, -1.0]), run_dir=tmp_path)
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    found = {line[0]: line[1] for line in lines if len(line) == 2}
    assert found["Run it again"] == "python run.py engine=graddotprod model=gpt2"
    assert found["Open MLflow"].endswith("mlflow.db --workers 1")
    assert found["Plots"] == str(tmp_path / "plots")
    assert "Scores" not in found
    assert any(line.endswith("?workflowType=machine_learning") for line in text.splitlines())
    assert NOTE in text


def test_untracked_run_shows_no_pages() -> None:
    text = printed(records([1.0]), ui_command=None, run_url=None)
    assert "MLflow" not in text
    assert "page" not in text


def test_text_is_shown_only_when_asked_for() -> None:
    rows = records([1.0, -1.0])
    assert "def f" not in printed(rows)
    assert "def f(x: [int]) of code:module.py:0" in printed(
        rows, previews=lambda i: f"def f(x: [int]) of {i}"
    )


def test_values_that_are_not_finite_are_counted() -> None:
    text = printed(records([1.0, float("nan"), -1.0, float("inf")]))
    assert "2 samples have no finite value" in text
    assert column(text, "Most helpful") == ["code:module.py:0"]


def test_run_without_values_still_says_how_to_go_on() -> None:
    text = printed([], notes=[])
    assert "Most helpful" not in text
    assert "Run it again" in text


def test_replay_command_survives_the_shell() -> None:
    overrides = ["layers.include=[attn*, mlp]", "data.path=my file.txt", "tracking.run_name='a b'"]
    assert shlex.split(replay_command(overrides)) == ["python", "run.py", *overrides]
