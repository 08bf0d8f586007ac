"""What a check of the engine against plain autograd has found, and how far apart the two may be."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ghost.plain import PlainUse, dot

SCORE_ROUNDING, GRADIENT_ROUNDING = 1.0, 3.0
"""Allowed errors in units of what a rounding of every weight does to the layer's training gradient. A
gradient feels its own rounding in full, an inner product only what of it points along the other gradient.
"""

ROUNDING_ALONE, DIGIT = 4.0, 0.05
"""Gradients within so many roundings of the whole model's are rounding alone; but not those that move, by
less than this share, when every weight is off by a rounding: they have a digit that is known.
"""

HEADER = ("layer", "type", "largest |score|", "error", "relative", "allowed", "gradient error", "verdict")


@dataclass(frozen=True)
class Deviation:
    """How far numbers are from the plain way's.

    Attributes:
        size: The largest magnitude of the plain way's numbers.
        error: The largest difference.
        tolerance: The largest difference allowed.
    """

    size: float
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its tolerance; what is not a number is not."""
        return self.error <= self.tolerance

    @property
    def resolved(self) -> bool:
        """Whether numbers wrong by half their size would be noticed."""
        return self.tolerance < self.size / 2

    @property
    def relative(self) -> float:
        """The error as a share of the size."""
        return self.error / self.size if self.size else math.inf * self.error if self.error else 0.0

    @property
    def severity(self) -> float:
        """The error in units of its tolerance; infinite for what is not a number."""
        if self.error == 0:
            return 0.0
        ratio = self.error / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class LayerCheck:
    """One module with trainable parameters of its own.

    Attributes:
        name, kind: Its qualified name and type.
        scores: Its scores; None where it is not scored.
        parameter: Its parameter whose training gradient is the farthest off.
        gradient: The norm of that gradient and of its difference.
    """

    name: str
    kind: str
    scores: Deviation | None
    parameter: str
    gradient: Deviation

    @property
    def passed(self) -> bool:
        """Whether scores and training gradients are right."""
        return self.gradient.passed and (self.scores is None or self.scores.passed)

    @property
    def severity(self) -> float:
        """The worse of both deviations in units of its tolerance."""
        return max(self.gradient.severity, 0.0 if self.scores is None else self.scores.severity)

    @property
    def verdict(self) -> str:
        """The layer in a word or two."""
        if not self.gradient.passed:
            return f"FAILED (gradient of {self.parameter})"
        if self.scores is None:
            return "not scored"
        if not self.scores.passed:
            return "FAILED"
        if self.scores.size == 0:
            return "zero on these rows"
        return "ok" if self.scores.resolved else "too small to tell"

    def cells(self) -> tuple[str, ...]:
        """A row of the table under `HEADER`."""
        gradient = f"{self.gradient.relative:.1e}"
        if self.scores is None:
            return (self.name, self.kind, *["-"] * 4, gradient, self.verdict)
        s = self.scores
        numbers = (f"{n:.1e}" for n in (s.size, s.error, s.relative, s.tolerance))
        return (self.name, self.kind, *numbers, gradient, self.verdict)


