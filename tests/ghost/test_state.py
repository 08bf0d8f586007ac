"""A run that ends anywhere and goes on with a manager's state gives the rows of a run that never ended."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostConfigError, GhostEngineManager, ProtocolError
from ghost.values import read_shards
from tests.ghost.models import mlp, table
from tests.ghost.reference import class_loss

STEPS = 7
MODES: dict[str, dict[str, Any]] = {
    "concat, rows in turn": {"val_batch_size": 2},
    "concat, sets": {"val_batch_size": 1},
    "separate": {"val_mode": "separate"},
    "separate, every third step": {"val_mode": "separate", "val_every": 3},
    "pairwise": {"pairwise": True, "val_batch_size": 3},
    "regular": {"engine": "regular"},
}
each_mode = pytest.mark.parametrize("mode", MODES, ids=list(MODES))


class Loop:
    """A loop over fixed batches that can be left after any step."""

    def __init__(self, mode: str, out: Path) -> None:
        torch.manual_seed(0)
        self.model, self.batches = mlp(), [table(4) for _ in range(STEPS)]
        self.val: Any = {"a": table(3), "b": table(2)} if "sets" in mode else table(5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.config = {
            "loss_reduction": "sample_mean", "result_dir": str(out), "save_interval": 2, **MODES[mode],
        }  # fmt: skip

    def manager(self, state: Any = None) -> GhostEngineManager:
        return GhostEngineManager(
            self.config, self.model, self.optimizer, val_data=self.val, loss_fn=class_loss, state=state
        )

    def steps(self, manager: GhostEngineManager, first: int, end: int) -> None:
        for t in range(first, end):
            X, Y = self.batches[t]
            self.optimizer.zero_grad()
            with manager.step(X, Y, batch_idx=range(4 * t, 4 * t + 4), iteration=t) as step:
                step.backward(class_loss(self.model, step.X, step.Y))
            if t != 3:  # a step that is skipped
                self.optimizer.step()

    def snapshot(self, manager: GhostEngineManager) -> Any:
        return copy.deepcopy([manager.state_dict(), self.model.state_dict(), self.optimizer.state_dict()])


def rows(out: Path) -> dict[str, Tensor]:
    shards = list(read_shards(out / "scores"))
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]} if shards else {}


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@each_mode
@pytest.mark.parametrize("kept", [1, 4, 5])
def test_going_on_gives_what_never_ended(mode: str, kept: int, tmp_path: Path) -> None:
    whole = Loop(mode, tmp_path / "whole")
    manager = whole.manager()
    whole.steps(manager, 0, STEPS)
    manager.cleanup()

    ended = Loop(mode, tmp_path / "ended")
    manager = ended.manager()
    ended.steps(manager, 0, kept)
    torch.save(ended.snapshot(manager), tmp_path / "state.pt")
    ended.steps(manager, kept, min(kept + 2, STEPS))  # what is lost when it is killed
    manager.save_metrics(kept + 1)

    again = Loop(mode, tmp_path / "ended")
    state, model_state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.model.load_state_dict(model_state)
    again.optimizer.load_state_dict(optimizer_state)
    manager = again.manager(state)
    again.steps(manager, kept, STEPS)
    manager.cleanup()

    for mine, theirs in zip(weights(again.model), weights(whole.model), strict=True):
        assert torch.equal(mine, theirs)
    found, expected = rows(tmp_path / "ended"), rows(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for key, column in expected.items():
        assert torch.equal(found[key], column), key
    assert (mode == "regular") == (not expected)


def test_a_state_is_taken_between_steps(tmp_path: Path) -> None:
    loop = Loop("separate", tmp_path)
    manager = loop.manager()
    X, Y = loop.batches[0]
    manager.attach_train_batch(X, Y, 0, range(4))
    with pytest.raises(ProtocolError, match="step 0 is open"):
        manager.state_dict()


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        ("separate", "concat, sets"),
        ("regular", "separate"),
        ("separate", "regular"),
        ("concat, sets", "pairwise"),
    ],
)
def test_a_state_of_other_settings_is_refused(taken: str, given: str, tmp_path: Path) -> None:
    state = Loop(taken, tmp_path / "a").manager().state_dict()
    with pytest.raises(GhostConfigError, match="go on with the"):
        Loop(given, tmp_path / "b").manager(state)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    loop = Loop("separate", tmp_path)
    manager = loop.manager()
    loop.steps(manager, 0, 2)
    state = manager.state_dict()
    (tmp_path / "scores" / "shard-00000.pt").unlink()
    with pytest.raises(GhostConfigError, match=r"shard-00000\.pt"):
        loop.manager(state)


@each_mode
def test_a_dropped_step_has_not_begun(mode: str, tmp_path: Path) -> None:
    whole = Loop(mode, tmp_path / "whole")
    manager = whole.manager()
    whole.steps(manager, 0, STEPS)
    manager.cleanup()

    other = Loop(mode, tmp_path / "other")
    manager = other.manager()
    other.steps(manager, 0, 2)
    before = other.snapshot(manager)
    X, Y = other.batches[2]
    with manager.step(X, Y, batch_idx=range(4), iteration=2) as step:
        step.backward(class_loss(other.model, step.X, step.Y))
    manager.drop_step()
    after = other.snapshot(manager)
    assert str(after) == str(before)
    other.steps(manager, 2, STEPS)
    with pytest.raises(ProtocolError, match="there is no step to drop"):
        manager.drop_step()
    manager.cleanup()
    found, expected = rows(tmp_path / "other"), rows(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
