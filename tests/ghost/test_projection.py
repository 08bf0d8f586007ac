"""The random matrices: the same everywhere, and isometries in expectation."""

import pytest
import torch
from torch import Tensor

from ghost.projection import ProjectionKind, kept_sizes, matrix

KINDS = list(ProjectionKind)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.value for kind in KINDS])


def made(
    kind: ProjectionKind, k: int, size: int, seed: int = 0, name: str = "h.weight", side: str = "in"
) -> Tensor:
    found = matrix(kind, seed, name, side, k, size)
    assert found is not None
    return found


SIGNS = [
    [1, -1, -1, -1, 1, 1, -1, -1],
    [-1, 1, -1, 1, 1, -1, -1, 1],
    [1, 1, 1, 1, -1, -1, -1, -1],
    [1, -1, -1, -1, 1, 1, 1, 1],
]
NORMALS = [0.46152073, -1.16939843, -1.43272722, 0.23966189, 0.52242696, -0.17561340]


def test_the_bits_of_version_1() -> None:
    """Stores that were written with it must stay readable: these numbers never change."""
    signs = made(ProjectionKind.RADEMACHER, 4, 8) * 2
    assert signs.int().tolist() == SIGNS
    assert made(ProjectionKind.GAUSSIAN, 2, 3).flatten().tolist() == pytest.approx(NORMALS, rel=1e-6)


@each_kind
def test_a_matrix_is_a_function_of_seed_name_and_side(kind: ProjectionKind) -> None:
    first = made(kind, 5, 70)
    assert torch.equal(first, made(kind, 5, 70))
    for other in (made(kind, 5, 70, seed=1), made(kind, 5, 70, name="h"), made(kind, 5, 70, side="out")):
        assert (first * other).sum(1).abs().max() < 0.8 * (first * first).sum(1).min()
    assert first.dtype is torch.float32


@each_kind
def test_the_first_rows_do_not_depend_on_how_many_there_are(kind: ProjectionKind) -> None:
    few, many = made(kind, 3, 50) * 3**0.5, made(kind, 11, 50)[:3] * 11**0.5
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)


@each_kind
def test_inner_products_are_kept_in_expectation(kind: ProjectionKind) -> None:
    """`E[PᵀP] = I`: the mean over seeds comes as close as its spread allows."""
    seeds, k, size = 4000, 3, 6
    products = torch.stack([(p := made(kind, k, size, seed).double()).T @ p for seed in range(seeds)])
    error = products.mean(0) - torch.eye(size)
    spread = products.std(0) / seeds**0.5
    assert (error.abs() < 4.5 * spread + 1e-6).all()  # 36 entries: 4.5 is passed once in 4000 runs
    assert spread.max() < 0.02


def test_orthonormal_rows_are_orthogonal_and_of_one_length() -> None:
    p = made(ProjectionKind.ORTHONORMAL, 6, 40).double()
    torch.testing.assert_close(p @ p.T, torch.eye(6).double() * 40 / 6, rtol=0, atol=1e-5)


def test_gaussian_entries_are_normal() -> None:
    entries = made(ProjectionKind.GAUSSIAN, 64, 5000).double().flatten() * 8
    assert abs(float(entries.mean())) < 0.01
    assert abs(float(entries.var()) - 1) < 0.01
    assert abs(float((entries**4).mean()) - 3) < 0.05
    assert 4.2 < float(entries.abs().max()) < 6.5


def test_a_side_that_keeps_its_size_has_no_matrix() -> None:
    assert all(matrix(kind, 0, "w", "out", 7, 7) is None for kind in KINDS)


@pytest.mark.parametrize("total", [16, 64, 256, 1000, 4096])
def test_kept_sizes(total: int) -> None:
    for size_out, size_in in [
        (768, 768),
        (3072, 768),
        (768, 50257),
        (768, 3072),
        (5000, 3),
        (2, 9000),
        (64, 27),
    ]:
        k_out, k_in = kept_sizes(size_out, size_in, total, 4)
        assert min(4, size_out) <= k_out <= size_out
        assert min(4, size_in) <= k_in <= size_in
        if size_out * size_in > total:
            whole = k_out == size_out and k_in == size_in
            assert whole or 0.8 * total <= k_out * k_in <= 1.25 * total
        if k_out not in (4, size_out) and k_in not in (4, size_in):
            assert k_out == k_in or (k_out > k_in) == (size_out >= size_in)


def test_small_parameters_are_kept_whole() -> None:
    assert kept_sizes(10, 10, 256, 4) == (10, 10)
    assert kept_sizes(3, 2, 256, 4) == (3, 2)
    assert kept_sizes(100, 1, 256, 4) == (100, 1)
    assert kept_sizes(1, 1, 16, 4) == (1, 1)


def test_vectors_keep_the_whole_rank() -> None:
    assert kept_sizes(768, 1, 256, 4) == (256, 1)


def test_the_longer_side_is_kept_longer() -> None:
    assert kept_sizes(768, 768, 256, 4) == (16, 16)
    k_out, k_in = kept_sizes(3072, 768, 256, 4)
    assert k_out == pytest.approx(2 * k_in, abs=1)
    assert kept_sizes(768, 3072, 256, 4)[1] == pytest.approx(2 * k_in, abs=1)
