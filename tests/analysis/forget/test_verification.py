"""The search for what is left: in every way that an id is written, and nowhere else."""

import html
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.forget.verification import verify_gone

NAME = "mail/ü<1>#0"

LEFT = {
    "run.log": f"deleted {NAME}.".encode(),
    "page.html": f"<td>{html.escape(NAME)}</td>".encode(),
    "notes.json": json.dumps({"note": NAME}).encode(),
    ".hydra/overrides.yaml": f"- ids=['{NAME}']".encode(),
    ".values.parquet.9.partial": b"\0" * 9000 + NAME.encode() + b"1",
    "model/vocab.txt": f"a\n{NAME}\n".encode(),
}


@pytest.mark.parametrize("name", LEFT)
def test_every_file_is_searched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / name).write_bytes(LEFT[name])
    found = verify_gone([tmp_path], {NAME, "mail/other"})
    assert [(finding.path, finding.why) for finding in found] == [
        (tmp_path / name, f"has the bytes of {NAME!r}")
    ]


def test_compressed_tables_are_read(tmp_path: Path) -> None:
    names = [f"mail/{i}#0" for i in range(1000)]
    path = tmp_path / "values.parquet"
    pq.write_table(pa.table({"sample_id": names}), path, compression="zstd", use_dictionary=False)
    assert b"mail/77#0" not in path.read_bytes()
    assert [finding.why for finding in verify_gone([tmp_path], {"mail/77#0"})] == [
        "names 'mail/77#0' in values.parquet"
    ]


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_part_of_a_longer_id_does_not_count(tmp_path: Path, compression: str) -> None:
    table = pa.table({"sample_id": ["mail/12", "my mail/1", "mail/1#0"]})
    pq.write_table(table, tmp_path / "values.parquet", compression=compression, use_dictionary=False)
    (tmp_path / "run.log").write_text("mail/12, email/1, mail/1#0, mail/1_b")
    (tmp_path / "numbers.npy").write_bytes(b"\0mail/12\0mail/1#0")
    assert verify_gone([tmp_path], {"mail/1"}) == []
    (tmp_path / "numbers.npy").write_bytes(b"\0mail/12\0mail/1z")
    assert [finding.path.name for finding in verify_gone([tmp_path], {"mail/1"})] == ["numbers.npy"]


def test_a_short_id_is_searched_for_in_text_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0\0 17 \0")
    assert verify_gone([tmp_path], {"17"}) == []
    assert "17 is so short" in caplog.messages[0]
    (tmp_path / "run.log").write_text("sample 17")
    assert [finding.path.name for finding in verify_gone([tmp_path], {"17"})] == ["run.log"]
