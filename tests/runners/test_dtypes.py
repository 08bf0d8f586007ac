"""Each dtype key has its own effect; float16 trains under a scaler, and skipped steps credit nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ghost import GhostEngineManager
from runners import train
from runners.models import build_model
from tests.runners.conftest import Line
from tests.runners.test_train import DIGITS, TOKENS, series, shards, write_tokens

# By format: weights, products of the forward, sums of scores, scores in files.
FORMATS = {
    "fp32": ("float32", "float32", "float32", "float32"),
    "fp64": ("float64", "float64", "float64", "float64"),
    "bf16": ("bfloat16", "bfloat16", "float32", "float32"),
    "bf16_mixed": ("float32", "bfloat16", "float32", "float32"),
    "fp16_mixed": ("float32", "float16", "float32", "float32"),
    "fp32 dtype.score=float64": ("float32", "float32", "float64", "float32"),
    "fp32 dtype.storage=bfloat16": ("float32", "float32", "float32", "bfloat16"),
    "fp32 dtype.autocast=bfloat16": ("float32", "bfloat16", "float32", "float32"),
    "bf16 dtype.score=float64 dtype.storage=float64": ("bfloat16", "bfloat16", "float64", "float64"),
}


class Seen:
    """What goes through a model under hooks, and what its manager scores."""

    def __init__(self) -> None:
        self.weights: set[torch.dtype] = set()
        self.products: set[torch.dtype] = set()
        self.ids: set[torch.dtype] = set()
        self.scores: set[torch.dtype] = set()

    def build(self, *arguments: Any) -> nn.Module:
        model = build_model(*arguments)
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D | nn.Conv2d):
                module.register_forward_hook(self._product)
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._lookup)
        return model

    def _product(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        self.weights.add(module.weight.dtype)
        self.products.add(output.dtype)

    def _lookup(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.ids.add(inputs[0].dtype)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Seen:
    found = Seen()

    class Watched(GhostEngineManager):
        def aggregate_and_log(self) -> None:
            super().aggregate_and_log()
            found.scores.add(self.scores.dtype)

    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setattr(train, "leave_report", lambda *_: None)
    monkeypatch.setattr(train, "build_model", found.build)
    monkeypatch.setattr(train, "GhostEngineManager", Watched)
    write_tokens(tmp_path / "tokens")
    return found


@pytest.mark.parametrize(
    ("base", "val_mode"), [(TOKENS, "concat"), (TOKENS, "separate"), (DIGITS, "concat")],
    ids=["tokens-concat", "tokens-separate", "digits-concat"],
)  # fmt: skip
@pytest.mark.parametrize("choice", FORMATS)
def test_every_key_has_its_effect(
    line: Line, seen: Seen, tmp_path: Path, choice: str, base: list[str], val_mode: str
) -> None:
    options = [*base, *f"dtype={choice}".split(), f"engine.val_mode={val_mode}"]
    assert line(*options, "trainer.max_steps=1", f"hydra.run.dir={tmp_path}/run") == 0
    weights, products, scores, stored = (getattr(torch, name) for name in FORMATS[choice])
    assert (seen.weights, seen.products, seen.scores) == ({weights}, {products}, {scores})
    assert seen.ids == ({torch.int64} if base is TOKENS else set())
    rows = shards(tmp_path / "run")
    assert rows["score"].dtype == stored
    assert rows["score"].isfinite().all()
    assert rows["step"].dtype == rows["sample"].dtype == torch.int64


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss scale that is too large for some steps."""
    monkeypatch.setattr(
        train, "build_scaler", lambda cfg, device: torch.amp.GradScaler("cpu", init_scale=2.0**36)
    )


@pytest.mark.usefixtures("overflowing", "seen")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_steps_that_overflow_are_left_out_and_credit_nothing(
    line: Line, tmp_path: Path, optimizer: str, clip: str
) -> None:
    folder = tmp_path / "run"
    ended = line(
        *TOKENS, "dtype=fp16_mixed", f"optimizer={optimizer}", f"trainer.clip_grad_norm={clip}",
        "trainer.max_steps=30", "trainer.eval_every=1", "trainer.warmup_steps=25",
        f"hydra.run.dir={folder}",
    )  # fmt: skip
    assert ended == 0
    rows, losses = shards(folder), series(folder, "val/loss")
    rates, scales = series(folder, "train/lr"), series(folder, "train/loss_scale")
    skipped = [step for step in range(30) if bool((rows["clip"][rows["step"] == step] == 0).all())]
    log = (folder / "run.log").read_text()
    assert 3 < len(skipped) < 27
    assert log.count("is skipped: its gradients overflow in float16") == len(skipped)
    taken = 0
    for step in range(30):
        assert rates[step + 1] == pytest.approx(rates[1] * (taken + 1))
        assert (losses[step + 1] == losses[step]) == (step in skipped)
        assert (scales[step + 1] < (scales[step] if step else 2.0**36)) == (step in skipped)
        taken += step not in skipped
    assert "not finite" not in log
    scored = rows["score"][rows["clip"] != 0]
    assert scored.isfinite().all()


def test_other_formats_have_no_loss_scale(line: Line, seen: Seen, tmp_path: Path) -> None:
    assert line(*TOKENS, "dtype=bf16_mixed", f"hydra.run.dir={tmp_path}/run") == 0
    assert seen.scores
    assert not series(tmp_path / "run", "train/loss_scale")
