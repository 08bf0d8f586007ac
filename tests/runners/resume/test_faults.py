"""A disk that takes no more: one sentence says so, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.command import MISTAKE
from tests.runners.resume.harness import DIGITS, Started, assert_same_runs

Start = Callable[..., Started]

RUN = [*DIGITS, "tracking=none"]


@pytest.mark.parametrize("places", [range(6, 30, 11), pytest.param(range(1, 100), marks=pytest.mark.slow)])
def test_wherever_the_disk_is_full_one_sentence_says_so_and_the_run_goes_on(
    places: range, start: Start, tmp_path: Path
) -> None:
    whole = start(*RUN, "hydra.run.dir=whole")
    assert whole.wait() == 0
    for change in [number for number in places if number <= whole.changes]:
        run = tmp_path / f"full{change}"
        before = len(whole.said)
        full = start(*RUN, f"hydra.run.dir={run}", full_at=change)
        status = full.wait()
        said = full.said[before:]
        assert status in (0, MISTAKE), said
        assert "Traceback" not in said
        if status == MISTAKE:
            assert f"a file of {run} cannot be written (File too large): make room there" in said
            assert (f"resume={run}" in said) == any(run.glob("checkpoints/step*"))
            assert start(*RUN, f"hydra.run.dir={run}").wait() == 0, full.said
        assert_same_runs(tmp_path / "whole", run)
