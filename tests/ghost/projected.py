"""Projections the plain way: a batch-size-1 backward for each sample, and a matrix from either side."""

import torch
from torch import Tensor, nn

from ghost import GhostConfig, GradProjLoRAEngine, LossReduction
from ghost.batch import row_count, take_rows
from ghost.layout import Slice
from ghost.loss import row_counts
from ghost.projection import matrix
from tests.ghost.reference import Gradient, LossFn, Rows, gradient

INPUTS_FIRST = ("Embedding", "Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
"""Modules whose matrices are `[inputs, outputs, …]`; all others' are `[outputs, inputs, …]`."""


def as_matrix(grad: Tensor, module: nn.Module) -> Tensor:
    """A parameter's gradient as `[size_out, size_in]`."""
    known = type(module).__module__.startswith("torch.nn") or type(module).__name__ in INPUTS_FIRST
    if not known:  # parameters of anyone's own module: leading ones stand for the batch
        while grad.dim() > 1 and grad.shape[0] == 1:
            grad = grad[0]
    if grad.dim() < 2:
        return grad.reshape(-1, 1)
    return grad.flatten(1).T if type(module).__name__ in INPUTS_FIRST else grad.flatten(1)


def owner(model: nn.Module, parameter: str) -> nn.Module:
    """The module that has the parameter of this name."""
    return model.get_submodule(parameter.rpartition(".")[0])


def project(grad: Tensor, part: Slice, config: GhostConfig) -> Tensor:
    """`P_out g P_inᵀ` of `g` `[size_out, size_in]`, flattened."""
    assert grad.shape == (part.size_out, part.size_in)
    kind, seed = config.proj_kind, config.proj_seed
    left = matrix(kind, seed, part.parameter, "out", part.k_out, part.size_out)
    right = matrix(kind, seed, part.parameter, "in", part.k_in, part.size_in)
    found = grad if left is None else left.to(grad.dtype) @ grad
    return (found if right is None else found @ right.to(grad.dtype).T).flatten()


def own_gradients(model: nn.Module, loss_fn: LossFn, rows: Rows, reduction: LossReduction) -> list[Gradient]:
    """The gradient of every sample's own loss; zeros where it has no counted label."""
    X, Y = rows
    counts = row_counts(Y, reduction)
    found = []
    for i in range(row_count(X, "batch")):
        one = take_rows(X, torch.tensor([i])), Y[i : i + 1]
        if counts[i] == 0:
            found.append({n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad})
        else:
            found.append(gradient(model, loss_fn(model, *one)))
    return found


def expected_rows(
    model: nn.Module, loss_fn: LossFn, rows: Rows, reduction: LossReduction, engine: GradProjLoRAEngine
) -> Tensor:
    """What `engine.project` should give, `[b, K]`."""
    return torch.stack(
        [
            torch.cat(
                [
                    project(as_matrix(grad[s.parameter], owner(model, s.parameter)), s, engine.config)
                    for s in engine.layout.slices
                ]
            )
            for grad in own_gradients(model, loss_fn, rows, reduction)
        ]
    )


def assert_projected(
    model: nn.Module, loss_fn: LossFn, rows: Rows, reduction: LossReduction, rtol: float = 1e-10,
    **settings: object,
) -> GradProjLoRAEngine:  # fmt: skip
    """A pass: rows are exact slice by slice, no weight has a gradient, and the model is as it was before."""
    given = {"engine": "gradprojlora", "loss_reduction": reduction, "proj_rank_total": 12, "proj_rank_min": 2}
    config = GhostConfig.read(given | settings)
    engine = GradProjLoRAEngine(model, config)
    engine.attach()
    found = engine.project(*rows, loss_fn)
    engine.detach()
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert {s.parameter for s in engine.layout.slices} | set(engine.left_out) == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    expected = expected_rows(model, loss_fn, rows, reduction, engine)
    assert found.shape == expected.shape == (row_count(rows[0], "batch"), engine.layout.width)
    largest = float(expected.abs().max())
    for part in engine.layout.slices:
        theirs = expected[:, part.columns].double()
        # A slice that is zero but for rounding (a key's bias in attention) is held to the whole row's.
        scale = max(float(theirs.abs().max()), 1e-5 * largest)
        torch.testing.assert_close(
            found[:, part.columns].double(), theirs, rtol=0.0, atol=rtol * scale, msg=part.parameter
        )
    return engine
