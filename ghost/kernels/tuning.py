"""Which tiles are the fastest on this GPU, by trying them."""

import logging
from collections.abc import Callable, Hashable, Iterable
from functools import partial

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ghost.errors import GhostError
from ghost.kernels.tiles import Tiles

log = logging.getLogger(__name__)

_fastest: dict[Hashable, Tiles] = {}


def choose(key: Hashable, candidates: Iterable[Tiles], run: Callable[[Tiles], object]) -> Tiles:
    """The fastest of the candidates that fit this GPU, timed the first time that the key is seen.

    With `torch.use_deterministic_algorithms(True)` it is the first that fits, untimed: sums over tiles of
    another shape may differ in their last bits.

    Args:
        key: What the times depend on.
        run: Does the work once.

    Raises:
        GhostError: None of them fits.
    """
    fixed = torch.are_deterministic_algorithms_enabled()
    if (fixed, key) not in _fastest:
        fitting = [tiles for tiles in candidates if _fits(run, tiles)]
        if not fitting:
            raise GhostError(
                "This GPU has too little shared memory for every tile of the fused kernel: set "
                "algebra='target'."
            )
        _fastest[fixed, key] = fitting[0] if fixed else min(fitting, key=partial(_milliseconds, run))
        log.debug("Tiles for %s: %s.", key, _fastest[fixed, key])
    return _fastest[fixed, key]


def _milliseconds(run: Callable[[Tiles], object], tiles: Tiles) -> float:
    median: float = do_bench(partial(run, tiles), warmup=5, rep=20, return_mode="median")
    return median


def _fits(run: Callable[[Tiles], object], tiles: Tiles) -> bool:
    """Whether the GPU has the shared memory and registers; compiles the program."""
    try:
        run(tiles)
    except OutOfResources:
        return False
    return True
