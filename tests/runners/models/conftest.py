"""Every test starts from one seed and uses one thread."""

from tests.ghost.conftest import _one_thread_one_seed  # noqa: F401
