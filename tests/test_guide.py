"""Every command of docs/guide.md, as it stands there, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_the_installation_is_the_readme_s() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{BLOCKS[0].strip()} && .venv/bin/python run.py " in readme


@pytest.mark.slow
def test_every_command_does_what_the_guide_says(tmp_path: Path) -> None:
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    guide = tmp_path / "guide"
    said = "".join(run(block, tmp_path) for block in BLOCKS[1:-1])  # .ci/run installs
    assert [listed(guide / "keep.txt"), listed(guide / "drop.txt")] == [288, 96]
    for report in ("seeds.html", "scores/0/report.html", "retrain/results/report.html"):
        assert (guide / report).stat().st_size > 10_000, report
    assert "288 of 384 training samples" in said
    assert "Verified: nothing that was searched names" in run(BLOCKS[-1], tmp_path)
    assert listed(guide / "drop.txt") == 95


def run(block: str, folder: Path) -> str:
    """What a block of commands says."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def listed(path: Path) -> int:
    """How many ids a list has."""
    return len(path.read_text().splitlines())
