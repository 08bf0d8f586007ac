"""RMS norms, and layers of the user's own that are affine in their parameters entry by entry."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ghost import LossReduction, register_layer
from ghost.batch import Inputs
from ghost.layers import ElementwiseAffineRule, base, rule_for
from ghost.layers.base import with_parameters
from ghost.layers.elementwise import TRANSFORMERS_NORMS
from tests.ghost import reference
from tests.ghost.harness import EXACT, MODES, OWN_LOSS, assert_exact, assert_near, scored_step
from tests.ghost.layers.test_compiled import assert_compiled_exact
from tests.ghost.models import VOCABULARY, classes, tokens
from tests.ghost.reference import causal_loss, class_loss

NORMS = {"torch": nn.RMSNorm, "llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "t5": T5LayerNorm}
IN_FLOAT32 = 1e-6
"""Hugging Face's norms compute in float32, whatever the model's dtype."""

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
each_norm = pytest.mark.parametrize("kind", list(NORMS))


def tolerance(kind: str) -> float:
    return EXACT if kind == "torch" else IN_FLOAT32


def network(norm: nn.Module) -> nn.Sequential:
    for p in norm.parameters():
        nn.init.normal_(p)
    return nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 4)).double()


def batch(rows: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, *shape, 6, dtype=torch.float64), classes(rows)


@each_mode
@each_norm
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_rms_norms(mode: dict[str, Any], kind: str, shape: tuple[int, ...]) -> None:
    train, val = batch(5, *shape), batch(3, *shape)
    found = assert_exact(
        network(NORMS[kind](6)), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN,
        rtol=tolerance(kind),
    )  # fmt: skip
    assert found.by_layer["1"].ne(0).all()


@each_mode
@pytest.mark.parametrize("options", [{"eps": 0.1}, {"elementwise_affine": False}])
def test_options_of_the_rms_norm(mode: dict[str, Any], options: dict[str, Any]) -> None:
    model = network(nn.RMSNorm(6, **options))
    found = assert_exact(model, mode, batch(5, 3), batch(3, 3), class_loss, LossReduction.SAMPLE_MEAN)
    assert ("1" in found.by_layer) == ("eps" in options)


@each_mode
def test_rms_norm_over_several_axes(mode: dict[str, Any]) -> None:
    model = network(nn.RMSNorm((3, 6)))
    assert_exact(model, mode, batch(5, 2, 3), batch(3, 2, 3), class_loss, LossReduction.SAMPLE_MEAN)


@pytest.mark.parametrize("model", TRANSFORMERS_NORMS)
def test_every_norm_of_transformers_is_there_and_exact(model: str) -> None:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, TRANSFORMERS_NORMS[model])(6).double()
    nn.init.normal_(norm.weight)
    rule = rule_for(norm)
    assert rule is not None
    x, grad = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    found = rule.gradients(norm, x, grad)["weight"]
    for i in range(4):
        (expected,) = torch.autograd.grad(norm(x[i : i + 1]), norm.weight, grad[i : i + 1])
        assert_near(found.dot(torch.eye(6, dtype=torch.float64)[0])[i], expected[0], IN_FLOAT32)
    (expected,) = torch.autograd.grad(norm(x), norm.weight, grad)
    assert_near(found.sum(), expected, IN_FLOAT32)
    assert torch.equal(rule.forward(norm, dict(norm.named_parameters()), x), norm(x))


def llama(kind: str) -> Any:
    """Llama with heads of its keys' own, or Qwen with a norm on each head."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "use_cache": False, "tie_word_embeddings": kind == "qwen3",
    }  # fmt: skip
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes)).double()
    return LlamaForCausalLM(LlamaConfig(**sizes)).double()


@each_mode
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_language_models_of_transformers(mode: dict[str, Any], kind: str) -> None:
    model, X, V = llama(kind), tokens(4, 9), tokens(3, 9)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data += 0.1 * torch.randn_like(p)
    reduction = LossReduction.CAUSAL_TOKEN_MEAN
    found = assert_exact(model, mode, (X, X), (V, V), causal_loss, reduction, rtol=OWN_LOSS)
    assert found.by_layer["model.norm"].ne(0).all()


@each_mode
@each_norm
def test_in_one_compiled_graph(mode: dict[str, Any], kind: str) -> None:
    assert_compiled_exact(network(NORMS[kind](6)), mode, batch(5, 3), batch(3, 3), tolerance(kind))


@each_mode
@each_norm
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=["bfloat16", "bfloat16 autocast", "float16 autocast"],
)
def test_short_floats(
    mode: dict[str, Any], kind: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    model, train, val = network(NORMS[kind](6)), batch(6, 3), batch(3, 3)
    expected = reference.scores(model, class_loss, train, val, LossReduction.SAMPLE_MEAN)

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return class_loss(model, X, Y)

    short = ((X.to(dtype), Y) for X, Y in (train, val))
    found = scored_step(model.to(dtype), mode | {"loss_reduction": "sample_mean"}, *short, loss)
    assert_near(found.scores, expected, 0.05)


class Places(nn.Module):
    """`y = (1 + a) ∘ x + p + c`: gains `[d]`, places `[1, T, d]`, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))
        self.places = nn.Parameter(torch.randn(1, 3, 6))
        self.constant = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.gain) * x + self.places + self.constant


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """A model with a layer registered in one line, for the length of a test."""
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    register_layer(Places)(ElementwiseAffineRule)
    return network(Places())


@each_mode
@pytest.mark.parametrize("frozen", ["", "gain", "places", "constant"])
def test_a_layer_of_ones_own_in_one_line(mode: dict[str, Any], frozen: str, places: nn.Sequential) -> None:
    if frozen:
        places[1].get_parameter(frozen).requires_grad_(False)
    found = assert_exact(places, mode, batch(5, 3), batch(3, 3), class_loss, LossReduction.SAMPLE_MEAN)
    assert f"1.{frozen}" not in found.grads


def test_a_stand_in_leaves_the_module_alone() -> None:
    norm = nn.RMSNorm(6)
    weight, ones = norm.weight, torch.ones(6)
    stand_in = with_parameters(norm, {"weight": ones})
    assert stand_in.weight is ones
    assert norm.weight is weight
    assert isinstance(stand_in, nn.RMSNorm)
    assert stand_in.normalized_shape == norm.normalized_shape
