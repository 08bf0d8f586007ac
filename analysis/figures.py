"""The look that all figures share: sizes, colours, axes, and saving."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

# Okabe and Ito's palette: told apart by colour-blind readers and in print. Its yellow is too pale for lines.
HELPS, HARMS = "#0072B2", "#D55E00"
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Lines, bars and points, once colours run out.
_PATTERNS = (("-", "", "o"), ("--", "////", "s"), (":", "....", "^"), ("-.", "xxxx", "D"))
_GREY = "#666666"
_PIXELS = 110  # of a page an inch, where the page is that wide
_POINTS = 1200  # of a line that is drawn: more than a screen has columns for it


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, without pyplot: nothing global is kept, and no display is needed."""
    # A page's font may need more room than the one that the layout is made with.
    layout = ConstrainedLayoutEngine(w_pad=0.09)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class DomainStyle:
    """How one domain is drawn, as a line, as a bar or as points."""

    colour: str
    line: str
    hatch: str
    marker: str


def domain_styles(domains: Iterable[str]) -> dict[str, DomainStyle]:
    """The style of each domain: the same in every figure, and in runs with the same domains."""
    styles = {}
    for i, domain in enumerate(sorted(set(domains))):
        pattern = _PATTERNS[i // len(_PALETTE) % len(_PATTERNS)]
        styles[domain] = DomainStyle(_PALETTE[i % len(_PALETTE)], *pattern)
    return styles


def tidy(axes: Axes) -> None:
    """Two spines, small labels, and a faint grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize(8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class Drawing:
    """A figure with its words apart: an image carries them in it, a page has them as text beside it.

    Attributes:
        title: What is shown.
        notes: What the reader must know about the numbers, a sentence each.
    """

    figure: Figure
    title: str
    notes: Sequence[str]


def plain(text: str) -> str:
    """Text that is shown as it stands: a `$` in an id would start a formula."""
    return _printable(text).replace("$", r"\$")


def shortened(text: str, width: int) -> str:
    """Text with its middle left out where it is longer than `width`: ids differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def thinned(values: NDArray[np.float64], lines: int = 1) -> NDArray[np.intp]:
    """Positions of the points that show a long series as it looks whole: the first, the last, and the lowest
    and highest of each stretch.

    Args:
        values: `[n]`.
        lines: How many lines share the figure: of many, each has fewer points.
    """
    points = max(_POINTS // max(1, lines // 10), 100)
    if values.size <= points:
        return np.arange(values.size)
    stretches = np.array_split(np.arange(values.size), points // 2)
    # Values that are not finite leave a gap in the line; they must not hide the extremes beside them.
    filled = np.where(np.isfinite(values), values, np.nanmedian(values) if np.isfinite(values).any() else 0.0)
    ends = [stretch[pick(filled[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)]
    return np.unique([0, *ends, values.size - 1])


def save(drawing: Drawing, path: Path) -> Path:
    """Write the figure as PNG, the title above it and the notes below, and return its path."""
    figure = drawing.figure
    figure.suptitle(plain(drawing.title), fontsize=11, x=0.01, ha="left")
    figure.supxlabel("\n".join(map(plain, drawing.notes)), fontsize=7, color=_GREY, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def svg(drawing: Drawing, name: str) -> str:
    """The figure as an `<svg>` element for a page, without title and notes; the same bytes each time.

    Text stays text, in the page's font. Whatever a figure refers to within itself begins with `name`, which
    must be another for each figure of a page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _drop_metadata(root)
    _make_own(root, f"{name}-")
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "style": f"width: {drawing.figure.get_figwidth() * _PIXELS:.0f}px",
        "role": "img",
        "aria-label": _printable(drawing.title),
    }
    return ElementTree.tostring(root, encoding="unicode")


def _printable(text: str) -> str:
    """Text without control characters, which have no place in an SVG."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _drop_metadata(root: ElementTree.Element) -> None:
    for child in list(root):
        if child.tag.endswith("}metadata"):
            root.remove(child)


def _make_own(root: ElementTree.Element, prefix: str) -> None:
    """Give what is referred to a name of the figure's own, drop the other ids, and drop XML namespaces, which
    HTML knows by itself.
    """
    referred = {
        found
        for element in root.iter()
        for name, value in element.attrib.items()
        if (found := _reference(name, value)) is not None
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        kept = {}
        for name, value in element.attrib.items():
            name = name.rpartition("}")[2]
            if name == "id" and value not in referred:
                continue
            target = _reference(name, value)
            if name == "id":
                value = prefix + value
            elif target is not None:
                value = value.replace(f"#{target}", f"#{prefix}{target}")
            kept[name] = value
        element.attrib = kept


def _reference(name: str, value: str) -> str | None:
    """The id that an attribute refers to: `href="#id"` or `clip-path="url(#id)"`; None for any other."""
    if name.endswith("href") and value.startswith("#"):
        return value[1:]
    found = re.search(r"url\(#([^)]+)\)", value)
    return found[1] if found else None
