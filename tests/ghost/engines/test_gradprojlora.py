"""Projected gradients against a batch-size-1 autograd loop, and the ways to get them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost import (
    GhostConfig,
    GhostConfigError,
    GhostEngineManager,
    GradProjLoRAEngine,
    Items,
    LossReduction,
    ProjectionStore,
    ProtocolError,
    Selection,
    UnsupportedModelError,
)
from ghost.batch import Inputs, plain
from ghost.loss import infer_reduction
from ghost.projection import ProjectionKind
from tests.ghost.harness import assert_near, grads_of
from tests.ghost.huggingface import CASES
from tests.ghost.models import classes, mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.projected import assert_projected, expected_rows, own_gradients, project
from tests.ghost.random_models import Trial, trials
from tests.ghost.reference import causal_loss, class_loss, class_loss_sum, gradient, token_loss

CAUSAL, TOKENS = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.TOKEN_MEAN
SAMPLES, SUM = LossReduction.SAMPLE_MEAN, LossReduction.SUM
KINDS = [kind.value for kind in ProjectionKind]


def own_loss(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
    return model(**{**plain(X), "labels": Y}).loss


def uneven(rows: int = 4) -> tuple[Tensor, Tensor]:
    """Ids, and labels of as many lengths as rows."""
    ids = tokens(rows, 9)
    return ids, with_ignored(ids, [9, 5, 7, 2][:rows])


def engine_of(model: nn.Module, reduction: LossReduction = CAUSAL, **settings: Any) -> GradProjLoRAEngine:
    small = {"proj_rank_total": 12, "proj_rank_min": 2}
    engine = GradProjLoRAEngine(
        model, GhostConfig(engine="gradprojlora", loss_reduction=reduction, **(small | settings))
    )
    engine.attach()
    return engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2_with_labels_of_any_length(tied: bool, kind: str) -> None:
    assert_projected(tiny_gpt2(tied=tied), causal_loss, uneven(), CAUSAL, proj_kind=kind)


@pytest.mark.parametrize("total", [1, 4, 64, 10**6])
def test_any_rank(total: int) -> None:
    engine = assert_projected(
        tiny_gpt2(), causal_loss, uneven(), CAUSAL, proj_rank_total=total, proj_rank_min=1
    )
    if total == 10**6:  # everything is kept whole: rows are the gradients
        assert engine.layout.width == sum(p.numel() for p in engine.model.parameters())


@pytest.mark.parametrize("name", [name for name in CASES if name != "bert-choices"])
def test_every_architecture(name: str) -> None:
    case = CASES[name]
    model = case.build()
    for p in model.parameters():  # away from the zeros and ones of a fresh start
        p.data += 0.1 * torch.randn_like(p)
    # Hugging Face takes losses, and some norms, in float32.
    assert_projected(model, own_loss, case.batches(4, 8), infer_reduction(model), rtol=1e-5)


always_the_same = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@always_the_same
@given(trial=trials(joint=False))
def test_random_models(trial: Trial) -> None:
    """Every layer with a rule, and modules without one, for losses of every reduction."""
    assert_projected(trial.model, trial.loss, trial.train, trial.reduction)


@pytest.mark.parametrize(
    ("loss", "reduction"), [(class_loss, SAMPLES), (class_loss_sum, SUM)], ids=["mean", "sum"]
)
def test_losses_over_rows(loss: Any, reduction: LossReduction) -> None:
    assert_projected(mlp(), loss, table(5), reduction)


def test_a_loss_over_all_tokens() -> None:
    labels = torch.randint(0, 4, (3, 6))
    labels[0, 1:] = labels[2, 4:] = -100
    assert_projected(mlp(), token_loss, (torch.randn(3, 6, 5).double(), labels), TOKENS)


def test_a_row_does_not_depend_on_its_batch() -> None:
    model, (X, Y) = tiny_gpt2(), uneven()
    engine = engine_of(model)
    together = engine.project(X, Y, causal_loss)
    for i in (0, 3):
        assert_near(engine.project(X[i : i + 1], Y[i : i + 1], causal_loss)[0], together[i])
    assert_near(engine.project(X.flip(0), Y.flip(0), causal_loss), together.flip(0))


def test_a_row_does_not_depend_on_the_selection() -> None:
    model, rows = tiny_gpt2(), uneven()
    everything = engine_of(model)
    all_rows = everything.project(*rows, causal_loss)
    everything.detach()
    some = engine_of(model, selection=Selection(include=["h.1.*"], families=["mlp"]))
    some_rows = some.project(*rows, causal_loss)
    places = {part.parameter: part for part in everything.layout.slices}
    assert 0 < len(some.layout.slices) < len(places)
    for part in some.layout.slices:
        assert_near(some_rows[:, part.columns], all_rows[:, places[part.parameter].columns])


def test_a_row_without_a_counted_label_is_zeros_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    model, (X, Y) = tiny_gpt2(), uneven()
    Y[1] = -100
    engine = engine_of(model)
    rows = engine.project(X, Y, causal_loss)
    assert torch.equal(rows[1], torch.zeros_like(rows[1]))
    assert_near(rows, expected_rows(model, causal_loss, (X, Y), CAUSAL, engine))
    rows = engine.project(X[1:2], Y[1:2], causal_loss)  # the batch's own mean is not a number
    assert torch.equal(rows, torch.zeros_like(rows))
    assert engine.uncounted == 2
    engine.close()
    assert "2 samples had no label that the loss counts" in caplog.text


def test_images_some_rows_have() -> None:
    case = CASES["llava"]
    model = case.build()
    X, Y = case.batches(4, 8)
    X = {**X, "pixel_values": Items(X["pixel_values"][:5], torch.tensor([0, 1, 2, 3]))}
    assert_projected(model, own_loss, (X, Y), CAUSAL, rtol=1e-5)


def test_adapters() -> None:
    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip
    model = get_peft_model(tiny_gpt2(), config)
    for p in model.parameters():
        p.data = p.data.double() + (0.1 * torch.randn_like(p.data) if p.requires_grad else 0.0)
    engine = assert_projected(model, causal_loss, uneven(), CAUSAL)
    assert all("lora" in part.parameter for part in engine.layout.slices)


class TwiceTied(nn.Module):
    """A table whose matrix is the head, which runs twice, and is multiplied once more outside of them."""

    def __init__(self, stray: bool) -> None:
        super().__init__()
        self.table, self.head, self.stray = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False), stray
        self.head.weight = self.table.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.head(torch.tanh(self.table(ids)))  # [b, T, 11]
        x = F.linear(x, self.table.weight.T) if self.stray else x[..., :6]
        return self.head(x)


def ids_and_labels() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (3, 5)), torch.randint(0, 11, (3, 5))


def test_a_parameter_with_three_uses() -> None:
    assert_projected(TwiceTied(stray=False), token_loss, ids_and_labels(), TOKENS)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.randn(1, 30))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def test_a_parameter_shared_by_a_layer_and_a_module_without_a_formula() -> None:
    scaled, head = Scaled(), nn.Linear(30, 1, bias=False)
    head.weight = scaled.factors
    model = nn.Sequential(scaled, head, nn.Linear(1, 3)).double()
    X, Y = torch.randn(4, 30).double(), torch.randint(0, 3, (4,))
    engine = engine_of(model, SAMPLES)
    part = engine.layout.slices[0]
    rows = engine.project(X, Y, class_loss)[:, part.columns]
    engine.detach()
    assert (part.parameter, part.size_out, part.size_in) == ("0.factors", 1, 30)
    gradients = own_gradients(model, class_loss, (X, Y), SAMPLES)
    assert_near(rows, torch.stack([project(grad["0.factors"], part, engine.config) for grad in gradients]))


def test_a_use_outside_of_layers_is_refused() -> None:
    engine = engine_of(TwiceTied(stray=True), TOKENS)
    with pytest.raises(UnsupportedModelError, match="used outside its layer"):
        engine.project(*ids_and_labels(), token_loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_floats(dtype: torch.dtype) -> None:
    """Rows are float32 and as exact as the gradients are."""
    model = tiny_gpt2().to(dtype)
    engine = engine_of(model)
    rows = engine.project(*(batch := uneven()), causal_loss)
    assert rows.dtype is torch.float32
    exact = expected_rows(model.double(), causal_loss, batch, CAUSAL, engine)
    error = (rows - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype is torch.float32 else 5e-2)


class Checkpointed(nn.Module):
    """A block that runs under `no_grad` first, between a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.table(ids), use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("weight_grads", [True, False])
