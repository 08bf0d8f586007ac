"""Random models of the supported layers against float64 autograd."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghost import Selection
from ghost.batch import row_count
from ghost.discovery import find_layers
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_exact, assert_gradients, assert_near, scored_step
from tests.ghost.random_models import ALGEBRAS, Trial, trials

always_the_same = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
forms = st.sampled_from(["short", "protocol"])


@always_the_same
@given(trial=trials(joint=True), algebra=st.sampled_from(ALGEBRAS["concat"]), form=forms)
def test_joint_passes(trial: Trial, algebra: str, form: str) -> None:
    config = MODES["concat"] | {"algebra": algebra}
    assert_exact(trial.model, config, trial.train, trial.val, trial.loss, trial.reduction, form)


@always_the_same
@given(data=st.data(), trial=trials(joint=False), mode=st.sampled_from(["separate", "bitwise"]), form=forms)
def test_separate_passes(data: st.DataObject, trial: Trial, mode: str, form: str) -> None:
    config = MODES[mode] | {
        "algebra": data.draw(st.sampled_from(ALGEBRAS[mode])),
        "val_batch_size": data.draw(st.integers(1, row_count(trial.val[0], "val"))),
    }
    assert_exact(trial.model, config, trial.train, trial.val, trial.loss, trial.reduction, form)


@always_the_same
@given(data=st.data(), trial=trials(joint=True), mode=st.sampled_from(list(MODES)))
def test_selected_layers(data: st.DataObject, trial: Trial, mode: str) -> None:
    """Scores are of the selected layers alone; gradients are the training gradients of all."""
    if trial.tied:  # a tied matrix is one parameter of two layers, scored as both or as none
        trial.model.get_submodule("head").weight = torch.nn.Parameter(trial.model.table.weight.detach())
    layers = find_layers(trial.model)
    chosen = data.draw(st.lists(st.sampled_from(layers), min_size=1, unique_by=lambda layer: layer.name))
    names = [layer.name for layer in chosen]
    config = MODES[mode] | {"loss_reduction": trial.reduction, "selection": Selection(include=names)}
    args = (trial.model, trial.loss, trial.train, trial.val, trial.reduction)
    by_parameter = reference.scores_by_parameter(*args)
    found = scored_step(trial.model, config, trial.train, trial.val, trial.loss)
    assert found.by_layer.keys() == set(names)
    for layer in chosen:
        parts = [by_parameter[layer.qualified(key)] for key in layer.params]
        assert_near(found.by_layer[layer.name], torch.stack(parts).sum(0))
    plain = reference.gradient(trial.model, trial.loss(trial.model, *trial.train))
    assert_gradients(found.grads, plain)
