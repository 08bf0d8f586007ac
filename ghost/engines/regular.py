"""No scoring: the same loop as a baseline."""

from torch import Tensor

from ghost.batch import Inputs
from ghost.engines.base import Engine, LayerScores, register_engine


@register_engine
class RegularEngine(Engine):
    """Leaves model and batches alone."""

    name = "regular"

    def attach(self) -> None:
        """Nothing to make ready."""

    def detach(self) -> None:
        """Nothing to undo."""

    def begin(self, X: Inputs, Y: Tensor, first: bool, share: float | Tensor) -> None:
        """Nothing to note."""

    def forward_inputs(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        return X, Y

    def loss_factor(self) -> None:
        return None

    def scale_outputs(self) -> None:
        """Nothing to scale."""

    def collect(self) -> LayerScores:
        return {}

    def abandon(self) -> None:
        """Nothing to forget."""
