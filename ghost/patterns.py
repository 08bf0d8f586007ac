"""Patterns that name layers and attention heads.

* A glob matches a layer's whole name or the end of it after a dot: `h.3.*` is `*.h.3.*` as well as `h.3.*`,
  and `lm_head` needs no `*`.
* `re:` and a regular expression match a layer's whole name: `re:.*\\.h\\.[0-3]\\.mlp\\..*`.
* A glob with heads at its end, as in `h.3.attn.head[0,5]`, matches those heads of the attention blocks that
  the glob before it matches, by the same rule: `head[0]`, `head[0-3,7]`, `head[*]`, and `kv_head[…]` for
  keys and values shared by several heads. Without anything before it, those of every block.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ghost.errors import GhostConfigError
from ghost.heads import Part

_HEADS = re.compile(r"(?:(?P<block>.+)\.)?(?P<kind>head|kv_head)\[(?P<numbers>[^\]]*)\]")
_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class LayerPattern:
    """Matches layers by name."""

    regex: re.Pattern[str]

    def matches(self, name: str) -> bool:
        """Whether the layer's name matches."""
        return self.regex.fullmatch(name) is not None


@dataclass(frozen=True)
class HeadPattern:
    """Matches heads by their block's name, their kind and their number (None: every number)."""

    block: re.Pattern[str]
    kind: str
    numbers: tuple[range, ...] | None

    def matches_block(self, name: str) -> bool:
        """Whether the block's name matches."""
        return self.block.fullmatch(name) is not None

    def matches(self, part: Part) -> bool:
        """Whether the part belongs to one of the heads."""
        return (
            part.head.kind == self.kind
            and (self.numbers is None or any(part.head.number in span for span in self.numbers))
            and self.matches_block(part.block)
        )

    def missing(self, parts: Iterable[Part]) -> bool:
        """Whether one of the numbers, or every number where all are meant, is no head among the parts."""
        there = {part.head.number for part in parts if part.head.kind == self.kind}
        if self.numbers is None:
            return not there
        return any(number not in there for span in self.numbers for number in span)


@lru_cache
def parse(pattern: str) -> LayerPattern | HeadPattern:
    """The pattern that a string stands for.

    Raises:
        GhostConfigError: The regular expression or the head numbers cannot be read.
    """
    if pattern.startswith("re:"):
        try:
            return LayerPattern(re.compile(pattern.removeprefix("re:")))
        except re.error as error:
            raise GhostConfigError(
                f"layer selection: {pattern!r} is not a regular expression: {error}."
            ) from error
    heads = _HEADS.fullmatch(pattern)
    if heads is None:
        return LayerPattern(_glob(pattern))
    spans = None if heads["numbers"].strip() == "*" else [spanned(n) for n in heads["numbers"].split(",")]
    if spans is not None and None in spans:
        raise GhostConfigError(
            f"layer selection: heads in {pattern!r} should be numbers and ranges such as 0,5 or 0-3, or *."
        )
    return HeadPattern(
        _glob(heads["block"] or "*"), heads["kind"],
        None if spans is None else tuple(span for span in spans if span is not None),
    )  # fmt: skip


def spanned(text: str) -> range | None:
    """`"7"` or `"0-3"` as the numbers meant, ends included; None for anything else."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return None
    span = range(int(found[1]), int(found[2] or found[1]) + 1)
    return span if len(span) else None


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?s:.*\.)?{fnmatch.translate(pattern)}")
