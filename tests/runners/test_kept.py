"""What is counted on tensors without memory is what a real forward keeps."""

import pytest
import torch

from runners.choices import TaskName
from runners.kept import KeptValues, kept_values
from runners.tasks import model_task
from tests.runners.models.zoo import COLUMNS, SIDE, TINY, composed, rows, tiny

LENGTH, ROWS = 9, 3


@pytest.mark.parametrize("name", TINY)
def test_counts_are_those_of_a_real_forward(name: str) -> None:
    model = tiny(name)[0]
    kind = model_task(composed(f"model={name}").model)
    shape = (COLUMNS,) if kind == TaskName.table_classes else (3, SIDE, SIDE)
    found, logits = kept_values(model, kind, ROWS, LENGTH, shape)
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in model.parameters())
    masked = kind == TaskName.language and name != "opt-tiny"  # OPT draws a mask for whole rows too
    X = rows(kind, ROWS, 1, length=LENGTH, masked=masked)[0]
    kept = KeptValues(model)
    with kept:
        if kind == TaskName.seq2seq:
            real = model(input_ids=X["input_ids"], decoder_input_ids=X["input_ids"]).logits
        elif isinstance(X, dict):
            real = model(**X).logits
        else:
            real = model(X) if name in ("mlp", "cnn") else model(pixel_values=X).logits
    assert logits == real.numel()
    if kind == TaskName.image_text:  # real images also keep where in the text they go
        assert found == pytest.approx(kept.total, rel=0.05)
    else:
        assert found == kept.total


def test_weights_do_not_count_and_shared_tensors_count_once() -> None:
    model = torch.nn.Linear(3, 2)
    X = torch.randn(4, 3)
    kept = KeptValues(model)
    with kept:
        (model(X) + model(X.view(4, 3))).sum()
    assert kept.total == X.numel()
