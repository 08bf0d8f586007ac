"""Modules without a formula: attention, recurrence, bare parameters, anyone's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTForImageClassification

from ghost import GhostEngineManager, LossReduction, UnsupportedModelError
from ghost.discovery import find_layers
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_exact, scored_step
from tests.ghost.models import classes
from tests.ghost.reference import class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
SAMPLE_MEAN = LossReduction.SAMPLE_MEAN


def sequences(rows: int, length: int = 5, width: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, length, width, dtype=torch.float64), classes(rows)


class Attention(nn.Module):
    """`nn.MultiheadAttention` on its explicit path (weights wanted) or its fused one."""

    def __init__(self, weights: bool = False, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **{"batch_first": True} | settings)
        self.out, self.weights = nn.Linear(8, 4), weights
        self.double()

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.attn.batch_first else x.transpose(0, 1)
        found, _ = self.attn(inner, inner.flip(-1), inner, need_weights=self.weights, **self.masks(x))
        return self.out(torch.tanh(found if self.attn.batch_first else found.transpose(0, 1)))


class PaddedAttention(Attention):
    """Some keys of each sample are padding."""

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        return {"key_padding_mask": x[:, :, 0] > 0.8}


class MaskedAttention(Attention):
    """Causal, with a mask for each sample and head."""

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        bias = torch.where(x[:, None, :, 0] > 0.5, -1.0, 0.3).repeat_interleave(2, dim=0)  # [b*heads, 1, T]
        return {"attn_mask": bias.expand(-1, x.shape[1], -1).to(x.dtype)}


class CrossAttention(nn.Module):
    """Key and value widths of their own give three projection matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=3, batch_first=True)
        self.out = nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, key=x[..., :6], value=x[..., 5:], need_weights=False)[0])


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "explicit": lambda: Attention(weights=True),
    "fused": lambda: Attention(),
    "eval": lambda: Attention().eval(),
    "sequence first": lambda: Attention(batch_first=False),
    "sequence first, explicit": lambda: Attention(weights=True, batch_first=False),
    "key and value biases": lambda: Attention(add_bias_kv=True),
    "no bias, zero attention": lambda: Attention(bias=False, add_zero_attn=True),
    "separate projections": CrossAttention,
    "padding": PaddedAttention,
    "a mask a head": MaskedAttention,
}


@each_mode
@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=list(ATTENTIONS))
def test_multihead_attention(mode: dict[str, Any], make: Callable[[], nn.Module]) -> None:
    found = assert_exact(make(), mode, sequences(6), sequences(3), class_loss, SAMPLE_MEAN)
    assert set(found.by_layer) == {"attn", "out"}


@each_mode
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(mode: dict[str, Any], training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 4)).double().train(training)
    assert_exact(model, mode, sequences(6), sequences(3), class_loss, SAMPLE_MEAN)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.core = kind(8, 6, num_layers=2, **{"batch_first": True} | settings)
        self.out = nn.Linear(6 * (1 + self.core.bidirectional), 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.core(x if self.core.batch_first else x.transpose(0, 1))
        return self.out(found if self.core.batch_first else found.transpose(0, 1))


@each_mode
@pytest.mark.parametrize(
    "settings", [{}, {"batch_first": False, "bidirectional": True}], ids=["rows", "time"]
)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrence(mode: dict[str, Any], kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    model = Recurrent(kind, **settings)
    assert_exact(model, mode, sequences(4), sequences(2), class_loss, SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrence_in_float32(mode: dict[str, Any], kind: type[nn.RNNBase]) -> None:
    """Where a processor has kernels of its own for it, which training keeps."""
    model = nn.Sequential(nn.Linear(8, 8), Recurrent(kind)).float()
    train, val = ((X.float(), Y) for X, Y in (sequences(4), sequences(2)))
    plain = reference.gradient(model, class_loss(model, *train))
    found = assert_exact(model, mode, train, val, class_loss, SAMPLE_MEAN, rtol=1e-5)
    if mode.get("bitwise"):
        assert all(torch.equal(found.grads[name], plain[name]) for name in plain)
    assert torch.backends.mkldnn.enabled


class Bare(nn.Module):
    """Parameters outside any layer: a class token, positions, layer scale, and a list of gates."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(6, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.gates = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(1))})
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.scale * torch.tanh(self.inner(x)) + self.named["shift"]
        for gate in self.gates:
            x = torch.sigmoid(gate) * x
        return self.out(x)


@each_mode
def test_bare_parameters_of_the_model_itself(mode: dict[str, Any]) -> None:
    found = assert_exact(Bare(), mode, sequences(6), sequences(3), class_loss, SAMPLE_MEAN)
    assert set(found.by_layer) == {"", "inner", "out"}


@each_mode
def test_a_frozen_bare_parameter(mode: dict[str, Any]) -> None:
    model = Bare()
    model.scale.requires_grad_(False)
    model.gates[0].requires_grad_(False)
    assert_exact(model, mode, sequences(6), sequences(3), class_loss, SAMPLE_MEAN)
    (root,) = [layer for layer in find_layers(model) if layer.name == ""]
    assert set(root.params) == {"token", "positions", "gates.1", "named.shift"}


class Positions(nn.Module):
    """Learned positions that see no input at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 9, 8))

    def forward(self, length: int) -> Tensor:
        return self.table[:, :length]


class WithPositions(nn.Module):
    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.positions, self.out = positions, nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x + self.positions(x.shape[1])))


