"""Deleting samples from a store by the ids that people know."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis import forget as command
from analysis.errors import AnalysisError
from analysis.forget import forget, main
from ghost import ProjectionStore, StoreError
from ghost.layout import Layout
from ghost.store import StoreWriter

ROWS, WIDTH = 9, 5


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before, level


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of nine samples in three shards, and the table of their names."""
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH) + 1
    layout = Layout.of([("w", (WIDTH, 1), (WIDTH, 1))])
    with StoreWriter(tmp_path / "store", layout, {}, {}, batches_per_shard=1) as writer:
        for ids in torch.arange(ROWS).split(3):
            writer.append(ids, values[ids])
    write_names(tmp_path / "store", list(range(ROWS)))
    return tmp_path / "store"


def write_names(folder: Path, indices: list[int]) -> None:
    names = [f"mail/{i}#0" for i in indices]
    table = pa.table({"index": indices, "sample_id": names, "domain": ["mail"] * len(names)})
    pq.write_table(table, folder / "samples.parquet")


def left(folder: Path) -> list[int]:
    names = pq.read_table(folder / "samples.parquet")["index"].to_pylist()
    assert names == ProjectionStore.open(folder).sample_ids.tolist()
    return names


def test_samples_go_from_the_store_and_from_its_table(folder: Path) -> None:
    assert forget(folder, ["mail/4#0"], [7, 0]) == 3
    assert left(folder) == [1, 2, 3, 5, 6, 8]


def test_compaction_clears_what_a_killed_writer_left(folder: Path) -> None:
    (folder / ".samples.parquet.17.partial").write_bytes(b"mail/4#0")
    assert main([str(folder), "--id", "mail/4#0", "--compact"]) == 0
    assert not [path for path in folder.iterdir() if b"mail/4#0" in path.read_bytes()]


def test_an_unknown_sample_deletes_nothing(folder: Path) -> None:
    with pytest.raises(AnalysisError, match=r"no sample of sample_id 'mail/9#0', so nothing"):
        forget(folder, ["mail/4#0", "mail/9#0"], [])
    with pytest.raises(AnalysisError, match="no sample of index 9"):
        forget(folder, [], [3, 9])
    assert left(folder) == list(range(ROWS))


def test_a_killed_command_can_be_typed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            forget(folder, ["mail/4#0"], [])
    assert forget(folder, ["mail/4#0"], []) == 1
    assert 4 not in left(folder)


def test_compacting_leaves_no_byte(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = np.asarray(ProjectionStore.open(folder).matrix()[4], dtype=np.float32).tobytes()
    assert main([str(folder), "--id", "mail/4#0"]) == 0
    assert any(row in path.read_bytes() for path in folder.iterdir())
    assert main([str(folder), "--compact"]) == 0
    files = [path.read_bytes() for path in folder.iterdir()]
    assert not any(row in content or b"mail/4#0" in content for content in files)
    assert left(folder) == [0, 1, 2, 3, 5, 6, 7, 8]
    ProjectionStore.open(folder).verify()


def test_one_command_does_both(folder: Path) -> None:
    assert main([str(folder), "--id", "mail/4#0", "--index", "5", "--compact"]) == 0
    assert left(folder) == [0, 1, 2, 3, 6, 7, 8]


def test_mistakes_are_one_sentence(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--index", "1"]) == command.MISTAKE
    assert f"{tmp_path / 'samples.parquet'} is missing" in caplog.messages[-1]
    assert main([str(folder), "--id", "nobody"]) == command.MISTAKE
    assert "'nobody'" in caplog.messages[-1]
    with pytest.raises(SystemExit) as ended:
        main([str(folder)])
    assert ended.value.code == 2
    assert "--id or --index" in capsys.readouterr().err
    (folder / "samples.parquet").write_bytes(b"nothing")
    assert main([str(folder), "--index", "1"]) == command.MISTAKE
    assert "is damaged" in caplog.messages[-1]


def test_a_table_that_cannot_be_written_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: pa.Table, path: Path) -> None:
        path.write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command.pq, "write_table", full)
        assert main([str(folder), "--index", "4"]) == command.MISTAKE
    assert "cannot be written (No space left on device)" in caplog.messages[-1]
    assert not list(folder.glob(".*.partial"))
    assert main([str(folder), "--index", "4"]) == 0
    assert 4 not in left(folder)


@pytest.mark.parametrize("number", ["-1", str(2**63), "four"])
def test_an_index_is_a_running_index(folder: Path, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--index", number])
    assert ended.value.code == command.MISTAKE
    assert number in capsys.readouterr().err


def test_a_store_that_is_being_written_is_refused(tmp_path: Path) -> None:
    layout = Layout.of([("w", (WIDTH, 1), (WIDTH, 1))])
    writer = StoreWriter(tmp_path, layout, {}, {}, batches_per_shard=1, world_size=2)
    writer.append(torch.arange(3), torch.ones(3, WIDTH))
    writer.close()
    write_names(tmp_path, [0, 1, 2])
    with pytest.raises(StoreError, match="is not complete"):
        forget(tmp_path, [], [1])
