"""What every engine does for the manager, and the register of engines."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ghost.batch import Inputs
from ghost.choice import Choices
from ghost.config import GhostConfig
from ghost.distributed import ALONE, Ranks
from ghost.errors import GhostConfigError
from ghost.update import Update

LossFn = Callable[[nn.Module, Inputs, Tensor], Tensor]
"""`loss_fn(model, X, Y)`: the model's loss on a batch, counted as `loss_reduction` says."""

LayerScores = dict[tuple[str, str], Tensor]
"""Scores `[K, b, C]` by layer name and parameter name: K parts, b samples, C columns."""


class Engine(ABC):
    """Sees every micro-batch before its forward and after its backward.

    Args:
        model: The model itself, not a wrapper of it.
        config: Settings.
        val_data: Validation inputs and labels, or named sets of them, for engines that need them.
        loss_fn: The loss on a validation batch; None for a Hugging Face model's own.
        scaler: The loop's `torch.amp.GradScaler`, if it has one.
        ranks: The processes whose gradients the loop averages.
        optimizer: The loop's, for engines whose scores are about its step; None in a loop that trains
            nothing.

    Attributes:
        name: What `config.engine` says.
        needs_optimizer: Whether it only makes sense in a loop that trains.
        step_wide: Whether its numbers depend on what other processes hold of the step.
        takes_policies: Whether it has scores by which a step's samples can be weighed.
    """

    name: ClassVar[str]
    needs_optimizer: ClassVar[bool] = True
    step_wide: ClassVar[bool] = True
    takes_policies: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, config: GhostConfig, val_data: Any = None,
        loss_fn: LossFn | None = None, scaler: Any = None, ranks: Ranks = ALONE,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.scaler, self.ranks = model, config, scaler, ranks

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the validation sets that scores have columns for; `("",)` for one without a name."""
        return ("",)

    @property
    def choices(self) -> Choices:
        """Which algebra each matrix's latest scores were taken by."""
        return Choices()

    def parts(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """Label and family of each part of the scores, by layer name and parameter name."""
        return {}

    def val_rows(self) -> Tensor:
        """Which validation rows the latest scores are about, `[v]` int64."""
        return torch.zeros(0, dtype=torch.int64)

    @property
    def reads_gradients(self) -> bool:
        """Whether scores depend on all of the gradient that the optimizer gets, so that nothing may be in it
        when a step begins.
        """
        return False

    @abstractmethod
    def attach(self) -> None:
        """Make the model ready for scoring."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the model as it was before `attach`."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attached within the block."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    @abstractmethod
    def begin(self, X: Inputs, Y: Tensor, first: bool, share: float | Tensor) -> None:
        """Before a training micro-batch's forward.

        Args:
            X, Y: The training rows.
            first: Whether this is the first micro-batch of its step.
            share: The factor on this micro-batch's loss in the step's loss, that of all ranks; the loss that
                is differentiated here has `world_size` times that, since ranks average.
        """

    @abstractmethod
    def forward_inputs(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        """What goes through the model in place of `(X, Y)`."""

    def check_loss(self, loss: Tensor) -> None:
        """Raise `UnsupportedModelError` where the loss depends on parameters in a way that scoring cannot
        see.
        """
        del loss

    @abstractmethod
    def loss_factor(self) -> Tensor | None:
        """What the loss over `forward_inputs` is multiplied by to leave the training rows' own loss; None for
        1.
        """

    @abstractmethod
    def scale_outputs(self) -> None:
        """Apply `loss_factor` inside the model's backward, for loops that call `loss.backward()` alone."""

    @abstractmethod
    def collect(self) -> LayerScores:
        """After the backward: this micro-batch's scores."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget a micro-batch whose forward or backward failed."""

    def finish(self, rates: Mapping[int, float]) -> list[LayerScores]:
        """After the step's last micro-batch, when `.grad` is the step's whole training gradient.

        Args:
            rates: Learning rates of the parameters that the optimizer has, by `id`.

        Returns:
            The curvatures `⟨g_i, H Σ_j g_j⟩` of each micro-batch's samples, laid out as `collect`'s scores;
            nothing from an engine that is of first order.
        """
        del rates
        return []

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on elsewhere must know between two steps: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` of an engine with the same settings gave."""
        if state:
            raise GhostConfigError(
                f"state is not of an engine={self.name!r}, which keeps nothing between steps: go on with the "
                "engine that it was taken from."
            )

    def note_update(self, update: Update) -> None:  # noqa: B027 -- most engines do not ask the optimizer
        """After `optimizer.step()`: what it has made of the step."""

    def keep(self, sample: Tensor) -> None:  # noqa: B027 -- most engines have nothing but scores
        """After `collect`: write what else there is about the samples.

        Args:
            sample: Running indices of the micro-batch's rows, `[b]` int64.
        """

    def close(self) -> None:  # noqa: B027
        """At the end: finish what is being written."""


_ENGINES: dict[str, type[Engine]] = {}


def normalised(name: str) -> str:
    """The name as it is looked up: `GradDotProd`, `grad_dot_prod` and `graddotprod` are one."""
    return name.lower().replace("_", "")


def register_engine(engine: type[Engine]) -> type[Engine]:
    """Class decorator: the manager finds the engine by its `name`."""
    _ENGINES[normalised(engine.name)] = engine
    return engine


def engine_class(name: str) -> type[Engine]:
    """The engine registered under `name`.

    Raises:
        GhostConfigError: There is none.
    """
    if normalised(name) not in _ENGINES:
        raise GhostConfigError(f"engine={name!r} should be one of {', '.join(sorted(_ENGINES))}.")
    return _ENGINES[normalised(name)]
