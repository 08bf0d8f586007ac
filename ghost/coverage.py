"""What the scores speak of: each layer's share of the trainable parameters and of the validation gradient's
squared norm, and what is left out.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ghost.config import GhostConfig
from ghost.discovery import find_layers, uncovered_parameters
from ghost.distributed import gathered, gradients, plain_type, reshard
from ghost.errors import GhostConfigError
from ghost.gradients import cut
from ghost.heads import Part, attention_heads
from ghost.layers import Layer
from ghost.selection import Selection, family

Selected = dict[tuple[str, str], list[Part] | None]
"""What of a parameter is scored, by layer name and parameter name: None for all of it, else these parts."""


def coverage(model: nn.Module, config: GhostConfig, val_loss: Tensor) -> dict[str, Any]:
    """Which layers are scored and how much of the model and of `∇L_val` that is.

    Shared parameters count once: in `layers` for the first that has them, in the totals if any scored layer
    does.

    Args:
        val_loss: A validation loss with its graph; it is differentiated here and `.grad` is left alone.

    Returns:
        `parameters` and `scored_parameters` (numbers), `scored_parameter_share` and `scored_val_grad_share`
        (of `‖∇L_val‖²`),
        `layers` (name, type, family, parameters, shared_parameters, val_grad_share, scored),
        `families` (by name: parameter_share, val_grad_share and what of these is scored),
        `gaps` (what is not scored, like-named layers of all blocks together: name, layers, parameter_share,
        val_grad_share) and `unscored_parameters` (names that no layer accounts for).
    """
    reshard(model)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = gradients(val_loss, model, params)
    return _Coverage(model, config, {id(p): g for p, g in zip(params, grads, strict=True)}).report()


def coverage_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A `coverage` report in sentences for a log: the whole, each family, and each gap."""
    of_gradient = "of the validation gradient's squared norm"
    yield (
        f"Scoring {_percent(report['scored_parameter_share'])} of {report['parameters']} trainable "
        f"parameters and {_percent(report['scored_val_grad_share'])} {of_gradient}"
    )
    for name, shares in report["families"].items():
        yield (
            f"Family {name}: {_percent(shares['parameter_share'])} of the parameters "
            f"({_percent(shares['scored_parameter_share'])} scored), {_percent(shares['val_grad_share'])} "
            f"{of_gradient} ({_percent(shares['scored_val_grad_share'])} scored)"
        )
    for gap in report["gaps"]:
        many = f" in {gap['layers']} layers" if gap["layers"] > 1 else ""
        yield (
            f"Not scored: {gap['name']}{many} ({_percent(gap['parameter_share'])} of the parameters, "
            f"{_percent(gap['val_grad_share'])} {of_gradient})"
        )


def refuse_gaps(model: nn.Module, config: GhostConfig) -> None:
    """Raise `GhostConfigError`, naming layers and parameters, where anything trainable is not scored."""
    found = _Coverage(model, config, {})
    gaps = [
        f"{name} ({_percent(missing.parameters / found.total.parameters)} of the parameters)"
        for name, _, missing in found.gaps()
    ]
    if gaps:
        shown = ", ".join(gaps[:5]) + (f" and {len(gaps) - 5} more" if len(gaps) > 5 else "")
        raise GhostConfigError(
            f"strict=True, but {shown} would not be scored: select all layers, freeze what is not to be "
            "trained, or set strict=False."
        )


def selected_parts(model: nn.Module, layers: Sequence[Layer], selection: Selection) -> Selected:
    """What of each layer's parameters the selection scores."""
    heads = attention_heads(model, layers) if selection.selects_heads else {}
    return {(layer.name, key): selection.parts(layer, key, heads) for layer in layers for key in layer.params}


@dataclass(frozen=True)
class _Amount:
    """Parameters, and the squared norm of the validation gradient on them."""

    parameters: int = 0
    square: float = 0.0

    def __add__(self, other: "_Amount") -> "_Amount":
        return _Amount(self.parameters + other.parameters, self.square + other.square)

    def __sub__(self, other: "_Amount") -> "_Amount":
        return _Amount(self.parameters - other.parameters, self.square - other.square)


def _added(amounts: Iterable[_Amount]) -> _Amount:
    return sum(amounts, _Amount())


