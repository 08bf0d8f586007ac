"""What a page is made of, and how it becomes HTML. No block holds markup: the templates escape all text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analysis.figures import Drawing, svg
from ghost.atomic import written_beside

GENERATOR = "ghostrunner"
"""What a page names as its maker in its head, which tells it from pages of others."""
_HEAD = 1024  # bytes that the line is within

# ---------------------------------------------------------------- cells of tables


@dataclass(frozen=True)
class Sample:
    """A sample by its id, with its first words where these may be shown."""

    kind: ClassVar[str] = "sample"
    sample_id: str
    text: str | None = None


@dataclass(frozen=True)
class Bar:
    """A bar that shows a number beside it.

    Attributes:
        length: In [-1, 1], with 1 for the longest of the table.
        look: `share` (grey), `helps` or `harms` (in the colour of the sign, from the left), and these with
            `two-sided` (from the middle).
    """

    kind: ClassVar[str] = "bar"
    length: float
    look: str = "share"


@dataclass(frozen=True)
class Tinted:
    """A number over a tint that shows its sign and size.

    Attributes:
        strength: In [-1, 1].
    """

    kind: ClassVar[str] = "tinted"
    text: str
    strength: float


Cell = str | Sample | Bar | Tinted


def signed_bars(values: Sequence[float], longest: float = 0.0) -> list[Bar]:
    """A bar for each number, in the colour of its sign; from the middle where the signs differ.

    Args:
        longest: The number whose bar is the longest; 0: the largest of these.
    """
    unit = longest or max(map(abs, values), default=0.0) or 1.0
    two_sided = " two-sided" if min(values, default=0.0) < 0 < max(values, default=0.0) else ""
    return [Bar(value / unit, ("harms" if value < 0 else "helps") + two_sided) for value in values]


def share_bars(values: Sequence[float]) -> list[Bar]:
    """A grey bar for each number, none of them negative."""
    longest = max(values, default=0.0) or 1.0
    return [Bar(value / longest) for value in values]


@dataclass(frozen=True)
class Column:
    """A table's column.

    Attributes:
        look: `text`, `id` (in a fixed width, broken anywhere), `number` (to the right) or `bar`.
        unit: In small letters under the heading.
    """

    heading: str
    look: str = "number"
    unit: str = ""


# ---------------------------------------------------------------- blocks of sections


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and what they are, beside each other."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    """What to type."""

    kind: ClassVar[str] = "command"
    line: str


@dataclass(frozen=True)
class Table:
    """A table; every row has a cell for each column."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A figure; its title and notes stand below it."""

    kind: ClassVar[str] = "picture"
    drawing: Drawing


Block = Text | Points | Facts | Command | Table | Picture


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The title as an address within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class KeyFigure:
    """One of the few numbers that a reader should see first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        genre: What kind of report this is, above the title.
        lead: What it is about, in a sentence or two.
        notices: What a reader must know before anything else, such as that the run failed.
    """

    genre: str
    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    key_figures: Sequence[KeyFigure]
    notices: Sequence[str]
    sections: Sequence[Section]


def write_page(page: Page, path: Path) -> Path:
    """Write the page as one HTML file, whole or not at all, and return its path."""
    text = _templates().get_template("page.html.j2").render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return path


def is_page(path: Path) -> bool:
    """Whether a file is a page that `write_page` wrote."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(_HEAD)


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("analysis.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    # The two things that are markup already, and are the project's own.
    style = resources.files("analysis.report").joinpath("page.css").read_text(encoding="utf-8")
    templates.globals["style"] = Markup(style)
    templates.globals["zip"] = zip
    templates.globals["generator"] = GENERATOR
    templates.filters["sentence"] = _sentence
    templates.filters["svg"] = lambda drawing, name: Markup(svg(drawing, name))
    return templates


def _sentence(text: str) -> str:
    """A note with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "…")) else ".")
