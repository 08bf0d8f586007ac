"""What one run reached: the steps that it took to a target loss, its final and its best loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from analysis.runs import Run
from conf.errors import first_line

TEST_LOSS, VAL_LOSS = "test/loss", "val/loss"
SPLITS = {TEST_LOSS: "test", VAL_LOSS: "val"}

# Keys that the runs of a comparison may differ in without a word.
_FREE = ("seed", "output_dir", "preview", "data.keep", "data.drop", "trainer.overhead_probes")
_FREE_GROUPS = ("tracking.", "engine.", "hardware.", "layers.")


@dataclass(frozen=True)
class Outcome:
    """What one run reached.

    Attributes:
        steps_to_target: Interpolated between evaluations; None: never reached in `last_step` (censored).
        samples_a_step: Training samples of an optimizer step.
    """

    run: str
    directory: str
    seed: int
    steps_to_target: float | None
    last_step: int
    samples_a_step: int
    final_loss: float
    best_loss: float
    best_step: int

    def samples_to_target(self) -> float | None:
        """Training samples seen until the target."""
        return None if self.steps_to_target is None else self.steps_to_target * self.samples_a_step

    def as_dict(self) -> dict[str, Any]:
        """A run's entry in `comparison.json`; `steps_to_target` is null where it is more than `last_step`."""
        return {
            "run": self.run,
            "directory": self.directory,
            "seed": self.seed,
            "steps_to_target": self.steps_to_target,
            "samples_to_target": self.samples_to_target(),
            "last_step": self.last_step,
            "final_loss": self.final_loss if math.isfinite(self.final_loss) else None,  # JSON knows no NaN
            "best_loss": self.best_loss,
            "best_step": self.best_step,
        }


def steps_to(series: Mapping[int, float], target: float) -> float | None:
    """The first step at which the loss is at most the target, on straight lines between evaluations; None
    where it never is. A loss that is not finite counts as above every target.
    """
    before: tuple[int, float] | None = None
    for step, loss in sorted(series.items()):
        if loss <= target:  # never for NaN
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def common_metric(runs: Sequence[Run]) -> str:
    """`test/loss` where every run has it, else `val/loss`."""
    return TEST_LOSS if all(run.series(TEST_LOSS) for run in runs) else VAL_LOSS


def read_series(run: Run, metric: str) -> dict[int, float]:
    """A loss by step, from a run that went to its last step.

    Raises:
        AnalysisError: The run did not log it, or ended early.
    """
    series = run.series(metric)
    if not series:
        raise AnalysisError(f"{run.directory} has no {metric} in metrics.jsonl: compare runs that log it")
    if not finite(series):
        raise AnalysisError(f"{run.directory} has no finite {metric}: leave this run out")
    wanted = _setting(run, "trainer.max_steps")
    if max(series) < wanted:
        raise AnalysisError(
            f"{run.directory} ends at step {max(series)} of {wanted}: let it finish, or leave it out"
        )
    return series


def finite(series: Mapping[int, float]) -> dict[int, float]:
    """The series without NaN and infinities."""
    return {step: loss for step, loss in series.items() if math.isfinite(loss)}


def read_outcome(run: Run, series: Mapping[int, float], target: float) -> Outcome:
    """What a run with this series of losses reached; its first best step counts."""
    best_step, best_loss = min(finite(series).items(), key=lambda item: item[1])
    last = max(series)
    return Outcome(
        run=run.name,
        directory=str(run.directory),
        seed=_setting(run, "seed"),
        steps_to_target=steps_to(series, target),
        last_step=last,
        samples_a_step=_setting(run, "trainer.batch_size")
        * _setting(run, "trainer.gradient_accumulation_steps"),
        final_loss=series[last],
        best_loss=best_loss,
        best_step=best_step,
    )


def _setting(run: Run, name: str) -> int:
    found = _flat(run.config).get(name)
    if not isinstance(found, int):
        raise AnalysisError(f"{run.directory}/config.yaml has no whole number {name}: compare runs of run.py")
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def refuse_other_samples(runs: Sequence[Run], split: str) -> None:
    """Raises `AnalysisError` where the runs were not evaluated on the same samples of a split: such losses do
    not compare.
    """
    first = _held_out(runs[0], split)
    for run in runs[1:]:
        if _held_out(run, split) != first:
            raise AnalysisError(
                f"{run.directory} was evaluated on other {split} samples than {runs[0].directory}: compare "
                "runs with the same data"
            )


def _held_out(run: Run, split: str) -> set[str]:
    path = run.directory / "samples.parquet"
    try:
        samples = pq.read_table(path, columns=["sample_id", "split"])
    except (pa.ArrowException, OSError) as error:
        raise AnalysisError(f"{path} cannot be read: {first_line(error)}") from error
    return set(samples.filter(pc.equal(samples["split"], split))["sample_id"].to_pylist())


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys of the config that may matter to a loss and are not the same in all runs."""
    configs = [_flat(run.config) for run in runs]
    names = sorted({name for config in configs for name in config})
    return [
        name
        for name in names
        if name not in _FREE
        and not name.startswith(_FREE_GROUPS)
        and any(config.get(name) != configs[0].get(name) for config in configs)
    ]
