"""Second-order In-Run Data Shapley: what the validation loss's curvature takes off a step's values.

An SGD step `w − η c Σ_j g_j` lowers the validation loss by
`η c ⟨G, Σ_j g_j⟩ − (η c)²/2 ⟨Σ_j g_j, H Σ_j g_j⟩` to second order, and the Shapley values of that are

    value_i = η c ⟨G, g_i⟩ − (η c)²/2 ⟨g_i, H Σ_j g_j⟩          (Wang et al., ICLR 2025, Theorem 4)

with `G` and `H` the validation loss's gradient and Hessian, and `Σ_j g_j` the step's training gradient. The
second inner product is a sample's *curvature*. `H Σ_j g_j` is one product of the Hessian with a vector, known
when the step's last backward is done: the gradient of `⟨G(w), Σ_j g_j⟩` by w.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import autocast
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghost.batch import Inputs, plain
from ghost.config import GhostConfig
from ghost.distributed import is_sharded
from ghost.engines.base import LossFn
from ghost.errors import GhostConfigError, ProtocolError, UnsupportedModelError
from ghost.kept import KeepingTargetTap, KeepingWatchTap, Kept
from ghost.layers import Layer
from ghost.step import StepState
from ghost.taps import Tap
from ghost.validation import (
    ScoredParts,
    SeparateValidation,
    ValData,
    stack_columns,
    weighted_sums,
)

Gradients = list[Tensor | None]
"""A tensor a parameter; None for one that has no part in a loss."""


def refuse_second_order(model: nn.Module, scaler: Any) -> None:
    """Raise `GhostConfigError` where a step's training gradient or the Hessian cannot be had."""
    if is_sharded(model):
        raise GhostConfigError(
            "order=2 needs the whole training gradient and the validation loss's second derivative, which "
            "fully_shard (FSDP2) does not give: use DistributedDataParallel, or order=1."
        )
    if scaler is not None and scaler.is_enabled():
        raise GhostConfigError(
            "order=2 under a GradScaler would lose second derivatives, which float16 is too narrow for: "
            "train in bfloat16 or float32, or use order=1."
        )


