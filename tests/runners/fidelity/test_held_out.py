"""Held-out windows: drawn by the seed, of documents of their own, and none that is seen elsewhere."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from runners.choices import TaskName
from runners.data.base import DataBundle, token_rows
from runners.errors import DataError
from runners.fidelity.held_out import hold_out

TOKENS = 8


class Windows:
    """Token windows with names and domains, as a sample set has them."""

    layout = token_rows(TOKENS)

    def __init__(self, named: Sequence[tuple[str, str, Tensor]]) -> None:
        self.sample_ids = [name for name, _, _ in named]
        self.domains = [domain for _, domain, _ in named]
        self._tokens = [tokens for _, _, tokens in named]

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor, int]:
        return {"input_ids": self._tokens[i]}, self._tokens[i], i


def window(number: int) -> Tensor:
    return torch.arange(TOKENS) + TOKENS * number


def bundle(documents: int = 6, windows: int = 3, train: Sequence[Tensor] = ()) -> DataBundle:
    """Two domains with so many documents of so many windows each, no two of them equal."""
    held = [
        (f"{domain}{d}#{w}", domain, window((k * documents + d) * windows + w))
        for k, domain in enumerate(("code", "docs"))
        for d in range(documents)
        for w in range(windows)
    ]
    return DataBundle(
        Windows([(f"t#{i}", "code", tokens) for i, tokens in enumerate(train)]),  # type: ignore[arg-type]
        Windows(held),  # type: ignore[arg-type]
        TaskName.language, 1000, None, None, "", "",
    )  # fmt: skip


def names(data: DataBundle, windows: Sequence[Tensor]) -> list[str]:
    known = {tuple(data.val[i][1].tolist()): name for i, name in enumerate(data.val.sample_ids)}
    return [known[tuple(tokens.tolist())] for tokens in windows]


def documents_of(found: Sequence[str]) -> list[str]:
    return [name.partition("#")[0] for name in found]


def test_validation_windows_are_of_documents_of_their_own() -> None:
    data = bundle()
    held = hold_out(data, val=5, test=7, seed=3)
    assert {domain: len(windows) for domain, windows in held.val.items()} == {"code": 3, "docs": 2}
    assert {domain: len(windows) for domain, windows in held.test.items()} == {"code": 4, "docs": 3}
    val, test = documents_of(names(data, held.all_val)), names(data, held.all_test)
    assert len(set(val)) == 5
    assert not set(val) & set(documents_of(test))
    assert len(set(test)) == 7


def test_the_seed_draws() -> None:
    data = bundle()
    first, again, other = (names(data, hold_out(data, 4, 4, seed).all_val) for seed in (0, 0, 1))
    assert first == again != other


def test_what_is_trained_on_or_dull_is_not_drawn() -> None:
    data = bundle(documents=2, windows=2, train=[window(0)])
    assert names(data, hold_out(data, 4, 0, seed=0).val["code"])[0] != "code0#0"
    data.val._tokens[1] = torch.tensor([7] * 5 + [1, 2, 3])  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"code: 2 validation windows, .* are wanted, and 1 and 0 there"):
        hold_out(data, 4, 0, seed=0)


def test_the_same_window_is_drawn_once() -> None:
    data = bundle(documents=2, windows=1)
    data.val._tokens[1] = data.val._tokens[0]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"raise fidelity\.data\.val_samples"):
        hold_out(data, 4, 0, seed=0)
