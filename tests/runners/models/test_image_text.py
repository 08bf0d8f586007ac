"""Rows with no image, with one and with two in one batch: each counts as it does alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ghost.batch import Items
from runners.losses import build_task
from tests.ghost.harness import MODES, assert_exact
from tests.runners.models.test_exact import SINGLE
from tests.runners.models.zoo import CPU, IMAGE_TOKEN, IMAGE_TOKENS, SIDE, composed, tiny

LENGTH = 3 + 2 * IMAGE_TOKENS + 3


def mixed(images: list[int], seed: int) -> tuple[dict[str, Any], Tensor]:
    """A row of text for each number of images, their tokens expanded; answers of three tokens are learnt."""
    draw = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for count in images:
        text = torch.randint(1, IMAGE_TOKEN, (6,), generator=draw)
        shown = torch.full((count * IMAGE_TOKENS,), IMAGE_TOKEN)
        rows.append(torch.cat([text[:3], shown, text[3:]]))
        labels.append(torch.cat([torch.full((3 + len(shown),), -100), text[3:]]))
    pixels = torch.randn(sum(images), 3, SIDE, SIDE, generator=draw, dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images))
    inputs = {
        "input_ids": padded(rows, 0),
        "attention_mask": padded([torch.ones_like(ids) for ids in rows], 0),
        "pixel_values": Items(pixels, row),
    }
    return inputs, padded(labels, -100)


def padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.stack([torch.nn.functional.pad(ids, (0, LENGTH - len(ids)), value=value) for ids in rows])


def alone(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    pixels = inputs["pixel_values"]
    own = pixels.values[pixels.row == i]
    row = {key: inputs[key][i : i + 1] for key in ("input_ids", "attention_mask")}
    return row | {"pixel_values": Items(own, torch.zeros(len(own), dtype=torch.int64))}


def test_a_row_counts_as_it_does_alone() -> None:
    model, task = tiny("llava-tiny")
    X, Y = mixed([1, 0, 2, 1], seed=1)
    together = task.loss(model, X, Y)
    assert together.row_counts.tolist() == [3, 3, 3, 3]
    for i in range(4):
        row = task.loss(model, alone(X, i), Y[i : i + 1])
        torch.testing.assert_close(row.row_sums[0], together.row_sums[i], rtol=1e-5, atol=0)


def test_a_batch_without_images_leaves_the_vision_tower_out() -> None:
    model, task = tiny("llava-tiny")
    X, Y = mixed([0, 0], seed=1)
    task.mean(model, X, Y).backward()
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert model.model.language_model.embed_tokens.weight.grad is not None


def test_placed_images_have_the_weights_dtype_and_stay_with_their_rows() -> None:
    cfg = composed("model=llava-tiny", "dtype=bf16")
    X, Y = mixed([1, 2], seed=1)
    placed, _ = build_task(cfg, CPU).place(X, Y)
    assert placed["pixel_values"].values.dtype == torch.bfloat16
    assert torch.equal(placed["pixel_values"].row, torch.tensor([0, 1, 1]))
    assert torch.equal(placed["input_ids"], X["input_ids"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("train", "val"), [([1, 0, 2, 1], [0, 1]), ([0, 0, 0], [1, 2]), ([2, 1], [0, 0])],
    ids=["mixed", "text is trained on", "text validates"],
)  # fmt: skip
def test_scores_and_gradients(train: list[int], val: list[int], mode: str) -> None:
    model, task = tiny("llava-tiny")
    assert_exact(model, MODES[mode], mixed(train, 1), mixed(val, 2), task.mean, task.reduction, rtol=SINGLE)
