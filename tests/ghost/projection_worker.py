"""One process of a gloo group: each projects its own rows, and all write one store."""

import faulthandler
import sys

import torch
from torch import distributed

from ghost import GhostEngineManager
from tests.ghost.models import tiny_gpt2, tokens
from tests.ghost.reference import causal_loss

PATIENCE_SECONDS = 60
ROWS = 6


def main(rendezvous: str, out: str, rank: int, world_size: int) -> None:
    """This rank's part of the rows, a row at a time."""
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    model, X = tiny_gpt2(), tokens(ROWS, 9)
    config = {"engine": "gradprojlora", "proj_rank_total": 12, "proj_rank_min": 2, "result_dir": out}
    manager = GhostEngineManager(config, model, None)
    for row in range(rank * ROWS // world_size, (rank + 1) * ROWS // world_size):
        one = X[row : row + 1]
        with manager.step(one, one, batch_idx=[row], iteration=row) as step:
            step.backward(causal_loss(model, step.X, step.Y))
    manager.cleanup()
    distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
