"""Which layers and attention heads are scored: by name, by family, and by block of the model."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ghost.errors import GhostConfigError
from ghost.heads import Heads, Part
from ghost.layers import Layer
from ghost.patterns import HeadPattern, LayerPattern, parse, spanned

FAMILIES = ("attn", "mlp", "embed", "norm", "head", "conv", "other")

_ATTN = re.compile(r"attn|attention")
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense(relu|gatedact)dense|projector|\b(intermediate|fc\d)\b|\boutput\.dense\b"
)
_HEAD = re.compile(r"classifier|(\b|_)heads?\b|\b(score|pooler|predictions|embed_out|qa_outputs)\b")
_EMBED = re.compile(r"\b(embeddings?|patch_embed(dings?)?|project_(in|out))\b")


def family(layer: Layer) -> str:
    """The family of a layer, one of `FAMILIES`.

    Norms are known by type wherever they are. A name that speaks of attention comes next, then embedding
    tables by type, then names of MLPs (LLaVA's projector among them), heads (with BERT's pooler and
    transform, which lead to the head) and what stands between the data and the first block; convolutions by
    type where no name says more.
    """
    name = layer.name.lower()
    if "Norm" in type(layer.module).__name__:
        return "norm"
    if _ATTN.search(name):
        return "attn"
    if isinstance(layer.module, nn.Embedding):
        return "embed"
    for known, names in (("mlp", _MLP), ("head", _HEAD), ("embed", _EMBED)):
        if names.search(name):
            return known
    return "conv" if isinstance(layer.module, nn.modules.conv._ConvNd) else "other"


def block_number(name: str) -> int | None:
    """A layer's block: the first part of its name that is a number (`transformer.h.3.mlp` is in 3)."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


@dataclass(frozen=True)
class Selection:
    """What matches a pattern of `include`, none of `exclude`, and is in one of the `families` and `blocks`.

    `ghost.patterns` says what a pattern is. A layer that an ordinary pattern includes is scored whole; one
    that only patterns of heads include, in those heads' parts. Excluding a layer takes all of it, excluding
    heads takes their parts. Families and blocks bound everything, heads too.

    Attributes:
        include, exclude: Patterns on names of layers, such as `h.*.mlp.*` or `re:.*mlp.*`, or on heads, such
            as `h.3.attn.head[0,5]`.
        families: Any of `FAMILIES`; empty for all.
        blocks: Numbers and ranges (`7`, `"0-3"`, ends included, counted from 0 in each stack of the model);
            empty for all, and for layers outside of blocks too.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    families: Sequence[str] = ()
    blocks: Sequence[int | str] = ()

    def __post_init__(self) -> None:
        for key in ("include", "exclude", "families", "blocks"):
            value = getattr(self, key)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise GhostConfigError(f"layer selection: {key}={value!r} should be a list, not one value.")
            allowed = int | str if key == "blocks" else str
            if not all(isinstance(entry, allowed) for entry in value):
                raise GhostConfigError(f"layer selection: {key}={value!r} should hold strings alone.")
            object.__setattr__(self, key, tuple(value))
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise GhostConfigError(
                f"layer selection: families={sorted(unknown)} should be among {', '.join(FAMILIES)}."
            )
        for block in self.blocks:
            if spanned(str(block)) is None:
                raise GhostConfigError(
                    f"layer selection: blocks has {block!r}, which should be a number such as 7 or a range "
                    "such as '0-3', counted from 0."
                )
        for pattern in (*self.include, *self.exclude):
            parse(pattern)

    @property
    def selects_heads(self) -> bool:
        """Whether a pattern names attention heads."""
        return bool(_head_patterns(self.include) or _head_patterns(self.exclude))

    def matches(self, layer: Layer, heads: Heads | None = None) -> bool:
        """Whether any part of the layer is scored.

        Args:
            heads: `ghost.heads.attention_heads` of the model; needed where `selects_heads`.
        """
        known = self._known(heads)
        return any(self.parts(layer, param, known) != [] for param in layer.params)

    def parts(self, layer: Layer, param: str, heads: Heads) -> list[Part] | None:
        """What is scored of a layer's parameter: None for all of it, else these parts, possibly none."""
        if not self._bounds(layer) or _names_layer(self.exclude, layer):
            return []
        own = heads.get((layer.name, param), ())
        whole = _names_layer(self.include, layer)
        kept = [
            part
            for part in own
            if (whole or _names_part(self.include, part)) and not _names_part(self.exclude, part)
        ]
        return None if len(kept) == len(own) and (whole or own) else kept

    def check(self, layers: Sequence[Layer], heads: Heads | None = None) -> None:
        """Raise `GhostConfigError` where a pattern, head or block is not there or nothing is left to score.

        Args:
            heads: As for `matches`.
        """
        known = self._known(heads)
        for key in ("include", "exclude"):
            for text in getattr(self, key):
                pattern = parse(text)
                if isinstance(pattern, HeadPattern):
                    problem = _heads_problem(text, pattern, [part for own in known.values() for part in own])
                else:
                    problem = _layer_problem(text, pattern, [layer.name for layer in layers])
                if problem:
                    raise GhostConfigError(f"layer selection: {key} has the pattern {text!r}, {problem}.")
        self._check_blocks(layers)
        if not any(self.matches(layer, known) for layer in layers):
            raise GhostConfigError(
                "the layer selection leaves nothing to score: widen include, families or blocks."
            )

    def _known(self, heads: Heads | None) -> Heads:
        if heads is None and self.selects_heads:
            named = (*_head_patterns(self.include), *_head_patterns(self.exclude))
            raise GhostConfigError(
                f"layer selection: the pattern {named[0]!r} names attention heads, so the model's should be "
                "given: ghost.heads.attention_heads(model, layers)."
            )
        return heads or {}

    def _bounds(self, layer: Layer) -> bool:
        """Whether the layer is in one of the families and of the blocks."""
        if self.families and family(layer) not in self.families:
            return False
        number = block_number(layer.name)
        return not self.blocks or (number is not None and any(number in span for span in self._spans()))

    def _spans(self) -> list[range]:
        return [span for block in self.blocks if (span := spanned(str(block))) is not None]

    def _check_blocks(self, layers: Sequence[Layer]) -> None:
        there = {number for layer in layers if (number := block_number(layer.name)) is not None}
        for block, span in zip(self.blocks, self._spans(), strict=True):
            if any(number not in there for number in span):
                found = f"numbered {_ranges(there)}" if there else "not numbered"
                raise GhostConfigError(
                    f"layer selection: blocks has {block!r}, but the model's blocks are {found}."
                )


