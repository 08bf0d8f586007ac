"""The report of one run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.plots import TEST_LOSS, VAL_LOSS
from analysis.report import facts, meaning, projection, training, values
from analysis.report.columns import columns_section, is_resolved
from analysis.report.facts import Kind, kind_of, setting
from analysis.report.numbers import count, loss, percent, signed
from analysis.report.page import KeyFigure, Page, Points, Section, write_page
from analysis.report.values import Previews, shown_samples
from analysis.runs import Run, score_note

__all__ = ["shown_samples", "write_run_report"]

Maker = Callable[[Run], Section]

LEADS = {
    Kind.SCORED: "What each training sample was worth to the validation loss.",
    Kind.PLAIN: "Plain training, without a value for any sample.",
    Kind.EVALUATED: "One evaluation of a model; nothing was trained.",
    Kind.PROJECTED: "Every training sample's gradient at one checkpoint, projected and kept.",
    Kind.DISTORTION: "How far inner products of projected gradients are from the exact ones.",
}


def write_run_report(run: Run, path: Path, previews: Previews | None) -> Path:
    """Write the report of a run as one HTML file and return its path.

    What the run lacks, or a damaged file, is said in a line of the report.

    Args:
        previews: From sample ids to their first words, to be shown beside the ids; None shows none.

    Raises:
        AnalysisError: The run has no `config.yaml` that can be read and is a run's.
    """
    return write_page(run_page(run, previews), path)


def run_page(run: Run, previews: Previews | None) -> Page:
    """What the report of a run holds."""
    kind = kind_of(run)
    sections, lacking = _made(run, _makers(run, kind, previews))
    environ = _environment(run, lacking)
    if lacking:
        sections.append(Section("Not in this report", [Points(lacking)]))
    lead = LEADS[kind]
    if kind is Kind.SCORED:
        lead += f" Positive values helped, negative ones harmed: {score_note(run.config)}."
    return Page(
        genre="Report of a run",
        title=facts.title(run.config),
        lead=lead,
        facts=facts.described(run, environ),
        key_figures=key_figures(run, kind),
        notices=_notices(run, kind),
        sections=sections,
    )


def _makers(run: Run, kind: Kind, previews: Previews | None) -> Sequence[Maker]:
    """What is told of a run of this kind, in the page's order."""
    if kind is Kind.SCORED:
        columns = [columns_section] if is_resolved(run.config) else []
        return [
            partial(values.samples_section, previews=previews), values.domains_section, values.spread_section,
            *columns, training.losses_section, training.coverage_section, training.cost_section,
            meaning.meaning_section, meaning.limits_section, meaning.again_section,
        ]  # fmt: skip
    others: Mapping[Kind, Sequence[Maker]] = {
        Kind.PLAIN: [training.losses_section, training.cost_section],
        Kind.EVALUATED: [],
        Kind.PROJECTED: [
            projection.store_section, projection.projected_section, projection.lost_section,
            training.cost_section,
        ],
        Kind.DISTORTION: [projection.distortion_section],
    }  # fmt: skip
    return [*others[kind], meaning.again_section]


def _made(run: Run, makers: Sequence[Maker]) -> tuple[list[Section], list[str]]:
    """The sections that the run's files allow, and a sentence for each reason why there are not more."""
    sections: list[Section] = []
    lacking: list[str] = []
    for make in makers:
        try:
            sections.append(make(run))
        except AnalysisError as error:
            if str(error) not in lacking:
                lacking.append(str(error))
    return sections, lacking


def _environment(run: Run, lacking: list[str]) -> Mapping[str, str]:
    try:
        environ = dict(facts.environment(run))
    except AnalysisError as error:
        if str(error) not in lacking:
            lacking.append(str(error))
        return {}
    return environ | ({"mlflow.run_id": run.run_id} if run.run_id is not None else {})


def _notices(run: Run, kind: Kind) -> list[str]:
    """Whether the run came to its end."""
    if (run.directory / "traceback.txt").is_file():
        return ["This run ended with an error: see traceback.txt in its directory."]
    wanted = setting(run.config, "trainer.max_steps")
    if kind not in (Kind.SCORED, Kind.PLAIN) or wanted is None:
        return []
    try:
        done = max((row["step"] for row in run.metrics), default=0)
    except AnalysisError:  # said below, as what the report lacks
        return []
    return [f"This run was at step {done} of {wanted} when it was last heard of."] if done < wanted else []


def key_figures(run: Run, kind: Kind) -> list[KeyFigure]:
    """The first numbers to look at; what cannot be read is left out here and explained further down."""
    makers: Mapping[Kind, Sequence[Callable[[Run], list[KeyFigure]]]] = {
        Kind.SCORED: [_values_figures, _loss_figures, _coverage_figures, _cost_figures],
        Kind.PLAIN: [_loss_figures],
        Kind.EVALUATED: [_evaluation_figures],
        Kind.PROJECTED: [_store_figures],
        Kind.DISTORTION: [],
    }
    found: list[KeyFigure] = []
    for make in makers[kind]:
        try:
            found += make(run)
        except AnalysisError:
            continue
    return found


def _values_figures(run: Run) -> list[KeyFigure]:
    found = values.ranked_values(run)
    scored = KeyFigure(
        "Samples scored", count(found.values.size), f"{count(int(found.seen.sum()))} times in all"
    )
    total = f"sum of all values {signed(float(found.values.sum()))} nats"
    return [scored, KeyFigure("Negative values", percent(found.negative), total)]


def _loss_figures(run: Run) -> list[KeyFigure]:
    figures = [KeyFigure("Steps", count(max((row["step"] for row in run.metrics), default=0)))]
    for name, label in ((VAL_LOSS, "Validation loss"), (TEST_LOSS, "Test loss")):
        if losses := training.finite(run, name):
            fall = _change(losses[0], losses[-1]) if len(losses) > 1 else "nats, one evaluation"
            figures.append(KeyFigure(label, f"{loss(losses[0])} → {loss(losses[-1])}", fall))
    return figures


def _change(before: float, after: float) -> str:
    """How far a loss fell or rose."""
    return f"{'fell' if after <= before else 'rose'} by {loss(abs(before - after))} nats"


def _coverage_figures(run: Run) -> list[KeyFigure]:
    parameters, gradient = training.scored_shares(run)
    return [
        KeyFigure(
            "Scored share of the model",
            percent(parameters),
            f"of the parameters; {percent(gradient)} of the squared validation gradient",
        )
    ]


def _cost_figures(run: Run) -> list[KeyFigure]:
    overhead = training.finite(run, training.OVERHEAD)
    return (
        [KeyFigure("Cost of scoring", percent(overhead[-1]), "more time than a plain step, median")]
        if overhead
        else []
    )


def _evaluation_figures(run: Run) -> list[KeyFigure]:
    found = {"Validation loss": training.finite(run, VAL_LOSS), "Test loss": training.finite(run, TEST_LOSS)}
    return [KeyFigure(label, loss(losses[-1]), "nats") for label, losses in found.items() if losses]


def _store_figures(run: Run) -> list[KeyFigure]:
    store = projection.store_of(run)
    errors = training.finite(run, "distortion/rms")
    figures = [
        KeyFigure("Samples in the store", count(len(store))),
        KeyFigure("Numbers a sample", count(store.layout.width), f"{store.dtype} on disk"),
    ]
    if errors:
        figures.append(KeyFigure("Error of inner products", percent(errors[-1]), "of the gradients' norms"))
    return figures
