"""The look that all figures share: sizes, colours, axes, and saving."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and in print. Its yellow is too pale for lines.
HELPS, HARMS = "#0072B2", "#D55E00"
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_PATTERNS = (("-", ""), ("--", "////"), (":", "...."), ("-.", "xxxx"))  # lines and bars, once colours run out
_GREY = "#666666"


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, without pyplot: nothing global is kept, and no display is needed."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class DomainStyle:
    """How one domain is drawn, as a line or as a bar."""

    colour: str
    line: str
    hatch: str


def domain_styles(domains: Iterable[str]) -> dict[str, DomainStyle]:
    """The style of each domain: the same in every figure, and in runs with the same domains."""
    styles = {}
    for i, domain in enumerate(sorted(set(domains))):
        line, hatch = _PATTERNS[i // len(_PALETTE) % len(_PATTERNS)]
        styles[domain] = DomainStyle(_PALETTE[i % len(_PALETTE)], line, hatch)
    return styles


def tidy(axes: Axes) -> None:
    """Two spines, small labels, and a faint grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize(8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def title(figure: Figure, text: str, notes: Sequence[str]) -> None:
    """A heading, and below the figure in grey what the reader must know about the numbers."""
    figure.suptitle(plain(text), fontsize=11, x=0.01, ha="left")
    figure.supxlabel("\n".join(map(plain, notes)), fontsize=7, color=_GREY, x=0.01, ha="left")


def plain(text: str) -> str:
    """Text that is shown as it stands: a `$` in an id would start a formula."""
    return text.replace("$", r"\$")


def shortened(text: str, width: int) -> str:
    """Text with its middle left out where it is longer than `width`: ids differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
