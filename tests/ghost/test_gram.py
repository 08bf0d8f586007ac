"""Exact inner products of samples' gradients, held against a batch-size-1 loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostConfig, GhostConfigError, LossReduction
from ghost.batch import row_count, take_rows
from ghost.errors import BatchError, UnsupportedModelError
from ghost.gram import exact_gram
from tests.ghost.harness import EXACT, grads_of
from tests.ghost.models import VOCABULARY, classes, mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import causal_loss, class_loss, class_loss_sum, gradient, own_loss, token_loss

Case = tuple[nn.Module, Any, Tensor, Callable[..., Tensor], LossReduction]


def gpt2_case() -> Case:
    ids = tokens(5, 9)
    return tiny_gpt2(), ids, with_ignored(ids, [9, 4, 7, 2, 9]), causal_loss, LossReduction.CAUSAL_TOKEN_MEAN


def masked_gpt2_case() -> Case:
    ids, mask = tokens(5, 8), torch.ones(5, 8, dtype=torch.int64)
    mask[1, 5:] = mask[4, 3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = with_ignored(ids, [8, 5, 8, 8, 3])
    return tiny_gpt2(tied=False), inputs, labels, causal_loss, LossReduction.CAUSAL_TOKEN_MEAN


def mlp_case() -> Case:
    return mlp(), *table(5), class_loss, LossReduction.SAMPLE_MEAN


def summed_case() -> Case:
    return mlp(), *table(5), class_loss_sum, LossReduction.SUM


def one_layer_case() -> Case:
    return nn.Linear(5, 4).double(), *table(5), class_loss, LossReduction.SAMPLE_MEAN


def conv_case() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(75, 4)
    )
    images = torch.randn(5, 2, 5, 5, dtype=torch.float64)
    return model.double(), images, classes(5), class_loss, LossReduction.SAMPLE_MEAN


class Tagger(nn.Module):
    """Three uses of one matrix: a table, a layer that runs twice, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner(torch.tanh(self.inner(self.table(ids))))
        return self.head(hidden)


def shared_case() -> Case:
    ids = tokens(5, 4)
    return Tagger().double(), ids, with_ignored(ids, [4, 1, 3, 4, 2]), token_loss, LossReduction.TOKEN_MEAN


CASES = [gpt2_case, masked_gpt2_case, mlp_case, summed_case, one_layer_case, conv_case, shared_case]


def autograd_gram(model: nn.Module, X: Any, Y: Tensor, loss_fn: Callable[..., Tensor]) -> dict[str, Tensor]:
    """One backward a sample; rows without a label that counts have a gradient of zero."""
    rows = [slice(i, i + 1) for i in range(row_count(X, "batch"))]
    losses = [loss_fn(model, take_rows(X, row), Y[row]).nan_to_num() for row in rows]
    grads = [gradient(model, loss) for loss in losses]
    stacked = {name: torch.stack([grad[name].flatten() for grad in grads]) for name in grads[0]}
    return {name: g @ g.T for name, g in stacked.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(gram.abs().max()) for gram in expected.values())
    for name, gram in found.items():
        assert gram.dtype == torch.float64
        # Gradients that are zero but for rounding (a key's bias) are compared with the model's largest.
        atol = EXACT * max(float(expected[name].abs().max()), 1e-5 * largest)
        torch.testing.assert_close(gram, expected[name], rtol=0.0, atol=atol, msg=name)


@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_products_are_autograds(case: Callable[[], Case], block: int) -> None:
    model, X, Y, loss_fn, reduction = case()
    found = exact_gram(model, GhostConfig(loss_reduction=reduction), X, Y, loss_fn, block=block)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert_equal(found, autograd_gram(model, X, Y, loss_fn))


def test_a_row_that_counts_nothing_has_no_gradient() -> None:
    model, ids, _, loss_fn, reduction = gpt2_case()
    labels = with_ignored(ids, [9, 0, 7, 1, 5])  # one label is shifted away
    found = exact_gram(model, GhostConfig(loss_reduction=reduction), ids, labels, loss_fn, block=2)
    assert_equal(found, autograd_gram(model, ids, labels, loss_fn))
    total = torch.stack(list(found.values())).sum(0)
    assert not total[[1, 3]].any()
    assert bool(total.diagonal()[[0, 2, 4]].all())


