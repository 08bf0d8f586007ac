"""Which algebra is counted as the cheapest, at shapes where there is no doubt."""

import pytest
import torch

from ghost import costs, kernels
from ghost.costs import Problem


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that there is no program for."""
    monkeypatch.setattr(kernels, "serves", lambda *_: False)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that there is a program for, whatever this one is."""
    monkeypatch.setattr(kernels, "serves", lambda *_: True)


def cheapest(problem: Problem) -> str:
    """The algebra with the lowest count."""
    found = costs.costs(problem)
    return min(found, key=found.__getitem__)


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (Problem(16, 1, 768, 768, 2), "token_token"),
        (Problem(16, 32, 768, 768, 4096), "target"),
        (Problem(16, 1024, 768, 768, 1024), "fused"),
        (Problem(16, 1024, 768, 768, 0), "fused"),
        (Problem(16, 4, 768, 768, 0), "target"),
        # The whole matrix of pairs for the price of one column.
        (Problem(16, 1024, 768, 768, 16 * 1024, columns=16), "fused"),
        (Problem(16, 1, 768, 768, 16, columns=16), "token_token"),
    ],
)
@pytest.mark.usefixtures("no_kernel")
def test_the_cheapest_algebra(problem: Problem, name: str) -> None:
    assert cheapest(problem) == name


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (Problem(16, 1, 768, 768, 2), "token_token"),
        (Problem(8, 16, 768, 3072, 16), "token_token"),
        (Problem(8, 128, 768, 3072, 128), "fused"),
        (Problem(16, 16, 768, 768, 0), "fused"),
        (Problem(16, 2, 768, 768, 0), "target"),
        (Problem(8, 512, 768, 3072, 8 * 512, wants_sum=False), "target"),
        (Problem(4, 1, 10, 10, 1), "token_token"),  # a call of the kernel is the dearest
        (Problem(4, 128, 64, 9, 128), "fused"),
    ],
)
@pytest.mark.usefixtures("kernel")
def test_the_cheapest_algebra_with_a_kernel(problem: Problem, name: str) -> None:
    assert cheapest(problem) == name


@pytest.mark.usefixtures("no_kernel")
def test_the_choice_depends_on_every_size() -> None:
    """Length, validation rows, and whether the sum is wanted: a choice of an earlier batch would be wrong."""
    assert cheapest(Problem(8, 16, 768, 3072, 16)) == "token_token"
    assert cheapest(Problem(8, 512, 768, 3072, 512)) == "fused"
    assert cheapest(Problem(8, 128, 768, 3072, 128)) == "token_token"
    assert cheapest(Problem(8, 128, 768, 3072, 16 * 128)) == "fused"
    assert cheapest(Problem(8, 512, 768, 3072, 8 * 512, wants_sum=False)) == "target"


def test_what_cannot_be_taken_is_not_counted() -> None:
    assert set(costs.costs(Problem(2, 3, 4, 5, 6))) == {"token_token", "target", "fused"}
    assert set(costs.costs(Problem(2, 3, 4, 5, 0))) == {"target", "fused"}
    assert set(costs.costs(Problem(2, 3, 4, 5, 6, wants_sum=False))) == {"token_token", "target"}


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_a_device_with_a_kernel_takes_its_tiles_for_free(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel's compiler there the tiles stay where they are formed."""
    problem = Problem(16, 1024, 768, 3072, 1024, dtype=dtype, device=device)
    found = {}
    for there in (True, False):
        monkeypatch.setattr(kernels, "serves", lambda *_, there=there: there)
        found[there] = costs.costs(problem)
    assert found[True]["fused"] < found[False]["fused"]
    assert min(found[True], key=found[True].__getitem__) == "fused"
    assert found[True]["target"] == found[False]["target"]


def test_the_kernel_is_counted_for_as_many_columns_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more columns the tiles go through memory, as where there is no kernel."""
    most = kernels.MOST_COLUMNS
    found = {}
    for there in (True, False):
        serves = lambda device, dtype, columns, there=there: there and columns <= most  # noqa: E731
        monkeypatch.setattr(kernels, "serves", serves)
        for columns in (most, most + 1):
            problem = Problem(16, 1024, 768, 768, 0, columns, dtype=torch.bfloat16, device="cuda")
            found[there, columns] = costs.costs(problem)["fused"]
    assert found[True, most] < found[False, most]
    assert found[True, most + 1] == found[False, most + 1]


@pytest.mark.usefixtures("no_kernel")
def test_a_smaller_chunk_costs_more_calls() -> None:
    problem = Problem(16, 64, 768, 3072, 64)
    small, large = costs.costs(problem, 1 << 16), costs.costs(problem, 1 << 26)
    assert small["fused"] > large["fused"]
    assert small["token_token"] > large["token_token"]
