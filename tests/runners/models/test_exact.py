"""Every tiny model's scores and gradients are those of a loop over single samples."""

import pytest

from runners.tasks import model_task
from tests.ghost.harness import EXACT, MODES, assert_exact
from tests.runners.models.zoo import TINY, composed, rows, tiny

# Their RMS norms, and eager attention's probabilities, are taken in float32.
SINGLE = 1e-6
RMS_NORMS = ("llama-tiny", "qwen2-tiny", "t5-tiny", "llava-tiny")
WITH_ATTENTION = [name for name in TINY if name not in ("resnet-tiny", "mlp", "cnn")]


def check(name: str, mode: str, rtol: float, masked: bool = True, *overrides: str) -> None:
    model, task = tiny(name, *overrides)
    kind = model_task(composed(f"model={name}").model)
    train, val = rows(kind, 4, 1, masked=masked), rows(kind, 3, 2, masked=masked)
    assert_exact(model, MODES[mode], train, val, task.mean, task.reduction, rtol=rtol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TINY)
def test_scores_and_gradients(name: str, mode: str) -> None:
    check(name, mode, SINGLE if name in RMS_NORMS else EXACT)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_eager_attention(name: str, masked: bool) -> None:
    check(name, "concat", SINGLE, masked, "model.attn_implementation=eager")


@pytest.mark.parametrize("name", [name for name in WITH_ATTENTION if name != "vit-tiny"])
def test_rows_without_a_mask(name: str) -> None:
    check(name, "concat", SINGLE if name in RMS_NORMS else EXACT, masked=False)