def test_some_parameters_alone_keep_all_their_uses() -> None:
    model, X, Y, loss_fn, reduction = gpt2_case()
    names = ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias"]
    config = GhostConfig(loss_reduction=reduction, engine="regular", save_interval=3)
    found = exact_gram(model, config, X, Y, loss_fn, parameters=names[::-1])
    assert list(found) == names
    expected = autograd_gram(model, X, Y, loss_fn)
    assert_equal(found, {name: expected[name] for name in names})


def test_the_models_own_loss_and_reduction_are_found() -> None:
    model = tiny_gpt2().float()
    ids = tokens(4, 6)
    expected = autograd_gram(model, ids, ids, own_loss)
    for name, gram in exact_gram(model, GhostConfig(), ids, ids).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gram, expected[name].double(), rtol=0.0, atol=1e-5 * scale + 1e-9)


def test_the_model_stays_what_it_was() -> None:
    model, X, Y, loss_fn, reduction = gpt2_case()
    loss_fn(model, X, Y).backward()
    before, forwards = grads_of(model), {name: m.forward for name, m in model.named_modules()}
    exact_gram(model, GhostConfig(loss_reduction=reduction), X, Y, loss_fn)
    for name, grad in grads_of(model).items():
        assert torch.equal(grad, before[name])
    assert {name: m.forward for name, m in model.named_modules()} == forwards


def test_a_random_loss_is_refused() -> None:
    model, ids = tiny_gpt2(dropout=0.2), tokens(4, 6)
    config = GhostConfig(loss_reduction="causal_token_mean")
    state = torch.get_rng_state()
    with pytest.raises(GhostConfigError, match=r"dropout.*model.eval\(\)"):
        exact_gram(model, config, ids, ids, causal_loss)
    assert torch.equal(torch.get_rng_state(), state)
    found = exact_gram(model.eval(), config, ids, ids, causal_loss)
    assert_equal(found, autograd_gram(model, ids, ids, causal_loss))


def test_what_cannot_work_is_refused() -> None:
    model, X, Y, loss_fn, reduction = mlp_case()
    config = GhostConfig(loss_reduction=reduction)
    with pytest.raises(GhostConfigError, match=r"'0.gain' is not a trained parameter of the Sequential"):
        exact_gram(model, config, X, Y, loss_fn, parameters=["0.weight", "0.gain"])
    model[0].weight.requires_grad_(False)
    with pytest.raises(GhostConfigError, match=r"'0.weight' is not a trained parameter"):
        exact_gram(model, config, X, Y, loss_fn, parameters=["0.weight"])
    assert "0.weight" not in exact_gram(model, config, X, Y, loss_fn)
    with pytest.raises(BatchError, match="block=0 should be"):
        exact_gram(model, config, X, Y, loss_fn, block=0)
    with pytest.raises(BatchError):
        exact_gram(model, config, X, Y[:3], loss_fn)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_under_reentrant_checkpointing_are_refused() -> None:
    """A backward to the probes alone does not run them again."""
    model, X = tiny_gpt2().train(), tokens(4, 9)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inner = [name for name, _ in model.named_parameters() if ".h." in name]
    with pytest.raises(UnsupportedModelError, match="ran without gradients, as under re-entrant"):
        exact_gram(model, GhostConfig(), X, X, causal_loss, parameters=[*inner, "transformer.ln_f.weight"])


def test_what_a_config_says_of_other_scores_changes_nothing() -> None:
    model, X = tiny_gpt2(), tokens(3, 9)
    names = ["transformer.ln_f.weight"]
    expected = exact_gram(model, GhostConfig(), X, X, causal_loss, parameters=names)
    for config in (
        GhostConfig(val_mode="separate", order=2),
        GhostConfig(val_mode="separate", val_every=2, val_grad_device="cpu"),
        GhostConfig(preconditioner="adam", credit="step"),
    ):
        gram = exact_gram(model, config, X, X, causal_loss, parameters=names)
        assert torch.equal(gram[names[0]], expected[names[0]])


def test_the_config_of_a_projection_run_serves() -> None:
    model, X = tiny_gpt2(), tokens(3, 9)
    config = GhostConfig(engine="gradprojlora", weight_grads=False)
    gram = exact_gram(model, config, X, X, causal_loss, parameters=["transformer.ln_f.weight"])
    expected = exact_gram(model, GhostConfig(), X, X, causal_loss, parameters=["transformer.ln_f.weight"])
    assert torch.equal(gram["transformer.ln_f.weight"], expected["transformer.ln_f.weight"])