@each_mode
@pytest.mark.parametrize("rows", [6, 2])  # 2 + 3 rows are as many as positions
def test_positions_without_an_input(mode: dict[str, Any], rows: int) -> None:
    model = WithPositions(Positions())
    assert_exact(model, mode, sequences(rows), sequences(3), class_loss, SAMPLE_MEAN)


class Odd(nn.Module):
    """Several inputs of several kinds, nested outputs, and a loop that reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(
        self, pair: tuple[Tensor, Tensor], *, power: int, mask: Tensor | None = None
    ) -> dict[str, Any]:
        left, right = pair
        hidden = left @ self.weight + self.bias
        while float(hidden.detach().abs().max()) > 3:  # data decides: cannot be batched
            hidden = hidden / 2
        hidden = hidden * right**power
        return {"main": hidden, "more": [torch.sin(self.bias) * left, mask]}


class WithOdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.out = Odd(), nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        # Scaled row by row, so that the loop's number of turns does not depend on the other rows.
        x = x / x.abs().amax((1, 2), keepdim=True) * 0.1
        found = self.odd((x, torch.cos(x)), power=2, mask=None)
        return self.out(torch.tanh(found["main"]) + found["more"][0])


@each_mode
def test_any_signature_and_a_module_that_cannot_be_batched(mode: dict[str, Any]) -> None:
    assert_exact(WithOdd(), mode, sequences(4), sequences(2), class_loss, SAMPLE_MEAN)


class Mixing(nn.Module):
    """Subtracts the batch's mean: samples are not independent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale - x.mean(0)


class Noisy(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.scale, 0.5)


class Flattening(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).flatten(0, 1)


class Branching(Mixing):
    """Has a layer inside and cannot be batched: it could only run once for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) * self.scale
        return x if float(x.detach().sum()) > 1e9 else x + 1


@pytest.mark.parametrize("name", list(MODES))
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Mixing, r"'0' \(Mixing\) gives other outputs for samples on their own"),
        (Noisy, r"'0' \(Noisy\) gives other outputs for samples on their own"),
        (Flattening, r"'0' \(Flattening\) .* returns a tensor of shape \(\d+, 8\)"),
        (Branching, r"'0' \(Branching\) .* cannot be run for all samples at once"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(kind: type[nn.Module], message: str, name: str) -> None:
    model = nn.Sequential(kind(), nn.Unflatten(0, (-1, 5)) if kind is Flattening else nn.Identity(),
                          nn.Linear(8, 4)).double()  # fmt: skip
    config = MODES[name] | {"loss_reduction": "sample_mean"}
    with pytest.raises(UnsupportedModelError, match=message):
        scored_step(model, config, sequences(6), sequences(3), class_loss)


def test_training_draws_the_same_random_numbers() -> None:
    """The second run must not advance the generator."""
    model = WithPositions(Positions())
    after = []
    for mode in MODES.values():
        torch.manual_seed(3)
        scored_step(model, mode | {"loss_reduction": "sample_mean"}, sequences(4), sequences(2), class_loss)
        after.append(torch.rand(()))
    assert after[0] == after[1] == after[2]


def images(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 8, 8, dtype=torch.float64), classes(rows)


VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def shaken(model: nn.Module) -> nn.Module:
    """Away from the zeros and ones of a fresh start."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.double().train()


