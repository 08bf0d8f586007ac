"""One process of a gloo group: under DistributedDataParallel every mode is the plain way's."""

import faulthandler
import sys

import torch
from torch import distributed, nn

from ghost import GhostEngineManager, LossReduction
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_gradients, assert_near, grads_of
from tests.ghost.models import tiny_gpt2, tokens
from tests.ghost.reference import causal_loss

CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN
PATIENCE_SECONDS = 60


def check(mode: dict[str, object]) -> None:
    """One step of the wrapped model."""
    inner, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    expected = reference.scores(inner, causal_loss, (X, X), (V, V), CAUSAL)
    plain = reference.gradient(inner, causal_loss(inner, X, X))
    model = nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(mode, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    assert manager.model is inner
    with manager.step(X, X, batch_idx=range(4), iteration=0) as step:
        step.backward(causal_loss(model, step.X, step.Y))
    assert_near(manager.scores, expected)
    assert_gradients(grads_of(inner), plain)
    manager.cleanup()
    assert not any("forward" in vars(module) for module in inner.modules())


def main(store: str) -> None:
    """All modes, in a group of one."""
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    for mode in MODES.values():
        check(mode)
    distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1])
