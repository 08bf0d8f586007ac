"""A rehearsed step holds to the byte what a real one holds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from ghost import Selection
from ghost.errors import GhostConfigError, UnsupportedModelError
from runners.choices import TaskName
from runners.dryrun import memory_rows
from runners.losses import build_task
from runners.memory import rehearsal
from runners.memory.estimate import NoEstimateError, estimate_memory
from runners.memory.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    TARGETS,
    VAL_ROWS,
    WEIGHTS,
    Rehearsal,
)
from runners.models import build_model
from runners.models.hf_config import DataFacts
from runners.project import projection_config
from runners.tasks import model_task
from runners.train import ghost_config
from tests.runners.models.zoo import CLASSES, COLUMNS, CPU, OVERRIDES, SIDE, VOCABULARY, composed

IMAGES = "data=digits data.as_image=true data.image_size=8 data.channels=3"
DATA = {
    "t5-tiny": "data.task=seq2seq", "bert-tiny": "data.task=text_classes", "vit-tiny": IMAGES, "cnn": IMAGES,
    "resnet-tiny": IMAGES, "mlp": "data=digits",
    "llava-tiny": "data=digit_questions data.image_size=8 data.patch_size=4 data.image_token_id=39",
}  # fmt: skip
FAMILIES = (
    "gpt2-tiny",
    "llama-tiny",
    "t5-tiny",
    "bert-tiny",
    "vit-tiny",
    "resnet-tiny",
    "llava-tiny",
    "cnn",
    "mlp",
)
WIDE = ("model.hidden=[512,512]", "engine.val_mode=separate", "trainer.batch_size=500")
SMALL = ("trainer.batch_size=3", "engine.val_batch_size=2", "trainer.eval_batch_size=2", "data.val_samples=5")


def config(name: str, *overrides: str) -> DictConfig:
    extra = DATA.get(name, "").split() + ([] if "digits" in DATA.get(name, "") else ["data.seq_len=9"])
    scored = [] if "engine=gradprojlora" in overrides else list(SMALL)
    return composed(f"model={name}", *OVERRIDES.get(name, []), *extra, *scored, *overrides, "output_dir=out")


def rehearsed(cfg: DictConfig) -> Rehearsal:
    task = model_task(cfg.model)
    shape = (COLUMNS,) if task == TaskName.table_classes else (3, SIDE, SIDE)
    seq_len = cfg.data.get("seq_len")
    own = build_task(cfg, CPU)
    settings = projection_config(cfg, own) if cfg.engine.name == "gradprojlora" else ghost_config(
        cfg, Path("out"), own
    )  # fmt: skip
    facts = DataFacts(VOCABULARY, shape, CLASSES, seq_len)
    return Rehearsal(cfg, settings, facts, {"": 5}, CPU)


def peaks(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Of the rehearsal, and of the same on a model that has memory."""
    without = rehearsed(cfg).peak()

    def real(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        shape = (COLUMNS,) if model_task(cfg.model) == TaskName.table_classes else (3, SIDE, SIDE)
        return build_model(cfg.model, VOCABULARY, shape, CLASSES, cfg.data.get("seq_len")).to(dtype)

    monkeypatch.setattr(rehearsal, "_without_memory", real)
    return without, rehearsed(cfg).peak()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_is_rehearsed_as_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without, real = peaks(config(name), monkeypatch)
    assert without.total() == pytest.approx(real.total(), rel=0.02)
    assert without[WEIGHTS] == real[WEIGHTS] > 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.val_mode=separate", "engine.bitwise=true"], ["engine=regular", "optimizer=sgd"],
        ["engine.pairwise=true", "dtype=bf16"], ["trainer.gradient_accumulation_steps=3", "dtype=fp16_mixed"],
        ["engine.val_mode=separate", "trainer.activation_checkpointing=true", "engine.algebra=fused"],
        ["engine=gradprojlora", "trainer.batch_size=2", "engine.distortion_samples=3"],
        ["policy=greedy", "trainer.gradient_accumulation_steps=2"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_mode_is_rehearsed_as_it_runs(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    without, real = peaks(config("gpt2-tiny", *overrides), monkeypatch)
    assert without.total() == pytest.approx(real.total(), rel=0.02)


def test_what_a_step_holds_beside_the_pass() -> None:
    cfg = config("mlp", *WIDE)
    found = rehearsed(cfg).peak()
    parameters = 4 * sum(p.numel() for p in rehearsed(cfg).model.parameters())
    assert found[WEIGHTS] == parameters
    assert found[TARGETS] == pytest.approx(parameters, rel=0.05)
    assert found[OPTIMIZER] == pytest.approx(2 * parameters, rel=0.05)
    assert rehearsed(config("mlp", *WIDE, "optimizer=sgd")).peak()[OPTIMIZER] == 0


def test_columns_that_are_not_rehearsed_are_told_from_those_that_are() -> None:
    found = rehearsed(config("mlp", *WIDE, "engine.pairwise=true")).peak()
    assert found[TARGETS] == pytest.approx(5 * found[WEIGHTS], rel=0.05)


def test_a_validation_gradient_that_outlives_its_step_is_held_twice() -> None:
    found = rehearsed(config("mlp", *WIDE, "engine.val_every=3")).peak()
    assert found[TARGETS] == pytest.approx(2 * found[WEIGHTS], rel=0.05)


def test_gradients_that_outlive_their_step_are_counted_once_and_on_their_device() -> None:
    """Of tied parameters there is one; of those in the CPU's memory a GPU holds none."""
    keys = "engine.val_mode=separate", "engine.val_every=3", "data.seq_len=4"
    cfg = config("gpt2-tiny", *keys)
    found, elsewhere = rehearsed(cfg).peak(), rehearsed(cfg)
    assert found[TARGETS] == pytest.approx(2 * found[WEIGHTS], rel=0.01)
    there = SimpleNamespace(state=SimpleNamespace(targets={"w": torch.empty(1, 2, device="meta")}))
    assert elsewhere._target_bytes(there) == 0  # type: ignore[arg-type]


def test_a_setting_that_the_run_would_refuse_is_no_missing_estimate() -> None:
    cfg = config("mlp", *WIDE)
    facts, sets = DataFacts(None, (COLUMNS,), CLASSES, None), {"": 5}
    settings = ghost_config(cfg, Path("out"), build_task(cfg, CPU))
    nothing = replace(settings, selection=Selection(include=("nothing",)))
    with pytest.raises(GhostConfigError, match="nothing"):
        estimate_memory(cfg, nothing, facts, sets, CPU)


def test_a_model_that_cannot_be_scored_has_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("mlp", *WIDE)
    settings = ghost_config(cfg, Path("out"), build_task(cfg, CPU))
    facts = DataFacts(None, (COLUMNS,), CLASSES, None)

    def refused(self: Rehearsal) -> Counter[str]:
        raise UnsupportedModelError("layer 'a' is of no known kind.")

    monkeypatch.setattr(Rehearsal, "peak", refused)
    with pytest.raises(NoEstimateError, match="memory cannot be estimated: layer 'a'"):
        estimate_memory(cfg, settings, facts, {"": 5}, CPU)
    rows = memory_rows(lambda: estimate_memory(cfg, settings, facts, {"": 5}, CPU))
    assert rows == [("memory", "memory cannot be estimated: layer 'a' is of no known kind.")]


def test_checkpointing_keeps_fewer_activations_and_more_rows_take_more() -> None:
    few = rehearsed(config("gpt2-tiny", "data.seq_len=64")).peak()
    less = rehearsed(config("gpt2-tiny", "data.seq_len=64", "trainer.activation_checkpointing=true")).peak()
    more = rehearsed(config("gpt2-tiny", "data.seq_len=64", "trainer.batch_size=8")).peak()
    assert less[ACTIVATIONS] < few[ACTIVATIONS] / 2
    assert more[ACTIVATIONS] == pytest.approx(2 * few[ACTIVATIONS], rel=0.01)  # 10 rows, not 5
    assert more.total() > few.total()


def test_gradients_of_earlier_micro_batches_are_held() -> None:
    cfg = config("gpt2-tiny", "data.seq_len=64", "trainer.gradient_accumulation_steps=2")
    found = rehearsed(cfg).peak()
    assert found[GRADIENTS] == found[WEIGHTS]


def test_all_validation_rows_are_at_hand() -> None:
    found = rehearsed(config("vit-tiny")).peak()
    assert found[VAL_ROWS] == 5 * (3 * 8 * 8 * 4 + 8)  # images in float32, a label in int64
    found = rehearsed(config("llava-tiny")).peak()
    assert found[VAL_ROWS] > 5 * 3 * 8 * 8 * 4


def test_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    rehearsed(config("gpt2-tiny", "model.config.resid_pdrop=0.1")).peak()
    assert torch.equal(torch.get_rng_state(), state)
