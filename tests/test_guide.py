"""Every command of docs/guide.md, as it stands there, one after the other."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "guide.md"


def commands() -> list[str]:
    """The lines of the guide's shell blocks but the installation's, which .ci/run runs from README.md."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line.split("  #")[0].strip() for line in lines if "-m venv" not in line]


def test_the_installation_is_the_readme_s() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (install,) = re.findall(r"^python3 -m venv .*$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert readme.count(f"\n{install} && .venv/bin/python run.py") == 1


@pytest.mark.slow
def test_every_command_does_what_the_guide_says(tmp_path: Path) -> None:
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "200"}
    for command in commands():
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
