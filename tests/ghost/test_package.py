"""The library stands alone."""

import subprocess
import sys

import ghost


def test_importing_the_library_imports_none_of_its_users() -> None:
    code = (
        "import sys, ghost, ghost.coverage, ghost.values\n"
        "users = {'hydra', 'omegaconf', 'mlflow', 'transformers', 'runners', 'analysis'}\n"
        "found = (users | {'pytorch_lightning', 'ghost.integrations'}) & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(found)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_public_names_exist() -> None:
    for name in ghost.__all__:
        assert hasattr(ghost, name)