@dataclass(frozen=True)
class Verification:
    """One scored step held against plain autograd.

    Attributes:
        dtype: The coarsest dtype that the model computes in.
        rows, val_rows: Training and validation rows of the step.
        layers: Every module with trainable parameters.
        total: The scores summed over layers.
        forward: The loss of the scored forward against that of the model as it is.
        unscored: Qualified names of the trainable parameters that are not scored, or in part.
        notes: What was done to the model for the check, in sentences.
    """

    dtype: torch.dtype
    rows: int
    val_rows: int
    layers: Sequence[LayerCheck]
    total: Deviation
    forward: Deviation
    unscored: Sequence[str]
    notes: Sequence[str]

    @property
    def failed(self) -> list[str]:
        """Names of the layers whose scores or training gradients are wrong, the worst first."""
        wrong = [layer for layer in self.layers if not layer.passed]
        return [layer.name for layer in sorted(wrong, key=lambda layer: -layer.severity)]

    @property
    def unresolved(self) -> list[str]:
        """Names of the layers whose scores are right as far as one can tell, but too small beside their
        rounding, or zero, for a wrong one to stand out.
        """
        judged = ("ok", "not scored")
        return [layer.name for layer in self.layers if layer.passed and layer.verdict not in judged]

    @property
    def passed(self) -> bool:
        """Whether everything that was checked is right."""
        return not self.failed and self.total.passed and self.forward.passed

    def summary(self) -> str:
        """The outcome in a sentence."""
        dtype = str(self.dtype).removeprefix("torch.")
        checked = f"{self.rows} training and {self.val_rows} validation rows in {dtype}"
        if not self.forward.passed:
            return (
                f"Failed on {checked}: the scored forward's loss is off by {self.forward.relative:.1e}, so "
                "the forward of a layer rule computes something else than its layer."
            )
        if self.failed:
            others = f" and {len(self.failed) - 1} more" if len(self.failed) > 1 else ""
            return f"Failed on {checked}: plain autograd gives other numbers for {self.failed[0]!r}{others}."
        if not self.total.passed:
            off = f"{self.total.relative:.1e}"
            return f"Failed on {checked}: the layers are right, and their sum is off by {off}."
        return (
            f"Passed on {checked}: the scores are within {self.total.error:.1e} of plain autograd's, the "
            f"largest of which is {self.total.size:.1e}."
        )

    def remarks(self) -> Iterator[str]:
        """What a reader of the table should know besides, in sentences."""
        yield from self.notes
        for verdict, advice in (
            ("too small to tell", "check in float32 to judge them"),
            ("zero on these rows", "other rows may judge them"),
        ):
            names = [layer.name for layer in self.layers if layer.verdict == verdict]
            if names:
                yield f"{verdict.capitalize()}: {', '.join(names)}; {advice}."
        if self.unscored:
            yield f"Not scored: {', '.join(self.unscored)}."

    def table(self) -> str:
        """The layers as aligned text."""
        rows = [HEADER, *(layer.cells() for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i in (0, 1, len(HEADER) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        return "\n".join([self.table(), self.summary(), *self.remarks()])

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, for a JSON file."""
        return {
            "passed": self.passed,
            "summary": self.summary(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rows": self.rows,
            "val_rows": self.val_rows,
            "failed": self.failed,
            "unresolved": self.unresolved,
            "unscored": list(self.unscored),
            "notes": list(self.notes),
            "total": _plain(self.total),
            "forward": _plain(self.forward),
            "layers": [
                {
                    "name": layer.name,
                    "type": layer.kind,
                    "verdict": layer.verdict,
                    "scores": None if layer.scores is None else _plain(layer.scores),
                    "worst_parameter": layer.parameter,
                    "gradient": _plain(layer.gradient),
                }
                for layer in self.layers
            ],
        }


@dataclass(frozen=True)
class Norms:
    """Of scored gradients: the largest `‖g_i‖` of a row, and `‖G‖` of each column."""

    row: float
    targets: Sequence[float]

    @classmethod
    def of(cls, uses: Sequence[PlainUse]) -> Self:
        """Those of several uses together."""
        squares = torch.tensor([use.scored_squares for use in uses], dtype=torch.float64).sum(0)  # [B]
        targets = torch.tensor([use.target_squares for use in uses], dtype=torch.float64).sum(0)  # [C]
        return cls(math.sqrt(float(squares.max())), targets.sqrt().tolist())

    def floors(self, whole: "Norms", eps: float) -> list[float]:
        """What a layer's scores are off by at least, of each column: nothing, unless both of its gradients
        are about a rounding of the whole model's.
        """
        is_rounding = self.row <= ROUNDING_ALONE * eps * whole.row
        return [
            eps**2 * whole.row * target if is_rounding and own <= ROUNDING_ALONE * eps * target else 0.0
            for own, target in zip(self.targets, whole.targets, strict=True)
        ]


def score_deviation(
    found: Tensor, uses: Sequence[PlainUse], relative: float, eps: float, whole: "Norms | None" = None
) -> Deviation:
    """The scores `found [B]` or `[B, C]` against those of the uses, summed; of the columns, the worst.

    Rounding moves a score by a share of `‖g_i‖ ‖G‖`; the share is measured, on gradients of plain autograd
    alone, and is no less than the dtype's own. Gradients that are nothing but rounding are off by no share of
    themselves: each is off by a rounding of what the whole model's backward works with.

    Args:
        relative: Allowed error as a share of the largest |score|.
        eps: The dtype's relative rounding.
        whole: Of all layers together the largest `‖g_i‖`, and `‖G‖` of each column; None where these are all.
    """
    expected = torch.tensor([use.scores for use in uses], dtype=torch.float64).sum(0)  # [B, C]
    squares = torch.tensor([use.scored_squares for use in uses], dtype=torch.float64).sum(0)  # [B]
    own, total = Norms.of(uses), float(squares.sum())
    rounding = math.sqrt(sum(use.scored_rounding**2 for use in uses) / total) if total else 0.0
    noise = SCORE_ROUNDING * max(rounding, eps) * own.row
    errors = (found.double().cpu().view_as(expected) - expected).abs()
    digits_known = 0 < rounding < DIGIT
    floors = [0.0] * len(own.targets) if whole is None or digits_known else own.floors(whole, eps)
    columns = [
        Deviation(size, error, relative * size + noise * target + floor)
        for size, error, target, floor in zip(
            expected.abs().amax(0).tolist(), errors.amax(0).tolist(), own.targets, floors, strict=True
        )
    ]
    return max(columns, key=lambda column: column.severity)


def gradient_deviation(found: Tensor, uses: Sequence[PlainUse], relative: float, eps: float) -> Deviation:
    """A parameter's training gradient against that of its uses, summed; sizes are norms."""
    expected = uses[0].train
    for use in uses[1:]:
        expected = expected + use.train
    size = math.sqrt(dot(expected, expected))
    difference = found - expected
    parts = math.sqrt(sum(sum(use.squares) for use in uses))
    noise = GRADIENT_ROUNDING * max(sum(use.rounding for use in uses), eps * parts)
    return Deviation(size, math.sqrt(dot(difference, difference)), relative * size + noise)


def layer_checks(
    modules: Mapping[str, Sequence[str]], kinds: Mapping[str, str], uses: Mapping[str, PlainUse],
    scores: Mapping[str, Tensor], grads: Mapping[int, Tensor], relative: float, eps: float,
) -> list[LayerCheck]:  # fmt: skip
    """A check of every module.

    Args:
        modules: Qualified names of each module's parameters.
        kinds: Modules' types.
        uses: What plain autograd gives, by qualified name.
        scores: The scored layers' scores `[B]` or `[B, C]`.
        grads: The step's training gradients, by the parameter's `id`.
        relative, eps: As for `score_deviation`.
    """
    gradients = {
        key: gradient_deviation(
            grads[key], [use for use in uses.values() if id(use.parameter) == key], relative, eps
        )
        for key in {id(use.parameter) for use in uses.values()}
    }
    whole, checks = Norms.of(list(uses.values())), []
    for name, own in modules.items():
        worst = max(own, key=lambda use: gradients[id(uses[use].parameter)].severity)
        found = None
        if name in scores:
            found = score_deviation(scores[name], [uses[use] for use in own], relative, eps, whole)
        gradient = gradients[id(uses[worst].parameter)]
        checks.append(LayerCheck(name, kinds[name], found, worst.removeprefix(f"{name}."), gradient))
    return checks


def _plain(deviation: Deviation) -> dict[str, float]:
    return {
        "size": deviation.size,
        "error": deviation.error,
        "tolerance": deviation.tolerance,
        "relative": deviation.relative,
    }
