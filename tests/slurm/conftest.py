"""A real SLURM of one node for the tests of this folder, started once and ended with them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and its kin speak to the cluster."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root may start a SLURM")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munged trusts no socket below pytest's closed folders
    try:
        started = subprocess.run(
            ["bash", FOLDER / "start.sh", folder, "2"], capture_output=True, text=True, timeout=120
        )
        assert started.returncode == 0, started.stderr
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run(["bash", FOLDER / "stop.sh", folder], timeout=120, check=True)
        shutil.rmtree(folder)
