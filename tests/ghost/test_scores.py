"""Score shards: whole or not there, one width each, readable without pickled code."""

from pathlib import Path

import pytest
import torch

from ghost import GhostConfigError
from ghost import scores as scores_module
from ghost.scores import COLUMNS, ONE_COLUMN, Column, ScoreLog, read_columns, save_atomically

LR, CLIP = torch.tensor([0.1], dtype=torch.float64), torch.tensor(0.5)


def add(log: ScoreLog, step: int, rows: int = 3, width: int | None = None) -> torch.Tensor:
    score = torch.randn(rows, width or 1)
    lr = LR if width is None else torch.arange(1.0, width + 1)
    columns = ONE_COLUMN if width is None else [Column("total", group, "") for group in range(width)]
    log.append(step, torch.arange(rows) + 10 * step, score, lr, CLIP, columns)
    return score[:, 0] if width is None else score


def test_rows_come_back(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    first, second = add(log, 0), add(log, 1, rows=2)
    path = log.flush()
    assert path == tmp_path / "scores" / "shard-00000.pt"
    shard = torch.load(path, weights_only=True)
    assert tuple(shard) == COLUMNS
    assert shard["step"].tolist() == [0, 0, 0, 1, 1]
    assert shard["sample"].tolist() == [0, 1, 2, 10, 11]
    assert torch.equal(shard["score"], torch.cat([first, second]))
    assert shard["lr"].tolist() == [0.1] * 5
    assert shard["clip"].tolist() == [0.5] * 5
    assert {shard[key].dtype for key in ("lr", "clip")} == {torch.float64}


@pytest.mark.parametrize("width", [1, 2])
def test_curvatures_are_shaped_as_scores(width: int, tmp_path: Path) -> None:
    log, score = ScoreLog(tmp_path, torch.bfloat16), torch.randn(3, width)
    columns = [Column("total", group, "") for group in range(width)]
    lr, sample = torch.ones(width, dtype=torch.float64), torch.arange(3)
    log.append(0, sample, score, lr, CLIP, columns, curvature=2 * score)
    path = log.flush()
    assert path is not None
    shard = torch.load(path, weights_only=True)
    assert shard["curvature"].shape == shard["score"].shape
    assert torch.equal(shard["curvature"], 2 * shard["score"])


def test_nothing_added_writes_nothing(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path)
    assert log.flush() is None
    add(log, 0)
    assert log.flush() is not None
    assert log.flush() is None
    assert len(list(tmp_path.iterdir())) == 1


def test_shards_are_numbered_in_order(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path)
    for step in range(3):
        add(log, step)
        log.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"shard-0000{i}.pt" for i in range(3)]


def test_a_change_of_width_begins_a_shard(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path)
    for step, width in enumerate((None, None, 2, 3, None)):
        add(log, step, width=width)
    log.flush()
    shards = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt"))]
    assert [tuple(shard["score"].shape) for shard in shards] == [(6,), (3, 2), (3, 3), (3,)]
    assert [tuple(shard["lr"].shape) for shard in shards] == [(6,), (3, 2), (3, 3), (3,)]
    assert shards[1]["lr"].tolist() == [[1.0, 2.0]] * 3


def test_a_shard_holds_its_rows_alone(tmp_path: Path) -> None:
    """A view of a large tensor would take its whole storage to disk."""
    log = ScoreLog(tmp_path)
    large = torch.randn(1_000_000)
    log.append(0, torch.arange(2), large[:2, None], LR, CLIP)
    path = log.flush()
    assert path is not None
    assert path.stat().st_size < 10_000


def test_an_old_runs_shards_are_never_overwritten(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path)
    add(log, 0)
    path = log.flush()
    assert path is not None
    content = path.read_bytes()
    with pytest.raises(
        GhostConfigError, match=r"result_dir has score shards of another run in .*empty folder"
    ):
        ScoreLog(tmp_path)
    assert path.read_bytes() == content


def test_a_write_that_fails_leaves_no_shard_and_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ScoreLog(tmp_path)
    score = add(log, 0)
    real = torch.save

    def full(*args: object) -> None:
        real(torch.zeros(3), args[1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scores_module.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    assert not list(tmp_path.glob("shard-*.pt"))
    monkeypatch.undo()
    path = log.flush()
    assert path is not None
    assert torch.equal(torch.load(path, weights_only=True)["score"], score)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for value in (1, 2):
        save_atomically({"value": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["value"] == value
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_wide_shards_say_what_their_columns_are(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path)
    columns = (Column("h.0", 0, "code"), Column("h.0", 0, "docs"), Column("h.1", 1, "code"))
    log.append(0, torch.arange(2), torch.randn(2, 3), torch.ones(3), CLIP, columns)
    path = log.flush()
    add(log, 1)
    plain = log.flush()
    assert path is not None and plain is not None  # noqa: PT018
    assert read_columns(path) == columns
    assert read_columns(plain) == ONE_COLUMN
    assert not plain.with_suffix(".json").exists()


def test_pairs_know_their_validation_rows(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path)
    columns = [Column("total", 0, "pair 0"), Column("total", 0, "pair 1")]
    for step in range(2):
        val = torch.tensor([2 * step, 2 * step + 1])
        log.append(step, torch.arange(3), torch.randn(3, 2), torch.ones(2), CLIP, columns, val)
    path = log.flush()
    assert path is not None
    shard = torch.load(path, weights_only=True)
    assert shard["val"].tolist() == [[0, 1]] * 3 + [[2, 3]] * 3
    assert shard["score"].shape == (6, 2)
