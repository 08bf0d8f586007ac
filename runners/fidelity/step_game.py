"""The game of one optimizer step: a subset of the batch is worth the fall in validation loss of the real step
that its gradients make, the number that losses are divided by held fixed.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import ConfigError
from ghost.batch import Inputs, plain
from ghost.loss import IGNORED_LABEL

OneVector = Callable[[nn.Parameter], torch.optim.Optimizer]


class StepGame:
    """What subsets of a batch are worth, at a model's present weights and an optimizer's present state.

    The model's parameters become views of one vector, which the optimizer steps; after each step weights and
    state are put back. Two games of the same players are played at once: the real fall in loss, and the one
    that is linear in the weights, `-⟨∇L_val, step⟩`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OneVector,
        parts: Tensor,
        val_grad: Tensor,
        fall: Callable[[], float],
    ) -> None:
        """Prepare.

        Args:
            model: Its parameters are all trained, and of one dtype.
            optimizer: Makes the optimizer of the vector of all weights `[N]`, in its state before the step.
            parts: Each sample's part of the step's gradient, `[n, N]`.
            val_grad: The validation loss's gradient, `[N]`.
            fall: The fall in validation loss at the model's weights, since before the step.
        """
        self.players = len(parts)
        self.parts = parts
        self._val_grad = val_grad
        self._fall = fall
        self._weights = one_vector(model)
        self._optimizer = optimizer(self._weights)
        self._before = self._weights.detach().clone()
        self._state = {key: value.clone() for key, value in self._optimizer.state[self._weights].items()}
        self._gradient = torch.zeros_like(self._before)
        self._worth: dict[int, tuple[float, float]] = {}

    @property
    def subsets(self) -> int:
        """How many different subsets have been looked at."""
        return len(self._worth)

    def walk(self, order: Sequence[int]) -> Tensor:
        """What the order's beginnings are worth, the empty one first, in both games: `[n + 1, 2]` float64."""
        subset = 0
        self._gradient.zero_()
        found = [self._worth_of(subset)]
        for player in order:
            subset |= 1 << player
            self._gradient += self.parts[player]
            found.append(self._worth_of(subset))
        return torch.tensor(found, dtype=torch.float64)

    def _worth_of(self, subset: int) -> tuple[float, float]:
        """Of the subset whose gradient is in `_gradient`."""
        if subset not in self._worth:
            self._worth[subset] = self._step()
        return self._worth[subset]

    @torch.no_grad()
    def _step(self) -> tuple[float, float]:
        self._weights.grad = self._gradient
        self._optimizer.step()
        linear = -float(self._val_grad @ (self._weights - self._before))
        fall = self._fall()
        self._weights.copy_(self._before)
        state = self._optimizer.state[self._weights]
        for key in list(state):
            if key in self._state:
                state[key].copy_(self._state[key])
            else:  # made by an optimizer that had taken no step before
                del state[key]
        return fall, linear


def one_vector(model: nn.Module) -> nn.Parameter:
    """All weights as one vector `[N]`, of which the model's parameters become views."""
    parameters = list(model.parameters())
    vector = nn.Parameter(flat(parameters))
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = vector.data[start:end].view_as(parameter)
        start = end
    return vector


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector, detached."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class FallInLoss:
    """The fall in a causal language model's mean loss on the given rows since this was made.

    It is computed as a difference from the start, so that no two losses near each other are subtracted: with
    `z` the logits before and `s` the logarithm of the sum of their exponentials, a token's loss rises by
    `log Σ_v exp(z'_v - s) - (z'_y - z_y)`, of which the sum is near 1 and added up in float64.

    The vocabulary is gone through in blocks of words: all logits at once would not stay in a core's cache.
    """

    WORDS = 2048  # of a block

    def __init__(self, model: nn.Module, X: Inputs, Y: Tensor) -> None:
        """Note where the loss is.

        Args:
            model: A causal language model of transformers, whose logits are a linear head of what its base
                model ends with.
            X: Its inputs by name.
            Y: `[v, T]` labels, -100 where not counted, not shifted.

        Raises:
            ConfigError: The model does more to its logits than that.
        """
        self._base, self._head = _base_and_head(model)
        self._inputs = plain(X)
        following = F.pad(Y[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()  # [v T]
        self._counted = following != IGNORED_LABEL
        self._following = following[self._counted]  # [n]
        with torch.no_grad():
            logits = model(**self._inputs).logits.flatten(0, 1)[self._counted]  # [n, V]
            hidden = self._hidden()
            if not torch.allclose(self._head(hidden), logits, rtol=1e-4, atol=1e-4):
                raise ConfigError(
                    f"the logits of {type(model).__name__} are not its head's: one_step wants a model such "
                    "as model@fidelity.model=gpt2-nano"
                )
            self._normaliser = logits.double().logsumexp(1, keepdim=True).to(logits.dtype)  # [n, 1]
            self._right = self._following_logits(hidden)

    @torch.no_grad()
    def __call__(self) -> float:
        hidden = self._hidden()
        total = hidden.new_zeros(len(hidden), dtype=torch.float64)
        for part in self._logits(hidden):
            total += part.exp_().sum(1, dtype=torch.float64)
        risen = total.log()
        if not risen.isfinite().all():  # so long a step that an exponential leaves float32
            parts = [part.double().logsumexp(1) for part in self._logits(hidden)]
            risen = torch.stack(parts).logsumexp(0)
        gained = self._following_logits(hidden) - self._right
        return float((gained - risen).mean())

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """`z' - s` of a block of words after the other, `[n, w]`."""
        for words in _blocks(self._head.out_features, self.WORDS):
            yield torch.addmm(self._offset(words), hidden, self._head.weight[words].T)

    def _hidden(self) -> Tensor:
        """What the head has for the counted tokens, `[n, d]`."""
        found: Tensor = self._base(**self._inputs).last_hidden_state
        return found.flatten(0, 1)[self._counted]

    def _offset(self, words: slice) -> Tensor:
        return -self._normaliser if self._head.bias is None else self._head.bias[words] - self._normaliser

    def _following_logits(self, hidden: Tensor) -> Tensor:
        """The logit of the word that comes, `[n]` float64."""
        chosen = (hidden.double() * self._head.weight[self._following].double()).sum(1)
        return chosen if self._head.bias is None else chosen + self._head.bias[self._following]


def _base_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    base, head = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", lambda: None)()
    if base is None or base is model or not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no linear head on a base model: one_step wants a language model "
            "such as model@fidelity.model=gpt2-nano"
        )
    return base, head


def _blocks(number: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, number, size))
