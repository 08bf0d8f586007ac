"""The fused sums on a CPU: `cpu.c`, compiled when it is first asked for.

Only C with GCC's vectors and OpenMP, and nothing of PyTorch's, so that compiling takes half a second. It is
done once in every process, into a folder that is gone when the library is loaded: nothing to keep in step
with the code, the processor or another user.
"""

import logging
import platform
import subprocess
import sys
from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")

COMMON_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
"""None of them changes what arithmetic gives."""

FLAGS = {
    "AVX512": ("-mavx512f", "-mfma", "-mprefer-vector-width=512", "-DLANES=16", "-DROWS=14"),
    "AVX2": ("-mavx2", "-mfma", "-DLANES=8", "-DROWS=6"),
}
"""How to compile it for a processor, by PyTorch's name of what that can do."""


class Factor(Structure):
    """`[samples, tokens, width]` float32 in memory, as `cpu.c` has it."""

    _fields_ = (
        ("data", c_void_p),
        ("samples", c_long),
        ("tokens", c_long),
        ("width", c_long),
        ("sample_stride", c_long),
        ("token_stride", c_long),
    )

    @classmethod
    def of(cls, tensor: Tensor) -> "Factor":
        """A view of the tensor, whose last axis is contiguous."""
        return cls(tensor.data_ptr(), *tensor.shape, *tensor.stride()[:2])


class Adam(Structure):
    """The coming step's numbers, and the parameter's state `[m, n]` in memory, as `cpu.c` has them."""

    _fields_ = (
        *((name, c_float) for name in ("carried", "slope", "kept", "fresh", "eps", "decay", "reach")),
        *((name, c_void_p) for name in ("m", "v", "p", "before", "squares")),
    )


class Lookups(Structure):
    """Rows of the matrix that samples look up, as `cpu.c` has them."""

    _fields_ = (("row", c_void_p), ("sample", c_void_p), ("values", c_void_p), ("count", c_long))


@cache
def library() -> CDLL | None:
    """The compiled program for this processor; None, and a line in the log, where there can be none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform != "linux" or platform.machine() != "x86_64" or capability not in FLAGS:
        log.debug("The fused kernel is for Linux on x86-64 with AVX2, not for %s.", platform.platform())
        return None
    try:
        return compiled(FLAGS[capability])
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning(
            "there is no fused kernel, without which a scored weight gradient takes up to 1.4 times as long: "
            "install gcc (%s).",
            said.strip().splitlines()[0] if said.strip() else type(error).__name__,
        )
        return None


def compiled(flags: Sequence[str]) -> CDLL:
    """The program, compiled and loaded.

    Raises:
        OSError: There is no gcc, or what it made cannot be loaded.
        CalledProcessError: gcc failed; its `stderr` says why.
    """
    with TemporaryDirectory() as folder:
        target = Path(folder, "cpu.so")
        argv = ["gcc", *COMMON_FLAGS, *flags, "-o", str(target), str(SOURCE)]
        subprocess.run(argv, check=True, capture_output=True, text=True)
        found = CDLL(str(target))
    found.sum_and_dots.argtypes = [
        Factor, Factor, c_void_p, Factor, Factor, POINTER(c_long), c_long, c_long, c_void_p, c_void_p,
    ]  # fmt: skip
    found.sum_and_dots.restype = c_int
    found.adam_sum_and_dots.argtypes = [
        Factor, Factor, c_void_p, c_long, Adam, Lookups, c_long, c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    found.adam_sum_and_dots.restype = c_int
    for count in (found.count_blocks, found.count_step_blocks):
        count.argtypes = [c_long] * 4
        count.restype = c_long
    return found


def sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, program: CDLL | None = None
) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]`, and every sample's inner products with the targets, `[b, C]`; float32.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]` float32.
        targets: `[C, m, n]`, any floating dtype.
        program: What `compiled` returns; None for this processor's.
    """
    targets = targets.to(torch.float32).contiguous()
    nothing = left[:0]
    return _run(left, right, targets, (nothing, nothing), [0] * len(targets), program)


def sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: Sequence[int],
    program: CDLL | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum_and_dots` with the targets summed from validation samples.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]` float32.
        val_left, val_right: `[v, S, m]`, `[v, S, n]` float32.
        sizes: Validation samples of each column; they add up to v.
        program: As for `sum_and_dots`.
    """
    return _run(left, right, None, (val_left, val_right), sizes, program)


def _run(
    left: Tensor, right: Tensor, targets: Tensor | None, val: tuple[Tensor, Tensor], sizes: Sequence[int],
    program: CDLL | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    program, threads, count = _loaded(program), torch.get_num_threads(), len(sizes)
    m, n = left.shape[2], right.shape[2]
    total = left.new_empty(m, n)
    dots = _block_dots(program.count_blocks(m, n, count, threads), left, count)
    sides = [_rowwise(side) for side in (left, right, *val)]
    train_l, train_r, val_l, val_r = map(Factor.of, sides)
    _check(program.sum_and_dots(
        train_l, train_r, None if targets is None else targets.data_ptr(), val_l, val_r,
        (c_long * count)(*sizes), count, threads, total.data_ptr(), dots.data_ptr(),
    ))  # fmt: skip
    return total, dots.sum(0).to(torch.float32)


def _loaded(program: CDLL | None) -> CDLL:
    found = program or library()
    assert found is not None
    return found


def _rowwise(side: Tensor) -> Tensor:
    return side if side.stride(2) == 1 else side.contiguous()


def _block_dots(blocks: int, left: Tensor, columns: int) -> Tensor:
    """Space for each block's inner products, `[blocks, b, C]` float64."""
    return left.new_zeros(blocks, len(left), columns, dtype=torch.float64)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("The fused kernel got no memory for its tiles.")


def adam_sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, numbers: Sequence[float], state: Sequence[Tensor | None],
    lookups: tuple[Tensor, Tensor, Tensor] | None = None, program: CDLL | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sum_and_dots` with the targets weighted by the slopes of Adam's update (`ghost.preconditioner.slope`),
    of which the summed gradient and the samples' squares are a part.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]` float32.
        targets: `[C, m, n]` float32.
        numbers: Those of `AdamStep`, then how many times as many samples the step has as the micro-batches
            so far.
        state: m, v, the parameter, the gradient of earlier micro-batches and their samples' squares, each
            `[m, n]` float32, the last contiguous and added to; None for the latter three where they have no
            part.
        lookups: What samples add to rows of the matrix beside that: the row and the sample of each `[k]`
            int64, ascending and none twice, and what is added `[k, n]` float32.
        program: As for `sum_and_dots`.

    Returns:
        The sum `[m, n]` of all; the inner products of `left` and `right`, and of the lookups, `[b, C]` each.
    """
    program, threads, count = _loaded(program), torch.get_num_threads(), len(targets)
    m, n = left.shape[2], right.shape[2]
    total = left.new_empty(m, n)
    blocks = program.count_step_blocks(m, n, len(left), threads)
    dots, lookup_dots = (_block_dots(blocks, left, count) for _ in range(2))
    left, right = _rowwise(left), _rowwise(right)
    row, sample, values = lookups or (dots[:0], dots[:0], dots[:0])
    kept = [targets.contiguous(), values.contiguous(), *(t if t is None else t.contiguous() for t in state)]
    at = [None if tensor is None else tensor.data_ptr() for tensor in kept]
    _check(program.adam_sum_and_dots(
        Factor.of(left), Factor.of(right), at[0], count, Adam(*numbers, *at[2:]),
        Lookups(row.data_ptr(), sample.data_ptr(), at[1], len(row)), threads, total.data_ptr(),
        dots.data_ptr(), lookup_dots.data_ptr(),
    ))  # fmt: skip
    return total, dots.sum(0).to(torch.float32), lookup_dots.sum(0).to(torch.float32)
