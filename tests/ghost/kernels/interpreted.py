"""The Triton programs against gradients held in full, in Triton's interpreter on a CPU.

`test_interpreted` runs this file in a process of its own with `TRITON_INTERPRET=1`, which Triton reads when
it is imported: `TRITON_INTERPRET=1 python -m pytest tests/ghost/kernels/interpreted.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ghost import algebra
from ghost.kernels import fused, tiles
from ghost.kernels.tiles import Cut, Tiles
from tests.ghost.harness import assert_near
from tests.ghost.test_algebra import factors, per_sample, scores

SMALL = Tiles(32, 16, 16, 4, 1)
CUTS = [Cut(SMALL, 1), Cut(SMALL, 3)]
SHAPES = [  # b, T, v, S, m, n
    (3, 20, 2, 20, 40, 33),  # no size a multiple of a tile's
    (2, 32, 1, 32, 64, 16),  # every size a multiple
    (4, 1, 3, 1, 9, 7),
    (1, 1, 1, 1, 1, 1),
    (1, 10, 1, 4, 270, 17),  # more tiles than go in one group of rows
]
FLOAT32 = 1e-5
SHORTS = [torch.bfloat16, torch.float16]


def float32_of(handle: Any) -> Any:
    """A bfloat16 block as float32; the interpreter keeps its bits as integers."""
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16 blocks as the integers that it keeps them as."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        sides = (float32_of(side) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b))
        return plain(self, *sides, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=CUTS, ids=lambda cut: f"splits{cut.splits}")
def cut(request: pytest.FixtureRequest) -> Iterator[Cut]:
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [1, 3])
def test_sum_and_dots(shape: tuple[int, ...], number: int) -> None:
    left, right, *_ = factors(shape, torch.float32)
    targets = torch.randn(number, left.shape[2], right.shape[2])
    total, dots = fused.sum_and_dots(left, right, targets, CUTS[0])
    grads = per_sample(left, right)
    assert_near(total, grads.sum(0), FLOAT32)
    assert_near(dots, torch.einsum("bmn,cmn->bc", grads, targets.double()), FLOAT32)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_scores(shape: tuple[int, ...], cut: Cut) -> None:
    sides = factors(shape, torch.float32)
    for sizes in ([shape[2]], [1] * shape[2]):
        total, dots = fused.sum_and_scores(*sides, sizes, cut)
        assert_near(total, per_sample(*sides[:2]).sum(0), FLOAT32)
        assert_near(dots, scores(*sides, sizes), FLOAT32)


@pytest.mark.parametrize("dtype", SHORTS)
def test_short_floats_are_summed_in_float32(dtype: torch.dtype, cut: Cut) -> None:
    sides = factors(SHAPES[0], dtype)
    total, dots = fused.sum_and_scores(*sides, [2], cut)
    expected = per_sample(*sides[:2]).sum(0)
    assert total.dtype == dtype
    assert dots.dtype == torch.float32
    assert_near(dots, scores(*sides, [2]), FLOAT32)
    # Rounded once, at the end; to zero by the interpreter, to the nearest by a GPU.
    assert ((total.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("dtype", SHORTS)
def test_targets_of_short_floats(dtype: torch.dtype) -> None:
    left, right, *_ = factors(SHAPES[0], dtype)
    targets = torch.randn(2, left.shape[2], right.shape[2]).to(dtype)
    dots = fused.sum_and_dots(left, right, targets, CUTS[0])[1]
    assert_near(dots, torch.einsum("bmn,cmn->bc", per_sample(left, right), targets.double()), FLOAT32)


def test_the_pytorch_path_says_the_same() -> None:
    sides = factors(SHAPES[0], torch.float32)
    for mine, theirs in zip(
        fused.sum_and_scores(*sides, [1, 1], CUTS[1]),
        algebra.fused_sum_and_scores(*sides, [1, 1]),
        strict=True,
    ):
        assert_near(mine, theirs, FLOAT32)


def views(whole: Tensor) -> dict[str, Tensor]:
    """Ways in which layers pass `[3, 20, 32]` factors, each with the same numbers."""
    joint = torch.cat([whole, torch.randn(2, 20, 32)])
    wider = torch.cat([torch.randn(3, 20, 5), whole, torch.randn(3, 20, 3)], 2)
    aligned = torch.cat([torch.randn(3, 20, 16), whole], 2)
    return {
        "training rows of a joint batch": joint[:3],
        "a head's columns": aligned[:, :, 16:],
        "columns that begin anywhere": wider[:, :, 5:37],
        "channels first": whole.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": whole.transpose(0, 1).contiguous().transpose(0, 1),
    }


def test_strided_factors() -> None:
    left, right = torch.randn(3, 20, 32), torch.randn(3, 20, 32)
    targets = torch.randn(1, 32, 32).transpose(1, 2)  # not contiguous either
    expected = fused.sum_and_dots(left, right, targets.contiguous(), CUTS[0])
    for name, mine, theirs in zip(views(left), views(left).values(), views(right).values(), strict=True):
        for pair in ((mine, right), (left, theirs)):
            for got, want in zip(fused.sum_and_dots(*pair, targets, CUTS[0]), expected, strict=True):
                assert torch.equal(got, want), name


def test_samples_more_than_31_bits_apart(tmp_path: Path) -> None:
    apart, small = 1 << 30, torch.randn(3, 4, 16).half()
    file = torch.from_file(  # sparse: three pages of it are ever written
        str(tmp_path / "factor"), shared=True, size=2 * apart + small[0].numel(), dtype=torch.float16
    )
    far = file.as_strided((3, 4, 16), (apart, 16, 1))
    far.copy_(small)
    targets = torch.randn(1, 16, 16)
    expected = fused.sum_and_dots(small, small, targets, CUTS[0])
    for got, want in zip(fused.sum_and_dots(far, far, targets, CUTS[0]), expected, strict=True):
        assert torch.equal(got, want)


def test_one_row_for_all_samples() -> None:
    left, right = torch.randn(3, 20, 32), torch.randn(1, 20, 32).expand(3, 20, 32)
    targets = torch.randn(1, 32, 32)
    for got, want in zip(
        fused.sum_and_dots(left, right, targets, CUTS[0]),
        fused.sum_and_dots(left, right.contiguous(), targets, CUTS[0]),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_only_odd_rows_are_copied() -> None:
    """Rows that begin on multiples of 16 numbers are read where they are, whatever lies between them."""
    between = torch.full((5, 20, 48), torch.nan)
    between[:, :, :33] = torch.randn(5, 20, 33)
    for whole in (torch.randn(3, 20, 32), torch.randn(5, 20, 48)[:3, :, 16:], between[:3, :, :33]):
        assert fused.aligned(whole) is whole
        assert fused.copied_bytes(whole) == 0
    odd = between[:3, :, :33].contiguous()
    assert fused.copied_bytes(odd) == 3 * 20 * 4
    assert torch.equal(fused.aligned(odd), odd)
    cut_short = torch.empty(3 * 20 * 48 - 15).as_strided((3, 20, 33), (960, 48, 1))
    assert fused.copied_bytes(cut_short)  # nothing is read behind the end of a tensor's memory
    targets = torch.randn(1, 33, 33)
    for got, want in zip(
        fused.sum_and_dots(between[:3, :, :33], odd, targets, CUTS[0]),
        fused.sum_and_dots(odd, between[:3, :, :33], targets, CUTS[0]),
        strict=True,
    ):
        assert got.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "shape", [(0, 5, 1, 2, 3, 4), (3, 0, 1, 2, 3, 4), (3, 5, 1, 0, 3, 4), (3, 5, 1, 2, 0, 4)]
)
def test_nothing_to_add_up(shape: tuple[int, ...]) -> None:
    sides = factors(shape, torch.float32)
    total, dots = fused.sum_and_scores(*sides, [1], CUTS[0])
    assert_near(total, per_sample(*sides[:2]).sum(0), FLOAT32)
    assert_near(dots, scores(*sides, [1]), FLOAT32)


def test_every_run_has_the_same_bits() -> None:
    sides = factors(SHAPES[0], torch.float32)
    first, second = (fused.sum_and_scores(*sides, [2], CUTS[1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_vocabulary_of_gpt2() -> None:
    """50,257 columns, which begin where no load of 16 bytes may, in several chunks."""
    sides = factors((1, 37, 1, 9, 50257, 16), torch.bfloat16)
    total, dots = fused.sum_and_scores(*sides, [1], Cut(Tiles(4096, 16, 32, 4, 1), 1), 4 << 20)
    expected = per_sample(*sides[:2]).sum(0)
    assert_near(total, expected, torch.finfo(torch.bfloat16).eps)
    assert_near(dots, scores(*sides, [1]), FLOAT32)


def test_the_cut_is_chosen_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying leaves nothing behind."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=8)
    )
    keys = []

    def choose(key: Any, tried: Any, run: Any) -> Tiles:
        keys.append(key)
        run(SMALL)
        run(Tiles(16, 16, 16, 4, 1))
        return SMALL

    monkeypatch.setattr(fused, "choose", choose)
    sides = factors((3, 20, 2, 20, 40, 33), torch.float32)
    total, dots = fused.sum_and_scores(*sides, [2])
    assert_near(total, per_sample(*sides[:2]).sum(0), FLOAT32)
    assert_near(dots, scores(*sides, [2]), FLOAT32)
    assert len(keys) == len(set(keys)) == 2  # the validation gradient's, and the scores'


def test_tiles_of_a_gpu(cut: Cut) -> None:
    sides = factors((2, 70, 1, 65, 130, 20), torch.float32)
    dots = fused.sum_and_scores(*sides, [1], Cut(tiles.SHORT[0], cut.splits))[1]
    assert_near(dots, scores(*sides, [1]), FLOAT32)
