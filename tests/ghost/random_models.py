"""Random small models in float64, from the layers that have rules, with random batches and settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ghost import LossReduction, UnsupportedModelError
from ghost.batch import Inputs
from ghost.layers import rule_for
from tests.ghost.reference import LossFn, Rows, class_loss, class_loss_sum, token_loss

CLASSES, VOCABULARY, WIDTH = 4, 11, 4

ALGEBRAS = {
    "concat": ("auto", "token_token", "target", "fused"),
    "separate": ("auto", "target", "fused"),
    "bitwise": ("auto", "target"),
}
"""What each mode may be forced to."""


@dataclass
class Trial:
    """A model and one step of it.

    Attributes:
        reduction: How the loss counts.
        tied: Whether the model's table and head share a matrix.
    """

    model: nn.Module
    train: Rows
    val: Rows
    loss: LossFn
    reduction: LossReduction
    tied: bool = False


@st.composite
def trials(draw: st.DrawFn, joint: bool) -> Trial:
    """A model of any kind; `joint` keeps to what one pass over both sides can score."""
    torch.manual_seed(draw(st.integers(0, 999)))
    trial = draw(st.sampled_from([tables, sequences, maps, languages]))(draw, joint)
    trial.model.double()
    parameters = list(trial.model.parameters())
    for p in parameters:  # away from the zeros and ones of a fresh start
        p.data += 0.1 * torch.randn_like(p)
    for p in parameters[1:]:
        p.requires_grad_(draw(st.integers(0, 4)) > 0)
    return trial


# --- layers ------------------------------------------------------------------------------------------------


def has_rule(module: nn.Module) -> bool:
    """Whether the library has a rule that accepts the layer."""
    rule = rule_for(module)
    if rule is None:
        return False
    try:
        rule.check("layer", module)
    except UnsupportedModelError:
        return False
    return True


def batch_norm(kind: type[nn.Module], channels: int) -> nn.Module:
    """In eval mode, with statistics of its own."""
    norm: Any = kind(channels).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


DENSE = [
    make
    for make in (
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.Linear(WIDTH, WIDTH, bias=False),
        lambda: Conv1D(WIDTH, WIDTH),
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.LayerNorm(WIDTH, bias=False),
        lambda: nn.RMSNorm(WIDTH),
    )
    if has_rule(make())
]
"""Layers `[…, WIDTH]` to `[…, WIDTH]`."""

ACTIVATIONS = [nn.Tanh, nn.GELU, nn.Identity, *(kind for kind in (nn.PReLU,) if has_rule(kind()))]

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, list[Any]] = {
    dims: [kind] if has_rule(kind(2, 2, 1)) else []
    for dims, kind in {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}.items()
}
NORMS: dict[int, list[Callable[[], nn.Module]]] = {
    dims: [
        make
        for make in (
            nn.Identity,
            lambda: nn.GroupNorm(2, WIDTH),
            lambda kind=kind: batch_norm(kind, WIDTH),
        )
        if isinstance(make(), nn.Identity) or has_rule(make())
    ]
    for dims, kind in {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.items()
}
"""Layers `[b, WIDTH, …]` to the same, by the number of further sizes."""


class Residual(nn.Module):
    """`x + inner(x)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One layer, two uses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Mixed(nn.Module):
    """Each position sees the mean of those up to it, so that tokens depend on each other as in attention."""

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
        return x + x.cumsum(1) / count[:, None]


class Language(nn.Module):
    """Ids to logits: a table, positions, a body and a head that may share the table's matrix."""

    def __init__(self, body: nn.Module, padding_idx: int | None, places: bool, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding_idx)
        self.places = nn.Embedding(16, WIDTH) if places else None
        self.body = body
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if self.places is not None:
            # A vector as long as the batch is of rows or of positions, which nobody can tell: [1, T] there.
            places = torch.arange(ids.shape[1])
            x = x + self.places(places[None] if ids.shape[0] == ids.shape[1] else places)
        return self.head(self.body(x))


def body(draw: st.DrawFn, joint: bool) -> nn.Sequential:
    """One to three layers with what lies between them."""
    parts: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        inner = draw(st.sampled_from(DENSE))()
        around = draw(
            st.sampled_from([nn.Sequential, Residual] if joint else [nn.Sequential, Residual, Twice])
        )
        parts += [around(inner), draw(st.sampled_from(ACTIVATIONS))()]
    return nn.Sequential(*parts)


def convolution(draw: st.DrawFn, dims: int, channels: int) -> nn.Module:
    """From `channels` to WIDTH channels, with any options that maps of five points allow."""
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (3, 2, 2))
    padding = draw(st.sampled_from([0, 1, 2] if stride > 1 else [0, 1, 2, "same"]))
    make = CONVOLUTIONS[dims]
    groups = draw(st.sampled_from([1, 2] if has_rule(make(2, 2, 1, groups=2)) else [1]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    return make(
        channels, WIDTH, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip


# --- models with their batches -----------------------------------------------------------------------------


def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Rows of the two sides."""
    return draw(st.integers(1, 5)), draw(st.integers(1, 4))


def class_labels(draw: st.DrawFn, rows: int) -> Tensor:
    """`[rows]`, some of them ignored, the first one not."""
    labels = torch.randint(0, CLASSES, (rows,))
    if draw(st.booleans()):
        labels[1:][torch.rand(rows - 1) < 0.4] = -100
    return labels


def token_labels(draw: st.DrawFn, rows: int, length: int, classes: int) -> Tensor:
    """`[rows, length]`, rows of any length and with gaps; of the first row the first two are counted."""
    labels = torch.randint(0, classes, (rows, length))
    lengths = torch.randint(0, length + 1, (rows,))
    if draw(st.booleans()):
        labels[torch.arange(length) >= lengths[:, None]] = -100
    if draw(st.booleans()):
        labels[torch.rand(rows, length) < 0.3] = -100
    labels[0, :2] = 1
    return labels


def by_class(draw: st.DrawFn) -> tuple[LossFn, LossReduction]:
    """A loss over class labels."""
    return draw(
        st.sampled_from([(class_loss, LossReduction.SAMPLE_MEAN), (class_loss_sum, LossReduction.SUM)])
    )


def tables(draw: st.DrawFn, joint: bool) -> Trial:
    """`[b, d]`."""
    model = nn.Sequential(body(draw, joint), nn.Linear(WIDTH, CLASSES, bias=draw(st.booleans())))
    train, val = ((torch.randn(n, WIDTH).double(), class_labels(draw, n)) for n in sizes(draw))
    return Trial(model, train, val, *by_class(draw))


def sequences(draw: st.DrawFn, joint: bool) -> Trial:
    """`[b, T, d]` or `[b, S, T, d]` with a class a row, or `[b, T, d]` with a class a position."""
    model = nn.Sequential(body(draw, joint), Mixed(), nn.Linear(WIDTH, CLASSES))
    length = draw(st.integers(2, 6))
    shape = draw(st.sampled_from([(length, WIDTH), (2, length, WIDTH)]))
    if len(shape) == 3 or draw(st.booleans()):
        model = nn.Sequential(*(part for part in model if not isinstance(part, Mixed)))
        train, val = ((torch.randn(n, *shape).double(), class_labels(draw, n)) for n in sizes(draw))
        return Trial(model, train, val, *by_class(draw))
    train, val = (
        (torch.randn(n, *shape).double(), token_labels(draw, n, length, CLASSES)) for n in sizes(draw)
    )
    return Trial(model, train, val, token_loss, LossReduction.TOKEN_MEAN)


def maps(draw: st.DrawFn, joint: bool) -> Trial:
    """`[b, c, …]` in one to three dimensions."""
    dims, channels = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    shape = (channels, *(draw(st.integers(5, 6)) for _ in range(dims)))
    features: list[nn.Module] = [convolution(draw, dims, channels), nn.Tanh()]
    features += [draw(st.sampled_from(NORMS[dims]))()]
    if draw(st.booleans()):
        features += [Residual(CONVOLUTIONS[dims](WIDTH, WIDTH, 3, padding="same")), nn.Tanh()]
    for make in TRANSPOSED[dims]:
        if draw(st.booleans()):
            features += [
                make(WIDTH, WIDTH, draw(st.integers(1, 3)), stride=draw(st.integers(1, 2))),
                nn.Tanh(),
            ]
    if not joint and draw(st.booleans()):
        features += [Twice(CONVOLUTIONS[dims](WIDTH, WIDTH, 1))]
    features += [nn.Flatten()]
    width = nn.Sequential(*features)(torch.zeros(1, *shape)).shape[1]
    model = nn.Sequential(*features, nn.Linear(width, CLASSES))
    train, val = ((torch.randn(n, *shape).double(), class_labels(draw, n)) for n in sizes(draw))
    return Trial(model, train, val, *by_class(draw))


def shifted_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Next-token cross-entropy of bare logits."""
    return F.cross_entropy(model(X)[:, :-1].flatten(0, 1), Y[:, 1:].flatten())


def languages(draw: st.DrawFn, joint: bool) -> Trial:
    """Ids `[b, T]`; sides of different lengths where the model is causal or each has a pass of its own."""
    causal, tied = draw(st.booleans()), draw(st.booleans())
    padding_idx = draw(st.sampled_from([None, 0, 3]))
    inner = nn.Sequential(body(draw, joint), Mixed(), body(draw, joint))
    model = Language(inner, padding_idx, places=draw(st.booleans()), tied=tied)
    lengths = [draw(st.integers(2, 6))] * 2
    if causal or not joint:
        lengths[1] = draw(st.integers(2, 6))
    train, val = (
        (torch.randint(0, VOCABULARY, (n, length)), token_labels(draw, n, length, VOCABULARY))
        for n, length in zip(sizes(draw), lengths, strict=True)
    )
    if causal:
        return Trial(model, train, val, shifted_loss, LossReduction.CAUSAL_TOKEN_MEAN, tied)
    return Trial(model, train, val, token_loss, LossReduction.TOKEN_MEAN, tied)
