"""The coverage report accounts for every trainable parameter, once."""

from typing import Any

import pytest
from torch import nn

from ghost import GhostConfig, GhostConfigError, Selection
from ghost.coverage import coverage, coverage_lines, refuse_gaps
from tests.ghost import reference
from tests.ghost.models import mlp, table, tiny_gpt2, tokens
from tests.ghost.reference import causal_loss, class_loss


def report(model: nn.Module, **selection: Any) -> dict[str, Any]:
    V = tokens(3, 9)
    return coverage(model, GhostConfig(selection=Selection(**selection)), causal_loss(model, V, V))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_everything_is_scored_by_default(tied: bool) -> None:
    model = tiny_gpt2(tied=tied)
    found = report(model)
    total = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == found["scored_parameters"] == total
    assert found["scored_parameter_share"] == 1
    assert found["scored_val_grad_share"] == pytest.approx(1)
    assert found["unscored_parameters"] == []
    assert sum(row["parameters"] for row in found["layers"]) == total
    assert sum(row["val_grad_share"] for row in found["layers"]) == pytest.approx(1)
    head = found["layers"][-1]
    assert (head["name"], head["type"], head["family"]) == ("lm_head", "Linear", "head")
    assert (head["parameters"] == 0) == tied
    assert (head["shared_parameters"] > 0) == tied
    assert all(p.grad is None for p in model.parameters())


def test_a_selections_share() -> None:
    model, V = tiny_gpt2(), tokens(3, 9)
    config = GhostConfig(selection=Selection(families=("mlp",)))
    found: dict[str, Any] = coverage(model, config, causal_loss(model, V, V))
    grad = reference.gradient(model, causal_loss(model, V, V))
    square = {name: float(g.square().sum()) for name, g in grad.items()}
    chosen = [name for name in square if ".mlp." in name]
    share = sum(square[name] for name in chosen) / sum(square.values())
    assert found["scored_val_grad_share"] == pytest.approx(share, rel=1e-10)
    assert found["scored_parameters"] == sum(grad[name].numel() for name in chosen)
    assert {row["name"] for row in found["layers"] if row["scored"]} == {
        name.rpartition(".")[0] for name in chosen
    }


def test_frozen_parameters_are_not_counted() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    found: dict[str, Any] = coverage(model, GhostConfig(), class_loss(model, *table(3)))
    assert found["parameters"] == sum(p.numel() for p in model[2].parameters())
    assert [row["name"] for row in found["layers"]] == ["2"]


def test_a_loss_without_gradient_has_no_shares_to_divide() -> None:
    model = mlp()
    found = coverage(model, GhostConfig(), class_loss(model, *table(3)) * 0)
    assert found["scored_val_grad_share"] == 0


def test_families_add_up_to_the_whole() -> None:
    found = report(tiny_gpt2(tied=False), exclude=("*.mlp.*", "transformer.wpe"))
    families = found["families"]
    assert set(families) == {"attn", "mlp", "embed", "norm", "head"}
    for whole, part in (
        (1.0, "parameter_share"), (1.0, "val_grad_share"),
        (found["scored_parameter_share"], "scored_parameter_share"),
        (found["scored_val_grad_share"], "scored_val_grad_share"),
    ):  # fmt: skip
        assert sum(shares[part] for shares in families.values()) == pytest.approx(whole)
    assert families["mlp"]["scored_parameter_share"] == families["mlp"]["scored_val_grad_share"] == 0
    assert families["attn"]["scored_val_grad_share"] == families["attn"]["val_grad_share"] > 0


def test_gaps_put_the_blocks_together_and_make_up_the_rest() -> None:
    found = report(tiny_gpt2(tied=False), exclude=("*.mlp.*", "transformer.wpe"))
    gaps = found["gaps"]
    assert {gap["name"]: gap["layers"] for gap in gaps} == {
        "transformer.h.*.mlp.c_fc": 2, "transformer.h.*.mlp.c_proj": 2, "transformer.wpe": 1
    }  # fmt: skip
    assert [gap["parameter_share"] for gap in gaps] == sorted(
        (gap["parameter_share"] for gap in gaps), reverse=True
    )
    for share in ("parameter_share", "val_grad_share"):
        missing = 1 - found[f"scored_{share}"]
        assert sum(gap[share] for gap in gaps) == pytest.approx(missing, rel=1e-9)


def test_a_tied_table_left_out_is_a_gap_without_parameters() -> None:
    found = report(tiny_gpt2(), exclude=("transformer.wte",))
    assert found["scored_parameter_share"] == 1
    (gap,) = found["gaps"]
    assert (gap["name"], gap["parameter_share"], gap["val_grad_share"]) == ("transformer.wte", 0, 0)


def test_the_log_names_families_and_gaps() -> None:
    lines = list(coverage_lines(report(tiny_gpt2(), families=("mlp", "attn"))))
    assert lines[0].startswith("Scoring ")
    (mlp_line,) = [line for line in lines if line.startswith("Family mlp: ")]
    assert mlp_line.count(" %") == 4
    gaps = [line for line in lines if line.startswith("Not scored: ")]
    assert len(gaps) == 6  # wte, wpe, ln_1, ln_2, ln_f, lm_head
    assert any(line.startswith("Not scored: transformer.h.*.ln_1 in 2 layers (") for line in gaps)
    assert not [line for line in coverage_lines(report(tiny_gpt2())) if line.startswith("Not scored")]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_strict_lets_a_fully_scored_model_pass(tied: bool) -> None:
    refuse_gaps(tiny_gpt2(tied=tied), GhostConfig())
    frozen = nn.Sequential(mlp(), nn.PReLU().requires_grad_(False))
    refuse_gaps(frozen, GhostConfig())


def test_strict_names_what_is_left_out_and_its_share() -> None:
    selection, with_prelu = Selection(exclude=("*.c_fc",)), nn.Sequential(mlp(bias=False), nn.PReLU())
    with pytest.raises(
        GhostConfigError, match=r"transformer\.h\.\*\.mlp\.c_fc \(\d+\.\d % of the parameters\)"
    ):
        refuse_gaps(tiny_gpt2(), GhostConfig(selection=selection))
    with pytest.raises(GhostConfigError, match=r"strict=True, but 1 \(1\.6 % of the parameters\) would not"):
        refuse_gaps(with_prelu, GhostConfig(selection=Selection(exclude=("1",))))
    with pytest.raises(GhostConfigError, match=r"transformer\.wte \(0\.0 %"):
        refuse_gaps(tiny_gpt2(), GhostConfig(selection=Selection(exclude=("transformer.wte",))))


def test_heads_are_counted_by_their_slices() -> None:
    model, V = tiny_gpt2(tied=False), tokens(3, 9)
    config = GhostConfig(selection=Selection(include=("h.1.attn.head[0]",)))
    found = coverage(model, config, causal_loss(model, V, V))
    # Head 0 of 2 has half of q, k and v with their biases, and half of the output's matrix.
    assert found["scored_parameters"] == (16 * 48 + 48) // 2 + 16 * 16 // 2
    grad = reference.gradient(model, causal_loss(model, V, V))
    name = "transformer.h.1.attn.c_proj.weight"
    assert found["scored_val_grad_share"] > float(
        grad[name][:8].square().sum() / sum(g.square().sum() for g in grad.values())
    )
    assert sum(gap["parameter_share"] for gap in found["gaps"]) == pytest.approx(
        1 - found["scored_parameter_share"]
    )
    with pytest.raises(GhostConfigError, match=r"strict=True"):
        refuse_gaps(model, config)