def refuse_gradients_left(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `ProtocolError` where a step begins with gradients of another: they would count as its samples',
    or move the weights without being seen.

    Args:
        parameters: What the optimizer trains, by name.
    """
    for name, p in parameters.items():
        if p.grad is not None and bool(p.grad.any()):
            raise ProtocolError(
                f"{name}.grad is not zero where a step begins, and these scores are of the step that the "
                "optimizer takes, with all that is in it: call optimizer.zero_grad() before the step."
            )


def relative_rates(rates: Mapping[int, float]) -> dict[int, float]:
    """Learning rates as shares of the largest; of rates that are all zero, ones."""
    largest = max(rates.values(), default=0.0)
    return {key: rate / largest if largest else 1.0 for key, rate in rates.items()}


class SecondOrderValidation(SeparateValidation):
    """`SeparateValidation` that gives products with the validation loss's Hessian too, at the step's weights.

    A validation pass that is all there is keeps its graph until the end of the step. Passes in parts run
    again, so that the graph of one part is held at a time.
    """

    def __init__(
        self, model: nn.Module, state: StepState, layers: list[Layer], scored: ScoredParts,
        config: GhostConfig, val_data: ValData | None, loss_fn: LossFn | None, scaler: Any, kept: Kept,
    ) -> None:  # fmt: skip
        refuse_second_order(model, scaler)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._graph: Gradients | None = None
        self._is_checked = False
        super().__init__(model, state, layers, scored, config, val_data, loss_fn, scaler, kept)
        self._is_one_pass = [len(parts) for parts in self._micro_batches] == [1]

    def _tap(self, layer: Layer, config: GhostConfig) -> Tap:
        make = KeepingWatchTap if config.bitwise else KeepingTargetTap
        return make(layer, self._scored[layer.name], config.algebra, self._kept, choices=self.choices)

    def release(self) -> None:
        self._graph = None
        super().release()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._graph = None  # of a step that is given up
        super().load_state_dict(state)

    def _pass_gradients(self, X: Inputs, Y: Tensor, params: list[nn.Parameter]) -> Gradients:
        if not self._is_one_pass:
            return super()._pass_gradients(X, Y, params)
        self._graph = self._differentiable(X, Y)
        by_id = {id(p): grad for p, grad in zip(self._trained, self._graph, strict=True)}
        return [None if (grad := by_id[id(p)]) is None else grad.detach() for p in params]

    def _differentiable(self, X: Inputs, Y: Tensor) -> Gradients:
        """The gradient of a validation pass by all trained parameters, with its graph."""
        with self._beside_training(), twice_differentiable():
            loss = self._loss_fn(self._model, plain(X), Y)
            found = torch.autograd.grad(loss, self._trained, create_graph=True, allow_unused=True)
        grads: Gradients = list(found)
        if not self._is_checked:
            refuse_single_derivatives(grads, self._model)
            self._is_checked = True
        return grads

    def hessian_product(self, rates: Mapping[int, float]) -> dict[str, Tensor]:
        """`H Σ_j g_j` of each column by qualified name of the scored parameters, `[C, *shape]`; `Σ_j g_j` is
        in the parameters' `.grad`.

        Where parameter groups have learning rates of their own, a parameter's entry is of the direction
        `Σ_l (η_l / η_k) g_l` over all groups l, η_k being its own rate: then `(η_k c)²/2` times it is the
        second-order term, whatever the group. It is zero where η_k is.

        Args:
            rates: Learning rates of the parameters that are trained, by `id`.
        """
        shares = relative_rates(rates)
        direction = [_moved(p, shares.get(id(p), 0.0)) for p in self._trained]
        params = {id(p): p for p in self._names.values()}
        columns = [
            weighted_sums(
                ((weight, self._product(direction, list(params.values()), X, Y)) for weight, X, Y in parts),
                list(params.values()),
                self._dtype,
                self._device,
            )
            for parts in self._micro_batches
        ]
        self._graph = None
        found = {
            key: _of_own_rate(product, shares.get(key, 0.0))
            for key, product in zip(params, stack_columns(columns), strict=True)
        }
        return {name: found[id(p)] for name, p in self._names.items()}

    def _product(
        self, direction: Sequence[Tensor | None], params: list[nn.Parameter], X: Inputs, Y: Tensor
    ) -> Gradients:
        """The Hessian of one validation pass times the direction, for each of `params`."""
        graph = self._differentiable(X, Y) if self._graph is None else self._graph
        pairs = [
            (grad, along)
            for grad, along in zip(graph, direction, strict=True)
            if grad is not None and grad.requires_grad and along is not None
        ]
        if not pairs:  # nothing moves, or the loss is linear in what does
            return [None] * len(params)
        outputs, along = zip(*pairs, strict=True)
        with twice_differentiable(), autocast(self._device.type, enabled=False):
            return list(torch.autograd.grad(outputs, params, along, allow_unused=True))


def _moved(p: nn.Parameter, share: float) -> Tensor | None:
    """How far the step moves a parameter, in units of the largest rate; None where it does not."""
    if p.grad is None or share == 0:
        return None
    return p.grad.detach() if share == 1 else p.grad.detach() * share


def _of_own_rate(product: Tensor, share: float) -> Tensor:
    """A product with a direction in units of the largest rate, in units of the parameter's own."""
    if share == 1:
        return product  # uncopied: it is as large as the parameter
    return product / share if share else torch.zeros_like(product)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Without fused attention and compiled graphs, which have no second derivative; also for the backwards,
    in which checkpointed activations are computed again.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


_ENDS = ("torch::autograd::NotImplemented", "torch::autograd::Error")
"""Graph nodes that autograd puts where an operation has no second derivative. It passes some of them by."""


def refuse_single_derivatives(grads: Gradients, model: nn.Module) -> None:
    """Raise `UnsupportedModelError` where gradients cannot be differentiated to the end."""
    pending = [grad.grad_fn for grad in grads if grad is not None and grad.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        sources = [source for source, _ in node.next_functions if source is not None]
        if node.name() in _ENDS:
            where = f" (near {', '.join(sorted({s.name() for s in sources}))})" if sources else ""
            raise UnsupportedModelError(
                f"the validation loss of {type(model).__name__} takes a function that has no second "
                f"derivative{where}, which order=2 needs: replace that function, or use order=1."
            )
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