def image_loss(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=X).logits, Y)


@each_mode
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vit(mode: dict[str, Any], attention: str) -> None:
    """Class token and positions are bare parameters of a module that has a convolution inside."""
    config = ViTConfig(
        **VISION, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )  # fmt: skip
    model = shaken(ViTForImageClassification(config))
    found = assert_exact(model, mode, images(6), images(3), image_loss, SAMPLE_MEAN)
    assert "vit.embeddings" in found.by_layer


def clip_loss(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=X).last_hidden_state.mean(1)[:, :4], Y)


@each_mode
def test_clip_vision_tower(mode: dict[str, Any]) -> None:
    """Its class token is bare, its positions are an embedding inside the same module."""
    model = shaken(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    assert_exact(model, mode, images(6), images(3), clip_loss, SAMPLE_MEAN)


class Gated(nn.Module):
    """A gate of one number, as ReZero has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner = nn.Parameter(torch.tensor(0.3)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * torch.tanh(self.inner(x))


@each_mode
def test_a_parameter_of_one_number(mode: dict[str, Any]) -> None:
    model = nn.Sequential(Gated(), nn.Linear(8, 4)).double()
    assert_exact(model, mode, sequences(6), sequences(3), class_loss, SAMPLE_MEAN)


class Wandering(Mixing):
    """Mixes samples now and then, and through masked entries."""

    mixes = False

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + (x.mean(0) if self.mixes else 0)
        return torch.cat([x, torch.full_like(x[..., :1], -torch.inf)], -1)


@pytest.mark.parametrize("name", list(MODES))
def test_every_step_is_compared_masked_entries_or_not(name: str) -> None:
    model = nn.Sequential(Wandering(), Masked(), nn.Linear(8, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = MODES[name] | {"loss_reduction": "sample_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=sequences(3), loss_fn=class_loss)

    def step(t: int) -> None:
        with manager.step(*sequences(6), batch_idx=range(6), iteration=t) as scored:
            scored.backward(class_loss(model, scored.X, scored.Y))

    step(0)
    model[0].mixes = True  # type: ignore[assignment]
    for t in (1, 2):
        with pytest.raises(UnsupportedModelError, match=r"'0' \(Wandering\) gives other outputs"):
            step(t)
    manager.cleanup()


class Masked(nn.Module):
    """Drops what is masked."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-1]


class Caching(Mixing):
    """Leaves a tensor and a count on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.last = x.detach()
        return x * self.scale


def test_the_second_run_leaves_nothing_behind() -> None:
    model = nn.Sequential(Caching(), nn.Linear(8, 4)).double()
    scored_step(model, {"loss_reduction": "sample_mean"}, sequences(4), sequences(2), class_loss)
    caching = model[0]
    assert isinstance(caching, Caching)
    assert caching.runs == 1
    assert caching.last is not None
    assert caching.last.shape == (6, 5, 8)


class Spectral(Mixing):
    """Returns complex numbers beside real ones."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x * self.scale, torch.fft.fft(x * self.scale)


class Power(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Spectral(), nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        real, spectrum = self.inner(x)
        return self.out(real + spectrum.abs())


def normed() -> nn.Module:
    return nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)
    ).double()


@pytest.mark.parametrize("name", list(MODES))
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Power, r"'inner' \(Spectral\) .* returns a Tensor"),
        (normed, r"\(ParametrizationList\) computes a weight from"),
    ],
    ids=["complex outputs", "parametrization"],
)
def test_gradients_that_would_pass_unseen_are_refused(
    make: Callable[[], nn.Module], message: str, name: str
) -> None:
    config = MODES[name] | {"loss_reduction": "sample_mean"}
    with pytest.raises(UnsupportedModelError, match=message):
        scored_step(make(), config, sequences(4), sequences(2), class_loss)
