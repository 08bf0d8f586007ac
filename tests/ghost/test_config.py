"""Settings are honoured or refused, never ignored."""

import argparse
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ghost import Algebra, GhostConfig, GhostConfigError, LossReduction, Selection, ValMode
from ghost.policies import Function, StepSamples


def test_defaults() -> None:
    config = GhostConfig.read({})
    assert config == GhostConfig()
    assert (config.engine, config.val_mode, config.algebra) == ("graddotprod", ValMode.CONCAT, Algebra.AUTO)


def test_a_config_of_ours_is_taken_as_it_is() -> None:
    config = GhostConfig(val_batch_size=3)
    assert GhostConfig.read(config) is config


def test_a_misspelt_setting_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """One settings object may serve a whole program; what nearly is a setting was meant for one."""
    with caplog.at_level(logging.WARNING):
        GhostConfig.read({"batch_size": 8, "lr": 1e-3, "device": "cpu", "seed": 3, "dtype": "float32"})
        assert not caplog.records
        GhostConfig.read({"algebr": "fused"})
    assert caplog.messages == ["config: 'algebr' is no setting and has no effect; 'algebra' is one."]


@pytest.mark.parametrize("name", ["GradDotProd", "graddotprod", "grad_dot_prod", "GRADDOTPROD"])
@pytest.mark.parametrize("key", ["method", "engine"])
def test_engine_names(key: str, name: str) -> None:
    assert GhostConfig.read({key: name}).engine == "graddotprod"


def test_names_of_the_protocol() -> None:
    given = {
        "method": "Regular", "val_batch_size": 2, "result_dir": "out", "dot_prod_save_interval": 7,
        "val_mode": "separate", "bitwise": True, "pairwise": False, "preconditioner": "none",
        "loss_reduction": "token_mean", "gradient_accumulation_steps": 4,
    }  # fmt: skip
    assert GhostConfig.read(given) == GhostConfig(
        engine="regular", val_batch_size=2, result_dir="out", save_interval=7, val_mode=ValMode.SEPARATE,
        bitwise=True, loss_reduction=LossReduction.TOKEN_MEAN, gradient_accumulation_steps=4,
    )  # fmt: skip


def test_objects_and_their_class_defaults() -> None:
    @dataclass
    class Theirs:
        val_batch_size: int = 2
        algebra: str = "fused"
        tags: list[str] = field(default_factory=list)

        @property
        def val_mode(self) -> str:
            return "separate"

        def save_interval(self) -> int:
            """A method is no setting."""
            return 3

    expected = GhostConfig(val_batch_size=2, algebra=Algebra.FUSED, val_mode=ValMode.SEPARATE)
    assert GhostConfig.read(Theirs()) == expected
    assert GhostConfig.read(argparse.Namespace(val_batch_size=2, lr=0.1)).val_batch_size == 2


def test_a_function_that_an_object_has_as_a_setting() -> None:
    class Theirs:
        def weigh(self, samples: StepSamples) -> Tensor:
            return samples.totals

        def policy(self, samples: StepSamples) -> Tensor:
            """A method is no setting."""
            return samples.totals

    theirs = Theirs()
    for function in (lambda samples: samples.totals, theirs.weigh, Function(theirs.weigh)):
        found = GhostConfig.read(SimpleNamespace(policy=function, transform=print)).policy
        assert isinstance(found, Function)
        assert function in (found, found.function)
    assert GhostConfig.read(theirs) == GhostConfig()


def test_foreign_names_and_nulls_are_left_alone() -> None:
    given = {"learning_rate": "much", "proj_layers": None, "val_batch_size": None, "pairwise": None, 3: 4}
    assert GhostConfig.read(given) == GhostConfig()


def test_enums_and_dtypes_of_either_kind() -> None:
    for given in (
        {"val_mode": "separate", "algebra": "target", "loss_reduction": "sum", "score_dtype": "fp64"},
        {
            "val_mode": ValMode.SEPARATE, "algebra": Algebra.TARGET, "loss_reduction": LossReduction.SUM,
            "score_dtype": torch.float64,
        },
    ):  # fmt: skip
        config = GhostConfig.read(given)
        assert (config.val_mode, config.algebra) == (ValMode.SEPARATE, Algebra.TARGET)
        assert (config.loss_reduction, config.score_dtype) == (LossReduction.SUM, torch.float64)
    assert GhostConfig.read({"loss_reduction": "auto"}).loss_reduction is None


def test_two_names_of_one_setting() -> None:
    assert GhostConfig.read({"method": "GradDotProd", "engine": "graddotprod"}).engine == "graddotprod"
    with pytest.raises(GhostConfigError, match=r"dot_prod_save_interval=3 contradicts save_interval=2"):
        GhostConfig.read({"save_interval": 2, "dot_prod_save_interval": 3})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairwise": "yes"}, r"pairwise='yes' should be true or false"),
        ({"resolution": "token"}, r"resolution='token' should be one of total, layer, family, head"),
        ({"preconditioner": "sgd"}, r"preconditioner='sgd' should be one of none, adam, auto"),
        ({"credit": "step"}, r"credit='step' has no effect with preconditioner='none'"),
        ({"val_mode": "both"}, r"val_mode='both' should be one of concat, separate"),
        ({"val_mode": ["concat"]}, r"val_mode=\['concat'\] should be one of"),
        ({"algebra": "fast"}, r"algebra='fast' should be one of auto, token_token, target, fused"),
        ({"loss_reduction": "mean"}, r"loss_reduction='mean' should be one of causal_token_mean"),
        ({"score_dtype": "float"}, r"score_dtype='float' should be one of float32"),
        ({"score_dtype": ["float32"]}, r"score_dtype=\['float32'\] should be one of"),
        ({"score_dtype": "bf16"}, r"score_dtype=torch.bfloat16 should be float32 or float64"),
        ({"storage_dtype": "int8"}, r"storage_dtype='int8' should be one of"),
        ({"storage_dtype": torch.int8}, r"storage_dtype=torch.int8 should be a floating-point dtype"),
        ({"bitwise": True}, r"bitwise=True needs val_mode='separate'"),
        ({"bitwise": "yes", "val_mode": "separate"}, r"bitwise='yes' should be true or false"),
        ({"bitwise": True, "val_mode": "separate", "algebra": "fused"}, r"algebra='fused' has no effect"),
        ({"val_mode": "separate", "algebra": "token_token"}, r"token_token' needs .* val_mode='concat'"),
        ({"val_every": 2}, r"val_every=2 needs val_mode='separate'"),
        ({"val_batch_size": 0}, r"val_batch_size=0 should be a whole number of at least 1"),
        ({"val_batch_size": "2"}, r"val_batch_size='2' should be a whole number"),
        ({"val_batch_size": 2.0}, r"val_batch_size=2.0 should be a whole number"),
        ({"save_interval": -1}, r"save_interval=-1 should be a whole number"),
        ({"chunk_mb": 0}, r"chunk_mb=0 should be a whole number"),
        ({"gradient_accumulation_steps": True}, r"gradient_accumulation_steps=True should be a whole number"),
        ({"selection": {"include": ["*"]}}, r"selection=.* should be a ghost.Selection"),
    ],
)
def test_values_that_cannot_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GhostConfigError, match=message):
        GhostConfig.read(given)


def test_a_selection_is_taken() -> None:
    selection = Selection(include=("a.*",))
    assert GhostConfig.read({"selection": selection}).selection is selection