def test_a_layer_that_the_backward_does_not_reach_is_refused(weight_grads: bool) -> None:
    model, rows = Checkpointed(), ids_and_labels()
    engine = engine_of(model, TOKENS, include_embeddings=False, weight_grads=weight_grads)
    with pytest.raises(UnsupportedModelError, match="'block' ran without gradients, as under re-entrant"):
        engine.project(*rows, token_loss)


def test_autocast() -> None:
    model = tiny_gpt2().float()

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=X).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), Y[:, 1:].flatten())

    engine = engine_of(model)
    rows = engine.project(*(batch := uneven()), loss)
    exact = expected_rows(model.double(), causal_loss, batch, CAUSAL, engine)
    assert (rows - exact).norm() / exact.norm() < 5e-2


def test_a_projection_inside_of_autocast_keeps_its_digits() -> None:
    model, (X, Y) = tiny_gpt2().float(), uneven()

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal_loss(model, X, Y)

    engine = engine_of(model)
    expected = engine.project(X, Y, loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(engine.project(X, Y, causal_loss), expected, 1e-6)


def test_compiled() -> None:
    model, rows = tiny_gpt2(), uneven()
    engine = engine_of(model)
    eager = engine.project(*rows, causal_loss)
    compiled = torch.compile(model, fullgraph=True)
    assert_near(engine.project(*rows, lambda _, X, Y: causal_loss(compiled, X, Y)), eager)


@pytest.mark.parametrize("include_embeddings", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, include_embeddings: bool) -> None:
    model, (X, Y) = tiny_gpt2().train(), uneven()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    engine = engine_of(model, include_embeddings=include_embeddings)
    rows = engine.project(X, Y, causal_loss)
    engine.detach()
    assert all(p.grad is None for p in model.parameters())
    model.gradient_checkpointing_disable()
    assert_near(rows, expected_rows(model, causal_loss, (X, Y), CAUSAL, engine))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased(kind: str) -> None:
    """Over 600 seeds the mean of each projected inner product is the exact one, as far as its spread lets one
    tell.
    """
    model, (X, Y) = tiny_gpt2(), uneven()
    products = []
    for seed in range(600):
        engine = engine_of(model, proj_rank_total=64, proj_seed=seed, proj_kind=kind)
        rows = engine.project(X, Y, causal_loss)
        engine.detach()
        products.append(rows @ rows.T)
    found = torch.stack(products)
    whole = engine_of(model, proj_rank_total=10**6, proj_rank_min=1)
    rows = whole.project(X, Y, causal_loss)
    exact = rows @ rows.T
    z = (found.mean(0) - exact) / (found.std(0) / 600**0.5)
    assert z.abs().max() < 4  # ten different numbers
    assert (found.std(0) / 600**0.5 / exact.diagonal().max()).max() < 0.03


# --- the manager, and training beside -----------------------------------------------------------------------


def test_a_corpus_through_the_manager(tmp_path: Path) -> None:
    """GhostSuite's calls and field names, without an optimizer: rows are stored, and no weight has a
    gradient.
    """
    model, (X, Y) = tiny_gpt2(), uneven()
    config = {
        "method": "GradProjLora", "proj_layers": "c_fc,attn", "proj_rank_total": 12, "proj_rank_min": 2,
        "proj_seed": 3, "proj_dtype": "float32", "proj_save_interval": 2, "include_embeddings": False,
        "result_dir": str(tmp_path), "val_batch_size": 2, "loss_reduction": "causal_token_mean",
    }  # fmt: skip
    manager = GhostEngineManager(config, model, None)
    for iteration, rows in enumerate(([0, 1], [2], [3])):
        manager.attach_train_batch(X[rows], Y[rows], iteration, [10 + row for row in rows])
        causal_loss(model, *manager.prepare_forward_input(X[rows], Y[rows])).backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        manager.clear_gradients()
        if manager.should_save_metrics(iteration):
            manager.save_metrics(iteration)
    engine = manager.engine
    assert isinstance(engine, GradProjLoRAEngine)
    manager.cleanup()
    assert all(p.grad is None for p in model.parameters())
    assert {part.parameter.split(".")[3] for part in engine.layout.slices} == {"attn", "mlp"}
    store = ProjectionStore.open(tmp_path / "projections")
    assert store.sample_ids.tolist() == [10, 11, 12, 13]
    assert store.layout == engine.layout
    assert store.projection["seed"] == 3
    expected = expected_rows(model, causal_loss, (X, Y), CAUSAL, engine)
    assert_near(torch.tensor(store.matrix()[:]), expected, 1e-6)
    second = GhostEngineManager(config, model, None)
    second.attach_train_batch(X, Y, 0, range(4))
    causal_loss(model, *second.prepare_forward_input(X, Y)).backward()
    with pytest.raises(GhostConfigError, match="holds projections of an earlier run"):
        second.prepare_gradients()


@pytest.mark.slow
def test_several_processes_write_one_store(tmp_path: Path) -> None:
    for world_size in (1, 2):
        argv = [sys.executable, "-m", "tests.ghost.projection_worker", str(tmp_path / f"group-{world_size}")]
        argv += [str(tmp_path / f"out-{world_size}")]
        workers = [subprocess.Popen([*argv, str(rank), str(world_size)]) for rank in range(world_size)]
        assert [worker.wait(timeout=120) for worker in workers] == [0] * world_size
    one, two = (ProjectionStore.open(tmp_path / f"out-{size}" / "projections") for size in (1, 2))
    assert two.complete
    assert two.sample_ids.tolist() == one.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert (np.asarray(two.matrix()) == np.asarray(one.matrix())).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_beside_training(parts: int) -> None:
    """`.grad` is the plain training gradient, bit for bit, and rows are of each sample's own loss all the
    same.
    """
    model, (X, Y) = tiny_gpt2(), uneven()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.zero_grad()
    for half in range(parts):
        part = slice(half * 4 // parts, (half + 1) * 4 // parts)
        (causal_loss(model, X[part], Y[part]) / parts).backward()
    plain_grads = grads_of(model)
    model.zero_grad()
    config = {
        "engine": "gradprojlora", "proj_rank_total": 12, "proj_rank_min": 2,
        "gradient_accumulation_steps": parts,
    }  # fmt: skip
    manager = GhostEngineManager(config, model, optimizer)
    engine = manager.engine
    assert isinstance(engine, GradProjLoRAEngine)
    found = []
    for half in range(parts):
        part = slice(half * 4 // parts, (half + 1) * 4 // parts)
        ids = range(4)[part]
        with manager.step(X[part], Y[part], batch_idx=ids, iteration=0, last=half == parts - 1) as step:
            step.backward(causal_loss(model, step.X, step.Y))
        found.append(engine.rows)
    assert all(torch.equal(grad, plain_grads[name]) for name, grad in grads_of(model).items())
    assert_near(torch.cat(found), expected_rows(model, causal_loss, (X, Y), CAUSAL, engine))
    optimizer.step()
    manager.cleanup()


def test_under_a_gradient_scaler() -> None:
    model, (X, Y) = tiny_gpt2().float(), uneven()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = engine_of(model)
    expected = engine.project(X, Y, causal_loss)
    engine.detach()
    config = {"engine": "gradprojlora", "proj_rank_total": 12, "proj_rank_min": 2}
    manager = GhostEngineManager(config, model, optimizer, scaler=scaler)
    with manager.step(X, Y, batch_idx=range(4), iteration=0) as step:
        step.backward(causal_loss(model, step.X, step.Y))
    assert isinstance(manager.engine, GradProjLoRAEngine)
    assert_near(manager.engine.rows, expected, 1e-5)
    manager.cleanup()


def test_gradients_that_overflow_have_no_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their step is skipped by the scaler, and the run goes on."""
    model, (X, Y) = tiny_gpt2().float(), uneven()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    config = {
        "engine": "gradprojlora",
        "proj_rank_total": 12,
        "proj_rank_min": 2,
        "result_dir": str(tmp_path),
    }
    manager = GhostEngineManager(config, model, optimizer, scaler=scaler)
    for iteration, factor in enumerate((1.0, torch.inf, 1.0)):
        with manager.step(X, Y, batch_idx=range(4), iteration=iteration) as step:
            step.backward(causal_loss(model, step.X, step.Y) * factor)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    manager.cleanup()
    assert ProjectionStore.open(tmp_path / "projections").sample_ids.tolist() == [0, 1, 2, 3] * 2
    assert "4 gradients overflowed under the loss scale: they have no rows" in caplog.text


def test_frozen_parameters_are_not_projected() -> None:
    model = tiny_gpt2()
    for p in model.transformer.wte.parameters():
        p.requires_grad_(False)
    engine = assert_projected(model, causal_loss, uneven(), CAUSAL)
    assert "transformer.wte.weight" not in engine.layout.parameters


def test_what_is_left_out_is_named() -> None:
    model = tiny_gpt2()
    engine = engine_of(model, include_embeddings=False)
    assert engine.left_out == ["transformer.wte.weight", "transformer.wpe.weight"]
    tables = sum(p.numel() for name, p in model.named_parameters() if name in engine.left_out)
    trained = sum(p.numel() for p in model.parameters())
    assert engine.coverage() == {
        "parameters": trained, "projected_parameters": trained - tables,
        "projected_parameter_share": (trained - tables) / trained, "left_out": engine.left_out,
    }  # fmt: skip
    with pytest.raises(
        GhostConfigError, match="2 trainable parameters are not projected, such as 'transformer"
    ):
        engine_of(model, include_embeddings=False, strict=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairwise": True}, "pairwise=True has no effect with engine='gradprojlora'"),
        ({"resolution": "layer"}, "resolution='layer' has no effect"),
        ({"val_mode": "separate"}, "val_mode='separate' has no effect"),
        ({"selection": Selection(include=["h.0.attn.head[0]"])}, "names attention heads"),
        ({"proj_layers": "c_fc", "selection": Selection(families=["mlp"])}, "both given: give one"),
        ({"proj_layers": "nowhere"}, "matches no layer"),
        ({"proj_layers": "wte", "include_embeddings": False}, "leaves nothing to project"),
        ({"proj_rank_total": 3}, "proj_rank_min=2 needs proj_rank_total to be its square, 4, or more"),
        ({"proj_rank_total": None}, "proj_rank_total=None should be a value: leave it out"),
        ({"proj_kind": None}, "proj_kind=None should be a value"),
        ({"proj_rank_total": 0}, "proj_rank_total=0 should be a whole number of at least 1"),
        ({"proj_kind": "uniform"}, "proj_kind='uniform' should be one of gaussian, rademacher, orthonormal"),
        ({"proj_dtype": "int4"}, "proj_dtype='int4' should be one of bfloat16, float16, float32, int8"),
        ({"proj_format": "csv"}, "proj_format='csv' should be one of npy, pt"),
        ({"proj_seed": "a"}, "proj_seed='a' should be a whole number"),
        ({"include_embeddings": "no"}, "include_embeddings='no' should be true or false"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GhostConfigError, match=message):
        engine_of(tiny_gpt2(), **settings)


@pytest.mark.parametrize("engine", ["graddotprod", "regular"])
def test_other_engines_fill_gradients_in_any_case(engine: str) -> None:
    model, rows = mlp(), table(3)
    config = {"engine": engine, "weight_grads": False, "loss_reduction": "sample_mean"}
    with pytest.raises(GhostConfigError, match=f"weight_grads=False has no effect with engine='{engine}'"):
        GhostEngineManager(config, model, torch.optim.SGD(model.parameters(), lr=0.1), val_data=rows)


def test_only_engines_that_read_do_without_an_optimizer() -> None:
    with pytest.raises(GhostConfigError, match=r"a Sequential and a NoneType: give an nn\.Module"):
        GhostEngineManager({"loss_reduction": "sample_mean"}, mlp(), None, val_data=table(3))


def test_the_loss_may_be_given_once() -> None:
    model, rows = mlp(), table(3)
    config = GhostConfig(engine="gradprojlora", loss_reduction=SAMPLES)
    engine = GradProjLoRAEngine(model, config, loss_fn=class_loss)
    engine.attach()
    assert torch.equal(engine.project(*rows), engine.project(*rows, class_loss))


@pytest.mark.parametrize("fails", [True, False])
def test_a_store_is_complete_only_if_its_last_batch_was_written(tmp_path: Path, fails: bool) -> None:
    model, (X, Y) = tiny_gpt2(), uneven()
    config = {"engine": "gradprojlora", "proj_save_interval": 1, "result_dir": str(tmp_path)}
    manager = GhostEngineManager(config, model, None)
    with manager.step(X, Y, batch_idx=range(4), iteration=0) as step:
        step.backward(causal_loss(model, step.X, step.Y))
    if fails:
        with pytest.raises(KeyError), manager.step(X, Y, batch_idx=range(4, 8), iteration=1):
            raise KeyError("the loop's own")
    manager.cleanup()
    assert ProjectionStore.open(tmp_path / "projections").complete is not fails


def test_an_unknown_loss_is_asked_for() -> None:
    with pytest.raises(GhostConfigError, match="loss_reduction cannot be inferred for Sequential: set it"):
        GradProjLoRAEngine(mlp(), GhostConfig(engine="gradprojlora"))


def test_calls_out_of_order() -> None:
    engine = engine_of(mlp(), SAMPLES)
    with pytest.raises(ProtocolError, match="begin\\(\\) comes first"):
        engine.collect()
    engine.begin(*table(3), first=True, share=1.0)
    with pytest.raises(ProtocolError, match="found no gradient"):
        engine.collect()
    engine.detach()
    with pytest.raises(ProtocolError, match="detached"):
        engine.project(*table(3), class_loss)


def test_a_failed_forward_leaves_the_model_plain() -> None:
    model, (X, Y) = mlp(), table(3)
    engine = engine_of(model, SAMPLES)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.project(X[:, :2], Y, class_loss)
    gradient(model, class_loss(model, X, Y))  # weights have gradients as ever
    assert_near(engine.project(X, Y, class_loss), expected_rows(model, class_loss, (X, Y), SAMPLES, engine))
    assert len(classes(3)) == 3