class _Coverage:
    """How much of each parameter is scored.

    Args:
        grads: Validation gradients by the parameter's `id`; where there is none, it counts as zero.
    """

    def __init__(self, model: nn.Module, config: GhostConfig, grads: Mapping[int, Tensor | None]) -> None:
        self._model, self._grads = model, grads
        self._layers = find_layers(model)
        self._selected = selected_parts(model, self._layers, config.selection)
        self._whole = {id(p): self._amount(p, None) for p in model.parameters() if p.requires_grad}
        self._scored = dict.fromkeys(self._whole, _Amount())
        for layer in self._layers:
            for key, p in layer.params.items():
                here = self._amount(p, self._selected[layer.name, key])
                self._scored[id(p)] = max(here, self._scored[id(p)], key=lambda a: a.parameters)
        self.total = _added(self._whole.values())

    def report(self) -> dict[str, Any]:
        """What `coverage` returns."""
        scored = _added(self._scored.values())
        return {
            "parameters": self.total.parameters,
            "scored_parameters": scored.parameters,
            "scored_parameter_share": scored.parameters / self.total.parameters,
            "scored_val_grad_share": self._val_grad_share(scored),
            "layers": [self._row(layer, own) for layer, own in self._own_parameters()],
            "families": self._families(),
            "gaps": [
                {
                    "name": name,
                    "layers": layers,
                    "parameter_share": missing.parameters / self.total.parameters,
                    "val_grad_share": self._val_grad_share(missing),
                }
                for name, layers, missing in self.gaps()
            ],
            "unscored_parameters": uncovered_parameters(self._model, self._layers),
        }

    def gaps(self) -> list[tuple[str, int, _Amount]]:
        """Name, number of layers and amount of what is not scored, largest first.

        A layer that is left out while another one scores its shared parameter is a gap of no parameters: what
        the layer itself adds to a sample's gradient is missing from its score.
        """
        missing = [
            (layer.name, _added(self._whole[id(p)] - self._scored[id(p)] for p in own))
            for layer, own in self._own_parameters()
            if any(self._selected[layer.name, key] is not None for key in layer.params)
        ]
        named = dict(self._model.named_parameters())
        missing += [
            (name, self._whole[id(named[name])]) for name in uncovered_parameters(self._model, self._layers)
        ]
        groups: dict[str, list[tuple[str, _Amount]]] = defaultdict(list)
        for name, amount in missing:
            groups[_without_numbers(name)].append((name, amount))
        found = [
            (group if len(members) > 1 else members[0][0], len(members), _added(a for _, a in members))
            for group, members in groups.items()
        ]
        return sorted(found, key=lambda gap: -gap[2].parameters)

    def _amount(self, p: nn.Parameter, parts: Sequence[Part] | None) -> _Amount:
        """Of the whole parameter, or of some parts of it."""
        found = self._grads.get(id(p))
        grad = None if found is None else gathered(found)
        if parts is None:
            return _Amount(p.numel(), _square(grad))
        return _added(
            _Amount(
                cut(p.to("meta"), part.axis, part.index).numel(),
                0.0 if grad is None else _square(cut(grad, part.axis, part.index)),
            )
            for part in parts
        )

    def _own_parameters(self) -> Iterator[tuple[Layer, list[nn.Parameter]]]:
        """Each layer with its parameters, shared ones for the first layer that has them."""
        seen = set[int]()
        for layer in self._layers:
            yield layer, [p for p in layer.params.values() if id(p) not in seen]
            seen |= {id(p) for p in layer.params.values()}

    def _row(self, layer: Layer, own: list[nn.Parameter]) -> dict[str, Any]:
        amount = _added(self._whole[id(p)] for p in own)
        return {
            "name": layer.name,
            "type": plain_type(layer.module).__name__,
            "family": family(layer),
            "parameters": amount.parameters,
            "shared_parameters": sum(p.numel() for p in layer.params.values()) - amount.parameters,
            "val_grad_share": self._val_grad_share(amount),
            "scored": any(self._selected[layer.name, key] != [] for key in layer.params),
        }

    def _families(self) -> dict[str, dict[str, float]]:
        whole: dict[str, _Amount] = defaultdict(_Amount)
        scored: dict[str, _Amount] = defaultdict(_Amount)
        for layer, own in self._own_parameters():
            whole[family(layer)] += _added(self._whole[id(p)] for p in own)
            scored[family(layer)] += _added(self._scored[id(p)] for p in own)
        return {
            name: {
                "parameter_share": whole[name].parameters / self.total.parameters,
                "scored_parameter_share": scored[name].parameters / self.total.parameters,
                "val_grad_share": self._val_grad_share(whole[name]),
                "scored_val_grad_share": self._val_grad_share(scored[name]),
            }
            for name in whole
        }

    def _val_grad_share(self, amount: _Amount) -> float:
        return amount.square / (self.total.square or 1.0)


def _square(grad: Tensor | None) -> float:
    return 0.0 if grad is None else float(grad.double().square().sum())


def _without_numbers(name: str) -> str:
    """The name with `*` for block numbers: `transformer.h.*.mlp.c_fc`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
