import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.errors import AnalysisError
from analysis.runs import credit_note, load_run, score_note
from analysis.stream import read_pieces

MakeRun = Callable[..., Path]


def test_everything_is_read_as_written(make_run: MakeRun) -> None:
    run = load_run(make_run(steps=12, batch=10))
    assert run.config["optimizer"] == {"name": "adamw", "lr": 1e-5}
    assert run.samples.column_names == ["index", "sample_id", "domain"]
    assert run.values.schema.field("value").type == pa.float64()
    assert len(run.metrics) == 12 + 4
    shards = list(run.scores())
    assert [shard["step"].unique().tolist() for shard in shards] == [
        [1, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 12],
    ]
    assert sum(run.values["times_seen"].to_pylist()) == 120


def test_series_takes_the_last_line_of_a_step_and_keeps_gaps_visible(make_run: MakeRun) -> None:
    path = make_run()
    (path / "metrics.jsonl").write_text(
        '{"step": 2, "time": 0, "loss": 5.0}\n'
        '{"step": 1, "time": 0, "loss": 6.0}\n'
        '{"step": 2, "time": 1, "loss": 4.0}\n'
        '{"step": 3, "time": 1, "loss": null, "non_finite": {"loss": "nan"}}\n'
        '{"step": 4, "time": 1, "other": 1.0}\n'
    )
    series = load_run(path).series("loss")
    assert list(series) == [1, 2, 3]
    assert [series[1], series[2]] == [6.0, 4.0]
    assert np.isnan(series[3])
    assert load_run(path).series("absent") == {}


def test_unfinished_last_line_is_left_out_with_a_warning(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "tra')
    assert len(load_run(path).metrics) == 16
    assert "unfinished line" in caplog.text


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="is no directory"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(AnalysisError, match="holds no run"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "read"),
    [("samples.parquet", "samples"), ("values.parquet", "values"), ("metrics.jsonl", "metrics")],
)
def test_missing_and_damaged_files_are_named(make_run: MakeRun, name: str, read: str) -> None:
    path = make_run()
    file = path / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + b"\x00garbage\n")
    with pytest.raises(AnalysisError, match=f"{name} is damaged"):
        getattr(load_run(path), read)
    file.unlink()
    with pytest.raises(AnalysisError, match=f"{name} is missing"):
        getattr(load_run(path), read)


def test_a_run_that_scored_nothing_says_so(make_run: MakeRun) -> None:
    path = make_run()
    (path / "values.parquet").unlink()
    (path / "config.yaml").write_text("engine: {name: regular}\n")
    with pytest.raises(AnalysisError, match="has no values, since engine=regular gives none"):
        load_run(path).values  # noqa: B018 -- read for its error


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", "\x00"])
def test_damaged_config_is_named(make_run: MakeRun, text: str) -> None:
    path = make_run()
    (path / "config.yaml").write_text(text)
    with pytest.raises(AnalysisError, match=r"config\.yaml is damaged"):
        _ = load_run(path).config


def test_table_without_a_column_or_with_another_type(make_run: MakeRun) -> None:
    path = make_run()
    pq.write_table(pa.table({"sample_id": ["a"], "domain": ["b"], "value": [1.0]}), path / "values.parquet")
    with pytest.raises(AnalysisError, match="no column 'times_seen'; it has sample_id, domain, value"):
        _ = load_run(path).values
    wrong = {"sample_id": ["a"], "domain": ["b"], "value": ["much"], "times_seen": [1]}
    pq.write_table(pa.table(wrong), path / "values.parquet")
    with pytest.raises(AnalysisError, match=r"values\.parquet is damaged"):
        _ = load_run(path).values


def test_lost_shards_are_noticed(make_run: MakeRun) -> None:
    path = make_run()
    (path / "scores" / "shard-00000.pt").unlink()
    with pytest.raises(AnalysisError, match="lacks shard 0"):
        list(load_run(path).scores())
    (path / "scores" / "shard-00001.pt").unlink()
    with pytest.raises(AnalysisError, match="no score shards"):
        list(load_run(path).scores())


class Unsafe:
    """Anything that is not a tensor or a plain container needs pickle's code execution to load."""


