"""Hugging Face's own modelling code, unmodified, on both attention kernels, with its own losses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import BatchError, GhostEngineManager, Items
from ghost.batch import plain
from ghost.loss import infer_reduction
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_exact, assert_gradients, assert_near, grads_of, scored_step
from tests.ghost.huggingface import CASES, IMAGE_TOKEN, Case

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))

MIXED_ROWS = "bert-choices"  # four choices of each sample are rows of their own

OWN = 3e-6
"""Hugging Face takes losses, and some norms, in float32."""


def own_loss(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
    return model(**{**plain(X), "labels": Y}).loss


def shaken(case: Case, attention: str) -> nn.Module:
    config = case.config()
    config._attn_implementation = attention
    model = case.model(config).double().train()
    for p in model.parameters():  # away from the zeros and ones of a fresh start
        p.data += 0.1 * torch.randn_like(p)
    return model


@each_mode
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in CASES if name != MIXED_ROWS])
def test_every_architecture(name: str, attention: str, mode: dict[str, Any]) -> None:
    case = CASES[name]
    model = shaken(case, attention)
    train, val = case.batches(4, 7), case.batches(3, 7)
    assert_exact(model, mode, train, val, own_loss, infer_reduction(model), rtol=OWN)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt-neox", "qwen2"])
def test_without_an_attention_mask(name: str) -> None:
    case = CASES[name]
    model = shaken(case, "sdpa")
    train, val = case.batches(4, 7), case.batches(3, 7)
    for X, _ in (train, val):
        del X["attention_mask"]
    assert_exact(model, {}, train, val, own_loss, infer_reduction(model), rtol=OWN)


def test_choices_are_no_samples() -> None:
    case = CASES[MIXED_ROWS]
    model = shaken(case, "sdpa")
    with pytest.raises(BatchError, match=r"whose first size should be the batch's"):
        scored_step(model, {}, case.batches(4, 7), case.batches(3, 7), own_loss)


def illustrated(images: list[int], length: int = 14) -> tuple[dict[str, Any], Tensor]:
    """Text with any number of images a row, each of four patches, labels on text alone."""
    ids = torch.randint(1, 40, (len(images), length))
    mask = torch.ones_like(ids)
    for row, number in enumerate(images):
        ids[row, : 4 * number] = IMAGE_TOKEN
        mask[row, length - row % 3 :] = 0
    labels = ids.masked_fill((ids == IMAGE_TOKEN) | (mask == 0), -100)
    X: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        row = torch.tensor([row for row, number in enumerate(images) for _ in range(number)])
        X["pixel_values"] = Items(torch.randn(sum(images), 3, 8, 8, dtype=torch.float64), row)
    return X, labels


@each_mode
@pytest.mark.parametrize(
    ("images", "val_images"),
    [([0, 1, 2, 0], [1, 0]), ([2, 0, 1], [0, 0]), ([0, 0], [1, 2]), ([1, 1, 1], [1, 1]), ([0, 0], [0, 0])],
    ids=["mixed", "no validation images", "validation images alone", "one each", "none"],
)
def test_llava_with_any_number_of_images_a_row(
    images: list[int], val_images: list[int], mode: dict[str, Any]
) -> None:
    model = shaken(CASES["llava"], "sdpa")
    train, val = illustrated(images), illustrated(val_images)
    found = assert_exact(model, mode, train, val, own_loss, infer_reduction(model), rtol=OWN)
    tower = [name for name in found.by_layer if "vision_tower" in name]
    assert tower
    seen = torch.stack([found.by_layer[name] for name in tower]).abs().sum(0) > 0
    if sum(val_images) or mode["val_mode"] == "concat":
        assert seen.tolist() == [bool(number and sum(val_images)) for number in images]


def test_pairs_of_rows_with_images() -> None:
    model = shaken(CASES["llava"], "sdpa")
    train, val = illustrated([0, 2, 1]), illustrated([1, 0, 2])
    reduction = infer_reduction(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager({"pairwise": True}, model, optimizer, val_data=val)
    with manager.step(*train, batch_idx=range(3), iteration=0) as step:
        step.backward(model(**step.inputs).loss)
    mine = reference.sample_gradients(model, own_loss, *train, reduction)
    theirs = reference.sample_gradients(model, own_loss, *val, reduction)
    expected = torch.stack([torch.stack([reference.dot(g, h) for h in theirs]) for g in mine])
    assert_near(manager.scores, expected, OWN)
    assert_gradients(grads_of(model), reference.gradient(model, own_loss(model, *train)), OWN)
    manager.cleanup()


@each_mode
@pytest.mark.parametrize("images", [[2, 0, 1], [0, 1, 0], [0, 0, 3]], ids=["as many", "one", "in one row"])
def test_as_many_images_as_rows_but_not_one_each(images: list[int], mode: dict[str, Any]) -> None:
    """Which of the two a layer's entries are cannot be seen from their number."""
    model = shaken(CASES["llava"], "sdpa")
    val = illustrated([1]) if sum(images) == 3 else illustrated([0])
    assert_exact(model, mode, illustrated(images), val, own_loss, infer_reduction(model), rtol=OWN)
