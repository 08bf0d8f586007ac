"""What a training loop holds of its run's checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runners.resume.checkpoints import Checkpoints
from runners.resume.signals import StopSignals
from runners.resume.state import Trained


@dataclass(frozen=True)
class Keeping:
    """How a run's state outlives its process: where it goes, what it is, and who asks for it."""

    checkpoints: Checkpoints
    trained: Trained
    signals: StopSignals

    def write(
        self, step: int, manager: Mapping[str, Any], loop: Mapping[str, Any],
        random: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """A checkpoint behind so many steps; arguments as for `Checkpoints.write`."""
        self.checkpoints.write(step, self.trained, manager, loop, random)
