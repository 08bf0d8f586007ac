"""Which layers are scored: by name pattern and by family."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ghost.errors import GhostConfigError
from ghost.layers import Layer

FAMILIES = ("attn", "mlp", "embed", "norm", "head", "other")

_NAME_PARTS = {
    "attn": ("attn", "attention", "self_attn"),
    "mlp": ("mlp", "ffn", "feed_forward"),
    "head": ("lm_head", "head", "classifier", "score"),
}


def family(layer: Layer) -> str:
    """The family of a layer: norms and embeddings by type, the others by the parts of their name."""
    if "Norm" in type(layer.module).__name__:
        return "norm"
    if isinstance(layer.module, nn.Embedding):
        return "embed"
    parts = layer.name.lower().split(".")
    return next((f for f, names in _NAME_PARTS.items() if set(parts) & set(names)), "other")


@dataclass(frozen=True)
class Selection:
    """Layers whose name matches a pattern of `include`, none of `exclude`, and whose family is in `families`.

    Attributes:
        include, exclude: Glob patterns on qualified module names, such as `transformer.h.*.mlp.*`.
        families: Any of `FAMILIES`; empty for all.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    families: Sequence[str] = ()

    def __post_init__(self) -> None:
        for key in ("include", "exclude", "families"):
            if isinstance(getattr(self, key), str):
                raise GhostConfigError(
                    f"layer selection: {key}={getattr(self, key)!r} should be a list, not a string."
                )
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise GhostConfigError(
                f"layer selection: families={sorted(unknown)} should be among {', '.join(FAMILIES)}."
            )

    def matches(self, layer: Layer) -> bool:
        """Whether the layer is scored."""

        def matched(patterns: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns)

        in_family = not self.families or family(layer) in self.families
        return in_family and matched(self.include) and not matched(self.exclude)

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise `GhostConfigError` where a pattern matches no layer or nothing is left to score."""
        names = [layer.name for layer in layers]
        for key, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    raise GhostConfigError(
                        f"layer selection: {key} has the pattern {pattern!r}, which matches no layer: "
                        f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
                    )
        if not any(self.matches(layer) for layer in layers):
            raise GhostConfigError("the layer selection leaves nothing to score: widen include or families.")
