"""Validation and test windows of a repetition, drawn by its seed from those that no seed trains on."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from runners.data.apart import document_of
from runners.data.base import DataBundle
from runners.errors import DataError
from runners.fidelity.language import tokens_of

Item = TypeVar("Item")

DULL = 0.5
"""A window of which more than this share is one token, most often a blank, says nothing of its domain."""


@dataclass(frozen=True)
class HeldOut:
    """Windows by domain, token ids `[T]` each.

    Attributes:
        val: What values are about.
        test: What no value knows of.
    """

    val: dict[str, list[Tensor]]
    test: dict[str, list[Tensor]]

    @property
    def all_val(self) -> list[Tensor]:
        """Of every domain."""
        return [window for windows in self.val.values() for window in windows]

    @property
    def all_test(self) -> list[Tensor]:
        """Of every domain."""
        return [window for windows in self.test.values() for window in windows]


def hold_out(data: DataBundle, val: int, test: int, seed: int) -> HeldOut:
    """Draw `val` validation windows, each of another document, and `test` test windows of further documents;
    domains have equal shares.

    A window is left where it is if it is dull, if the same one is trained on, or was drawn before.

    Raises:
        DataError: A domain has too few.
    """
    generator = torch.Generator().manual_seed(seed)
    by_domain = _documents(data)
    fresh = _Fresh(tokens_of(data.train))
    found = HeldOut({}, {})
    for number, (domain, documents) in enumerate(sorted(by_domain.items())):
        wanted = [total // len(by_domain) + (number < total % len(by_domain)) for total in (val, test)]
        ordered = (_shuffled(document, generator) for document in _shuffled(documents, generator))
        chosen: list[Tensor] = []
        while len(chosen) < wanted[0] and (document := next(ordered, None)) is not None:
            chosen += fresh.take(document, 1)
        others = _shuffled([window for document in ordered for window in document], generator)
        drawn = [chosen, fresh.take(others, wanted[1])]
        found.val[domain], found.test[domain] = drawn
        if [len(part) for part in drawn] != wanted:
            raise DataError(
                f"{domain}: {wanted[0]} validation windows, each of another document, and {wanted[1]} test "
                f"windows are wanted, and {len(drawn[0])} and {len(drawn[1])} there: raise "
                "fidelity.data.val_samples, or lower fidelity.val_samples or fidelity.test_samples"
            )
    return found


def _documents(data: DataBundle) -> dict[str, list[list[Tensor]]]:
    """The held-out windows of each document, by domain."""
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    names = zip(data.val.sample_ids, data.val.domains, tokens_of(data.val), strict=True)
    for name, domain, window in names:
        found[domain][document_of(name)].append(window)
    return {domain: list(documents.values()) for domain, documents in found.items()}


class _Fresh:
    """Windows that nobody has seen."""

    def __init__(self, seen: Iterable[Tensor]) -> None:
        self._seen = {_key(window) for window in seen}

    def take(self, windows: Iterable[Tensor], most: int) -> list[Tensor]:
        """The first of these that are neither seen nor dull, up to `most`; they are seen from now on."""
        found: list[Tensor] = []
        for window in windows:
            if len(found) == most:
                break
            if _key(window) not in self._seen and not _is_dull(window):
                found.append(window)
                self._seen.add(_key(window))
        return found


def _key(window: Tensor) -> tuple[int, ...]:
    return tuple(window.tolist())


def _is_dull(window: Tensor) -> bool:
    return int(window.unique(return_counts=True)[1].max()) > DULL * len(window)


def _shuffled(items: Sequence[Item], generator: torch.Generator) -> list[Item]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
