"""The game of one step against a plain loop: every subset's own model, its own step, two losses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from conf.errors import ConfigError
from runners.fidelity.step_game import FallInLoss, StepGame, flat
from runners.losses import language_loss

VOCABULARY, TOKENS, PLAYERS = 23, 6, 3
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
}


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=TOKENS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    return model.double()


def rows(number: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (number, TOKENS), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, X: Tensor) -> Tensor:
    return language_loss(model, X, X).mean


def gradients(model: nn.Module, X: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(model, X), list(model.parameters()))


def played(name: str) -> tuple[GPT2LMHeadModel, StepGame, Tensor, Tensor]:
    model, X, val = small_model(), rows(PLAYERS, 1), rows(2, 2)
    parts = torch.stack([flat(gradients(model, row[None])) / PLAYERS for row in X])
    game = StepGame(
        model, lambda weights: OPTIMIZERS[name]([weights]), parts, flat(gradients(model, val)),
        FallInLoss(model, {"input_ids": val}, val),
    )  # fmt: skip
    return model, game, X, val


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_subset_is_worth_what_its_own_step_takes_from_the_loss(name: str) -> None:
    _, game, X, val = played(name)
    found = game.walk([2, 0, 1])
    for size in range(PLAYERS + 1):
        model = small_model()
        before, start = loss_of(model, val).item(), flat(list(model.parameters()))
        optimizer, val_grad = OPTIMIZERS[name](list(model.parameters())), flat(gradients(model, val))
        chosen = X[[2, 0, 1][:size]]
        found_parts = [gradients(model, row[None]) for row in chosen]
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = sum((part[i] for part in found_parts), torch.zeros_like(parameter)) / PLAYERS
        optimizer.step()
        moved = flat(list(model.parameters())) - start
        expected = [before - loss_of(model, val).item(), -float(val_grad @ moved)]
        torch.testing.assert_close(
            found[size], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-13
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_moments_are_as_before(name: str) -> None:
    model, game, _, _ = played(name)
    before = copy.deepcopy(model.state_dict())
    first = game.walk([0, 1, 2])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = played(name)[1]
    fresh.walk([2, 1, 0])
    torch.testing.assert_close(fresh.walk([0, 1, 2]), first, rtol=0, atol=1e-14)


def test_no_subset_is_looked_at_twice() -> None:
    _, game, _, _ = played("sgd")
    for order in ([0, 1, 2], [1, 0, 2], [0, 1, 2]):
        game.walk(order)
    assert game.subsets == 5  # {}, {0}, {1}, {0, 1}, {0, 1, 2}


def changed(model: nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def test_the_fall_in_loss_counts_the_labels_that_count() -> None:
    model, X = small_model(), rows(3, 3)
    Y = X.clone()
    Y[1, 3:] = -100
    mask = torch.ones_like(X)
    mask[1, 3:] = 0
    inputs = {"input_ids": X, "attention_mask": mask}
    before = language_loss(model, inputs, Y).mean.item()
    fall = FallInLoss(model, inputs, Y)
    assert fall() == pytest.approx(0.0, abs=1e-15)
    changed(model, 0.1)
    assert fall() == pytest.approx(before - language_loss(model, inputs, Y).mean.item(), rel=1e-12)


def test_the_fall_in_loss_keeps_digits_in_float32() -> None:
    """A step that lowers the loss by a millionth is lost where two losses are subtracted."""
    exact, X = small_model(), rows(2, 4)
    rounded = copy.deepcopy(exact).float()
    falls = [FallInLoss(model, {"input_ids": X}, X) for model in (exact, rounded)]
    naive = loss_of(rounded, X).item()
    changed(exact, 1e-6)
    rounded.load_state_dict(exact.state_dict())
    expected, found = falls[0](), falls[1]()
    error = abs(found - expected)
    assert error < 1e-7
    assert error < abs(naive - loss_of(rounded, X).item() - expected) + 1e-8


def test_the_fall_in_loss_of_a_step_that_leaves_float32s_exponentials() -> None:
    model, X = small_model().float(), rows(2, 4)
    before, fall = loss_of(model, X).item(), FallInLoss(model, {"input_ids": X}, X)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2000.0)
    after = loss_of(model, X).item()
    assert after > 100
    assert fall() == pytest.approx(before - after, rel=1e-5)


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model, X = small_model(), rows(2, 2)
    model.register_forward_hook(lambda _model, _inputs, output: output.__setitem__("logits", -output.logits))
    with pytest.raises(ConfigError, match="the logits of GPT2LMHeadModel are not its head's"):
        FallInLoss(model, {"input_ids": X}, X)
    with pytest.raises(ConfigError, match="Linear has no linear head"):
        FallInLoss(nn.Linear(2, 2), {"input_ids": X}, X)


def test_a_head_with_bias_and_words_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fall as two losses, whatever the blocks."""
    monkeypatch.setattr(FallInLoss, "WORDS", 5)
    model, X = small_model(), rows(2, 2)
    model.lm_head = nn.Linear(8, VOCABULARY).double()
    before, falls = loss_of(model, X).item(), FallInLoss(model, {"input_ids": X}, X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    assert falls() == pytest.approx(before - loss_of(model, X).item(), rel=1e-9)
