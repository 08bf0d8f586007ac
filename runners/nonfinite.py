"""Steps whose loss, gradients or scores are no finite numbers: found with one look at the device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conf.errors import UserError
from runners.data.base import Batch
from runners.world import World

_WHAT = ("training loss", "gradients", "scores")
_SHOWN = 8  # samples in a sentence


class NonFiniteError(UserError):
    """A step was not taken, since something of it is no finite number."""

    def __init__(self, step: int, wrong: Sequence[str], samples: Sequence[str]) -> None:
        more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
        super().__init__(
            f"step {step} is not taken, since {are(wrong)} not finite with samples "
            f"{', '.join(samples[:_SHOWN])}{more}: look at them, lower optimizer.lr in a new run, or go on "
            "with trainer.non_finite=skip"
        )


def are(wrong: Sequence[str]) -> str:
    """The names as the subject of a sentence, with its verb."""
    return f"the {' and the '.join(wrong)} {'is' if list(wrong) == [_WHAT[0]] else 'are'}"


def non_finite(
    losses: Tensor, grads: Sequence[Tensor], scores: Tensor, is_scaled: bool, world: World
) -> list[str]:
    """What is no finite number in any process.

    Args:
        losses: `[m]`, of the step's micro-batches.
        grads: As the step's last backward left them; none, maybe.
        scores: Of the step's samples, any shape.
        is_scaled: Whether a gradient scaler skips steps whose gradients overflow, which is no mistake then;
            nor are their scores.
    """
    # Smallest and largest entry, either of which a NaN replaces: five times quicker than isfinite.
    ends = [torch.stack(torch.aminmax(_local(grad))).double() for grad in grads if grad.numel()]
    gradient = torch.cat(ends) if ends else losses.new_zeros(0)  # none where a policy keeps no sample
    fine = [losses.isfinite().all(), gradient.isfinite().all(), scores.isfinite().all()]
    flags = torch.stack([~flag.to(losses.device) for flag in fine]).to(torch.int64)  # [3]
    loss, gradients, score = (bool(flag) for flag in world.sum(flags).tolist())
    if is_scaled:
        gradients, score = False, score and not gradients
    return [what for what, found in zip(_WHAT, (loss, gradients, score), strict=True) if found]


def suspects(parts: Sequence[Batch], losses: Sequence[Tensor], scores: Tensor) -> list[int]:
    """Running indices of this process's samples that may be to blame: those of micro-batches whose loss is
    not finite, else those whose score is not, else all.

    Args:
        scores: `[n]`, `[n, C]`, or empty without scoring.
    """
    samples = torch.cat([batch.index for batch in parts])
    bad_loss = [batch.index for batch, loss in zip(parts, losses, strict=True) if not loss.isfinite()]
    if bad_loss:
        return torch.cat(bad_loss).tolist()
    if len(scores):
        bad_score = samples[~scores.reshape(len(samples), -1).isfinite().all(1).cpu()]
        if len(bad_score):
            return bad_score.tolist()
    return samples.tolist()


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