@pytest.mark.parametrize(
    "content",
    [
        "truncated",
        "empty",
        "text",
        Unsafe(),
        [1, 2],
        {"step": torch.zeros(2)},
        {name: torch.zeros(3 if name == "lr" else 2) for name in ("step", "sample", "score", "lr", "clip")},
        {name: torch.zeros(2) for name in ("step", "sample", "score", "lr", "clip")} | {"curvature": 0.5},
        {name: torch.zeros(2) for name in ("step", "sample", "score", "lr", "clip")}
        | {"curvature": torch.zeros(2, 2)},
        {name: torch.zeros(2) for name in ("step", "sample", "score", "lr", "clip")}
        | {"weight": torch.zeros(3)},
    ],
    ids=["truncated", "empty", "text", "unsafe", "list", "columns", "lengths", "number", "widths", "weights"],
)
def test_damaged_shards_are_named(make_run: MakeRun, content: object) -> None:
    path = make_run()
    shard = path / "scores" / "shard-00001.pt"
    if content == "truncated":
        shard.write_bytes(shard.read_bytes()[:-200])
    elif content == "empty":
        shard.write_bytes(b"")
    elif content == "text":
        shard.write_text("not a shard at all")
    else:
        torch.save(content, shard)
    scores = load_run(path).scores()
    next(scores)
    with pytest.raises(AnalysisError, match=r"shard-00001\.pt is damaged"):
        next(scores)


def test_errors_are_one_line(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run()
    torch.save(Unsafe(), path / "scores" / "shard-00000.pt")
    with caplog.at_level(logging.DEBUG), pytest.raises(AnalysisError) as error:
        next(load_run(path).scores())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"name": "sgd", "momentum": 0.0}, "first-order In-Run Data Shapley"),
        ({"name": "sgd", "momentum": 0.9}, "momentum is not credited"),
        ({"name": "adamw"}, "AdamW, so values are a first-order SGD proxy"),
    ],
)
def test_score_note_says_what_the_values_are(optimizer: dict, words: str) -> None:
    assert words in score_note({"optimizer": optimizer})


def test_score_note_says_the_order() -> None:
    config = {"optimizer": {"name": "sgd"}, "engine": {"order": 2}}
    assert score_note(config).startswith("second-order In-Run Data Shapley")
    assert "second-order SGD proxy" in score_note(config | {"optimizer": {"name": "adamw"}})


def test_score_note_says_the_policy() -> None:
    config = {"optimizer": {"name": "sgd"}, "policy": {"name": "top_k", "k": 0.5}}
    assert score_note(config).endswith("each step's samples count as policy top_k weighed them")
    assert "policy" not in score_note(config | {"policy": {"name": "none"}})


def test_a_run_with_a_policy_is_read_with_its_weights(make_run: MakeRun) -> None:
    path = make_run()
    plain = [piece.rows.value for piece in read_pieces(load_run(path))]
    for shard in (path / "scores").glob("shard-*.pt"):
        rows = torch.load(shard, weights_only=True)
        torch.save(rows | {"weight": torch.full((len(rows["step"]),), 3.0, dtype=torch.float64)}, shard)
    weighed = [piece.rows.value for piece in read_pieces(load_run(path))]
    assert all((3 * before == after).all() for before, after in zip(plain, weighed, strict=True))


def test_values_against_several_sets_are_of_their_sum() -> None:
    config = {"optimizer": {"name": "sgd"}, "engine": {"val_sets": "domain"}}
    assert score_note(config).endswith("the loss is the sum of all validation sets'")
    assert "sum" not in credit_note(config)
    assert "sum" not in score_note(config | {"engine": {"val_sets": "one"}})


def test_shards_of_several_ranks_are_one_run(make_run: MakeRun) -> None:
    path = make_run()
    whole = [piece.rows for piece in read_pieces(load_run(path))]
    for shard in sorted((path / "scores").glob("shard-*.pt")):
        rows = torch.load(shard, weights_only=True)
        for rank in range(2):  # as two ranks write them: each its half of every step
            half = {name: column[rank::2] for name, column in rows.items()}
            torch.save(half, shard.with_name(f"{shard.stem}-rank{rank:05d}.pt"))
        shard.unlink()
    pieces = [piece.rows for piece in read_pieces(load_run(path))]
    for mine, theirs in zip(pieces, whole, strict=True):
        assert (mine.step == theirs.step).all()
        order, expected = (np.lexsort((rows.sample, rows.step)) for rows in (mine, theirs))
        assert (mine.sample[order] == theirs.sample[expected]).all()
        assert (mine.value[order] == theirs.value[expected]).all()
    (path / "scores" / "shard-00000-rank00001.pt").unlink()
    with pytest.raises(AnalysisError, match="lacks shard 0 of rank 1"):
        load_run(path).shards()
