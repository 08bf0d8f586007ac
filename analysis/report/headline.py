"""A run in a few lines of Markdown, for the pages that only link to its report."""

from collections.abc import Sequence
from contextlib import suppress

from analysis.errors import AnalysisError
from analysis.report.facts import kind_of
from analysis.report.numbers import Scale
from analysis.report.run import LEADS, key_figures
from analysis.report.values import Ranked, ranked_values
from analysis.runs import Run

_ENDS = 5  # samples at either end
_ID_LENGTH = 60  # characters; more would push MLflow's own column of facts out of the window
_ROW = 4  # key figures in the first line


def run_headline(run: Run) -> str:
    """The run's kind, its key figures, and the ids of the samples that stand out; no text of theirs.

    Raises:
        AnalysisError: The run has no `config.yaml` that can be read and is a run's.
    """
    kind = kind_of(run)
    figures = key_figures(run, kind)
    bold = [f"**{figure.label}** {figure.value}" for figure in figures]
    # MLflow's box wraps no line; two spaces at its end break one.
    blocks = ["  \n".join(" · ".join(row) for row in (bold[:_ROW], bold[_ROW:]) if row), LEADS[kind]]
    with suppress(AnalysisError):  # a run without values, or none that is finite: the report says why
        blocks += _ends(ranked_values(run))
    if notes := [f"- {figure.label}: {figure.value} ({figure.note})" for figure in figures if figure.note]:
        blocks.append("\n".join(notes))
    blocks.append("The whole report: `report.html` under Artifacts.")
    return "\n\n".join(block for block in blocks if block)


def _ends(found: Ranked) -> list[str]:
    """A table of the samples of the highest values, and one of the lowest."""
    highest, lowest = found.ends()
    return [
        _table("helped most", found, highest[:_ENDS]),
        _table("harmed, or helped least", found, lowest[:_ENDS]),
    ]


def _table(title: str, found: Ranked, places: Sequence[int]) -> str:
    values = [float(found.values[place]) for place in places]
    scale = Scale.of(values)
    lines = [f"| {scale.unit('nats')} | {title} |", "| ---: | :--- |"]
    for place, value in zip(places, values, strict=True):
        lines.append(f"| {scale.text(value)} | {_code(str(found.ids[place]))} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    """A sample's id without its middle if it is long, and without what Markdown would take for markup."""
    if len(text) > _ID_LENGTH:
        text = f"{text[: _ID_LENGTH // 3]}…{text[-2 * _ID_LENGTH // 3 :]}"
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
