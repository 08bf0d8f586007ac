"""What the numbers mean, what they do not say, and how to make them again."""

import math
import shlex

from analysis.errors import AnalysisError
from analysis.plots import VAL_LOSS
from analysis.report.facts import environment, overrides, setting
from analysis.report.numbers import percent, signed
from analysis.report.page import Block, Command, Facts, Points, Section, Text
from analysis.report.training import finite, scored_shares
from analysis.report.values import ranked_values
from analysis.runs import Run, has_sets, is_second_order, optimizer_name, score_note

_VERSION = "version."

PROXY = (
    "The optimizer is {name}, which does not step along the gradient. The inner product of plain gradients "
    "ranks samples by an SGD step's effect; it is not this optimizer's own."
)
CHORD = (
    "Values are about the step that the optimizer takes. Where it bends with the gradient, each sample is "
    "credited with the slope over the range that the batch's partial sums cover, which is near its Shapley "
    "value but not the same."
)
NO_RETRAINING = (
    "A value is what happened in this run. It is not what a run without the sample would have lost: other "
    "samples would have taught much of the same."
)
NOT_QUALITY = (
    "A negative value says that a sample's gradient pointed away from the validation set's. It may be wrong, "
    "or right and unlike the validation samples."
)


def meaning_section(run: Run) -> Section:
    """What a value is."""
    less = (
        ", less half the square of rate and coefficient times the inner product of its gradient with the "
        "Hessian of the validation loss times the whole step's gradient"
    )
    blocks: list[Block] = [
        Text(
            "At every step, each sample of the batch is credited with the learning rate, times the clipping "
            "coefficient, times the inner product of its gradient with that of the validation loss"
            f"{less if is_second_order(run.config) else ''}. The sum over the steps is its value: the fall "
            f"in validation loss, in nats, that the sample is credited with, to {_order(run)} order. "
            "Positive values help, negative ones harm."
        ),
        Text(f"Of this run: {score_note(run.config)}."),
    ]
    return Section("What the numbers mean", blocks)


def _order(run: Run) -> str:
    return "second" if is_second_order(run.config) else "first"


def limits_section(run: Run) -> Section:
    """What the values do not say, of this run in particular."""
    points = [*_credited(run), *_setting_limits(run), *_coverage_limit(run), NO_RETRAINING, NOT_QUALITY]
    return Section("What this does not say", [Points(points)])


def again_section(run: Run) -> Section:
    """The command that starts the same run, and what its numbers depend on besides."""
    typed, environ = overrides(run), environment(run)
    blocks: list[Block] = []
    if typed is not None:
        blocks.append(Command(shlex.join([*_program(run), *typed])))
    else:
        blocks.append(Text("What was typed is not recorded here (.hydra/overrides.yaml)."))
    blocks.append(Text(_settings(run)))
    versions = [
        (name.removeprefix(_VERSION), value) for name, value in environ.items() if name.startswith(_VERSION)
    ]
    facts = [("Run directory", str(run.directory.absolute())), *versions]
    if "data.fingerprint" in environ:
        facts.append(("Fingerprint of the data", environ["data.fingerprint"][:16]))
    blocks.append(Facts(facts))
    return Section("Run it again", blocks)


def _settings(run: Run) -> str:
    where = "Every setting, the unchanged ones too, is in config.yaml of the run directory"
    if "distortion" in run.config:
        return f"{where}."
    return f"{where}: experiment=RUN_DIRECTORY/config.yaml runs the same, whatever the defaults have become."


def _program(run: Run) -> list[str]:
    return ["python", "-m", "runners.distortion"] if "distortion" in run.config else ["python", "run.py"]


def _credited(run: Run) -> list[str]:
    """The sum of all values beside what the loss did; nothing where the loss is not known."""
    measured = [loss for loss in finite(run, VAL_LOSS) if math.isfinite(loss)]
    if len(measured) < 2:
        return []
    total = float(ranked_values(run).values.sum())
    fall = measured[0] - measured[-1]
    sets = "Each validation set is an objective of its own, and values are of their sum. "
    return [
        f"All values add up to {signed(total)} nats, while the fall in validation loss, the mean over all "
        f"validation samples, was {signed(fall)} nats. {sets if has_sets(run.config) else ''}Credit is of "
        f"{_order(run)} order, and against the validation rows of each step. Compare values with each other, "
        "not with the loss."
    ]


def _setting_limits(run: Run) -> list[str]:
    points = []
    if (setting(run.config, "engine.preconditioner") or "none") != "none":
        points.append(CHORD)
    elif (name := setting(run.config, "optimizer.name")) != "sgd":
        points.append(PROXY.format(name=optimizer_name(str(name))))
    elif setting(run.config, "optimizer.momentum"):
        points.append("Momentum carries gradients into later steps; these are not credited.")
    held_out = setting(run.config, "data.val_samples")
    scored_with = None if held_out is None else held_out - (setting(run.config, "data.test_samples") or 0)
    against = f"{scored_with} validation samples" if scored_with is not None else "one validation set"
    points.append(f"Values are against {against}. Others would give other values, and another order.")
    points.append(
        "This is one run with one seed. Gradients and learning rates shrink as training goes on, so a sample "
        "that was drawn early has more value than the same sample late: several seeds and their agreement "
        "(python -m analysis.aggregate) tell what is the sample's own."
    )
    return points


def _coverage_limit(run: Run) -> list[str]:
    try:
        parameters, gradient = scored_shares(run)
    except AnalysisError:  # the page says elsewhere that it is missing
        return []
    if parameters > 1 - 1e-9:
        return []
    return [
        f"{percent(1 - parameters)} of the trainable parameters are not scored, with {percent(1 - gradient)} "
        "of the validation gradient's squared norm: what a sample does through them is in no value."
    ]
