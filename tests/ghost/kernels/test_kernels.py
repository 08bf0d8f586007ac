"""The Triton programs in its interpreter, what a GPU would run of them, and which factors they are for."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ghost import algebra, kernels

HERE = Path(__file__).resolve().parent


def test_interpreted() -> None:
    """`interpreted.py`, where Triton's interpreter runs the programs."""
    argv = f"-m pytest -q -n0 -p no:cacheprovider {HERE / 'interpreted.py'}".split()
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The programs, compiled in a folder of their own."""
    from ghost.kernels import programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return programs


def assembled(programs: ModuleType, tmp_path: Path, tiles: Any, dtype: str, columns: int) -> tuple[str, str]:
    """`sum_and_dots` for an H100: its PTX, and the resources that the machine code takes.

    Args:
        dtype: Triton's name for the factors' dtype.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = programs.sum_and_dots.arg_names
    constants = {"COLUMNS": columns, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_T": tiles.t}
    pointers = {"left": dtype, "right": dtype, "targets": "fp32", "totals": dtype, "partials": "fp32"}
    signature = {
        name: f"*{pointers[name]}" if name in pointers else "constexpr" if name in constants else "i32"
        for name in names
    }
    plain = {"samples", "tokens", "m", *constants}  # the others are multiples of 16, or addresses of such
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in plain}
    source = ASTSource(
        programs.sum_and_dots, signature, {(names.index(k),): v for k, v in constants.items()}, attributes
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    (tmp_path / "program.cubin").write_bytes(compiled["cubin"])
    argv = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(tmp_path / "program.cubin")]
    return compiled["ptx"], subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("columns", [0, 1])
def test_what_an_h100_would_run(programs: ModuleType, tmp_path: Path, columns: int) -> None:
    """Asynchronous tensor-core products of tiles that are loaded ahead, 16 bytes at a time; few spills."""
    from ghost.kernels.tiles import SHORT

    for tiles in SHORT:
        ptx, resources = assembled(programs, tmp_path, tiles, "bf16", columns)
        assert "wgmma.mma_async" in ptx, tiles
        assert "wgmma.wait_group.sync.aligned 1;" in ptx, tiles  # one product may still run in the next step
        copies = re.findall(r"cp\.async\.c\w\.shared\.global \[.*?\], \[.*?\], (0x\w+)", ptx)
        assert copies, tiles
        assert set(copies) == {"0x10"}, tiles
        (stack,) = re.findall(r"STACK:(\d+)", resources)
        assert int(stack) <= 64, tiles  # bytes, where registers would be spilled to


def test_tf32_products_are_the_tensor_cores(programs: ModuleType, tmp_path: Path) -> None:
    from ghost.kernels.tiles import LONG

    ptx, _ = assembled(programs, tmp_path, LONG[0], "fp32", 1)
    assert re.search(r"mma\S*tf32", ptx)


@pytest.fixture
def float32_precision() -> Iterator[None]:
    """Puts back how exactly float32 is multiplied."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("float32_precision")
def test_which_factors_the_programs_are_for() -> None:
    assert not kernels.serves("cpu", torch.bfloat16, 1)
    assert kernels.serves("cuda", torch.bfloat16, 1)
    assert kernels.serves("cuda", torch.float16, kernels.MOST_COLUMNS)
    assert not kernels.serves("cuda", torch.bfloat16, kernels.MOST_COLUMNS + 1)
    assert not kernels.serves("cuda", torch.float64, 1)
    torch.set_float32_matmul_precision("highest")
    assert not kernels.serves("cuda", torch.float32, 1)
    torch.set_float32_matmul_precision("high")
    assert kernels.serves("cuda", torch.float32, 1)


def test_without_triton_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels.installed.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.serves("cuda", torch.bfloat16, 1)
        assert not kernels.serves("cuda", torch.bfloat16, 1)
    assert len(caplog.records) == 1
    assert "Triton is not installed" in caplog.text
    kernels.installed.cache_clear()


def test_the_fused_sums_ask_for_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, targets = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(1, 4, 5)
    found = torch.full((4, 5), 1.0), torch.full((2, 1), 2.0)
    monkeypatch.setattr(kernels, "serves", lambda device, dtype, columns: columns == 1)
    monkeypatch.setattr(kernels, "sum_and_dots", lambda *given: tuple(t.clone() for t in found))
    monkeypatch.setattr(kernels, "sum_and_scores", lambda *given: tuple(t.clone() for t in found))
    for got in (
        algebra.fused_sum_and_dots(left, right, targets),
        algebra.fused_sum_and_scores(left, right, left, right, [2]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, found, strict=True))
    total, _ = algebra.fused_sum_and_scores(left, right, left, right, [1, 1])
    assert not torch.equal(total, found[0])


@pytest.mark.parametrize("served", [True, False])
def test_the_fused_sums_hold_as_much_as_they_are_told(monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    """By the programs as by PyTorch's tiles, on whichever device."""
    left, right, targets = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(1, 4, 5)
    told: list[int] = []

    def taken(*given: Any) -> tuple[Tensor, Tensor]:
        told.append(given[-1])
        return torch.zeros(4, 5), torch.zeros(2, 1)

    monkeypatch.setattr(kernels, "serves", lambda *_: served)
    for name in ("sum_and_dots", "sum_and_scores"):
        monkeypatch.setattr(*((kernels, name) if served else (algebra, f"tiled_{name}")), taken)
    algebra.fused_sum_and_dots(left, right, targets, 1 << 10)
    algebra.fused_sum_and_scores(left, right, left, right, [2], 1 << 11)
    assert told == [1 << 10, 1 << 11]