def _names_layer(patterns: Sequence[str], layer: Layer) -> bool:
    return any(isinstance(p, LayerPattern) and p.matches(layer.name) for p in map(parse, patterns))


def _names_part(patterns: Sequence[str], part: Part) -> bool:
    return any(isinstance(p, HeadPattern) and p.matches(part) for p in map(parse, patterns))


def _head_patterns(patterns: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if isinstance(parse(pattern), HeadPattern)]


def _layer_problem(text: str, pattern: LayerPattern, names: list[str]) -> str | None:
    """What is wrong with a pattern of layers, if anything."""
    if any(map(pattern.matches, names)):
        return None
    return f"which matches no layer: the closest of {len(names)} are {_closest(text, names)}"


def _heads_problem(text: str, pattern: HeadPattern, parts: list[Part]) -> str | None:
    """What is wrong with a pattern of heads, if anything."""
    if not parts:
        return (
            "but the model has no trained attention block whose heads are known: describe yours with "
            "ghost.register_attention"
        )
    matched = [part for part in parts if pattern.matches_block(part.block)]
    if not matched:
        blocks = list(dict.fromkeys(part.block for part in parts))
        return f"which matches no attention block: the closest of {len(blocks)} are {_closest(text, blocks)}"
    if not pattern.missing(matched):
        return None
    numbers: dict[str, set[int]] = {}
    for part in matched:
        numbers.setdefault(part.head.kind, set()).add(part.head.number)
    there = " and ".join(f"{kind}[{_ranges(those)}]" for kind, those in numbers.items())
    return f"but {matched[0].block!r} has {there}"


def _closest(text: str, names: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(text, names, n=5, cutoff=0))


def _ranges(numbers: Iterable[int]) -> str:
    """`{0, 1, 2, 5}` as `0-2,5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
