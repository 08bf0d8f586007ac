"""One process of a gloo group: a step of several ranks is one process's step on the whole batch.

`python -m tests.ghost.distributed_worker FILE RANK WORLD_SIZE`, the same file for all ranks. Each line that
comes in names a suite, and is written back when that has passed.
"""

import copy
import faulthandler
import gc
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ghost import (
    GhostConfigError,
    GhostEngineManager,
    GradProjLoRAEngine,
    LossReduction,
    ProtocolError,
    UnsupportedModelError,
    verify,
)
from ghost.config import GhostConfig
from ghost.coverage import coverage
from ghost.distributed import gathered
from ghost.loss import count
from ghost.values import read_shards
from tests.ghost import reference
from tests.ghost.harness import EXACT, MODES, assert_gradients, assert_near
from tests.ghost.models import tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import causal_loss

CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN
PATIENCE_SECONDS = 280
ROWS, LENGTH = 3, 9


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, **settings: Any) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def fsdp_layers(model: nn.Module) -> nn.Module:
    """Layers that are sharded on their own, and keep their whole weights after the forward."""
    for block in model.transformer.h:
        fully_shard(block.mlp.c_fc, reshard_after_forward=False)
        fully_shard(block)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head)
        fully_shard(model.transformer.wte)
    return fully_shard(model)


def fsdp_on_host(model: nn.Module) -> nn.Module:
    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


@dataclass
class Case:
    """One step of all ranks.

    Attributes:
        k: Micro-batches of each rank.
        last_rows: Rows of the last rank's last micro-batch: batches may be uneven.
    """

    mode: dict[str, Any]
    wrap: Callable[..., nn.Module]
    k: int = 1
    tied: bool = True
    checkpointed: bool = False
    last_rows: int = ROWS
    shape: dict[str, Any] = field(default_factory=dict)
    rtol: float = EXACT

    def model(self) -> Any:
        torch.manual_seed(0)
        model = tiny_gpt2(tied=self.tied, **self.shape)
        if self.checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model


def batches(case: Case, world_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, labels and sample numbers of all micro-batches of a step, with labels of uneven lengths."""
    torch.manual_seed(1)
    found, first = [], 0
    for number in range(world_size * case.k):
        rows = case.last_rows if number == world_size * case.k - 1 else ROWS
        X = tokens(rows, LENGTH)
        lengths = [LENGTH - (number + row) % 5 for row in range(rows)]
        found.append((X, with_ignored(X, lengths), torch.arange(first, first + rows)))
        first += rows
    return found


def sync_gradients(model: nn.Module, sync: bool) -> None:
    model = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync
    else:
        model.set_requires_gradient_sync(sync)  # type: ignore[operator]


def run_step(case: Case, model: nn.Module, manager: GhostEngineManager, t: int) -> None:
    """This rank's micro-batches, each with its labels' share of the whole step's."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    parts = batches(case, world_size)
    total = sum(int(count(Y, CAUSAL)) for _, Y, _ in parts)
    for m in range(case.k):
        X, Y, index = parts[m * world_size + rank]
        share = int(count(Y, CAUSAL)) / total
        last = m == case.k - 1
        with manager.step(X, Y, batch_idx=index, iteration=t, share=share, last=last) as step:
            sync_gradients(model, last)
            step.backward(causal_loss(model, step.X, step.Y))


def check(case: Case) -> None:
    """Scores, gradients, and weights and shards after two clipped steps are those of one process."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    parts = batches(case, world_size)
    whole = tuple(torch.cat([part[i] for part in parts]) for i in range(3))
    torch.manual_seed(2)
    V = tokens(4, LENGTH)
    alone, inner = case.model(), case.model()
    expected = reference.scores(alone, causal_loss, whole[:2], (V, V), CAUSAL)
    plain = reference.gradient(alone, causal_loss(alone, *whole[:2]))

    model = case.wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with tempfile.TemporaryDirectory() as out:
        config = {**case.mode, "result_dir": out, "save_interval": 1, "loss_reduction": CAUSAL}
        manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
        run_step(case, model, manager, 0)
        mine = torch.cat([part[2] for part in parts[rank::world_size]])
        assert_near(manager.scores, expected[mine], case.rtol)
        found = {name: gathered(p.grad) for name, p in inner.named_parameters()}
        assert_gradients(found, plain, case.rtol)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        run_step(case, model, manager, 1)
        optimizer.step()
        manager.cleanup()
        shards = list(read_shards(Path(out) / "scores"))
        assert len(shards) == 2
        assert torch.equal(shards[0]["sample"], mine)
        norm = torch.stack([grad.square().sum() for grad in plain.values()]).sum().sqrt()
        assert_near(shards[0]["clip"], (0.01 / (norm + 1e-6)).expand(len(mine)), case.rtol)  # torch adds 1e-6
    own_steps(alone, whole)
    for name, p in inner.named_parameters():
        torch.testing.assert_close(
            gathered(p.detach()), alone.get_parameter(name), rtol=case.rtol, atol=1e-10
        )
    assert not any("forward" in vars(module) for module in inner.modules())


def own_steps(model: nn.Module, whole: tuple[Tensor, ...]) -> None:
    """The two steps in one process, on the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for limit in (0.01, None):
        optimizer.zero_grad()
        causal_loss(model, whole[0], whole[1]).backward()
        if limit is not None:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()


def check_every_mode(wrap: Callable[..., nn.Module]) -> None:
    """Accumulation, tied and untied, activation checkpointing, uneven batches."""
    for mode in MODES.values():
        check(Case(mode, wrap))
        check(Case(mode, wrap, k=2, tied=False, last_rows=1))
        check(Case(mode, wrap, k=2, checkpointed=True))
    check(Case({"val_mode": "concat", "val_batch_size": 4, "algebra": "fused"}, wrap))


def check_compiled() -> None:
    """Compiled around the wrapper, and block by block inside of it."""

    def compiled(wrap: Callable[..., nn.Module]) -> Callable[..., Any]:
        return lambda model: torch.compile(wrap(model), backend="aot_eager")

    def compiled_blocks(model: nn.Module) -> nn.Module:
        for block in model.transformer.h:
            block.compile(backend="aot_eager")
        return fsdp(model)

    for mode in MODES.values():
        for wrap in (compiled(ddp), compiled(fsdp), compiled_blocks):
            torch._dynamo.reset()
            check(Case(mode, wrap))
    for mode in (MODES["concat"], MODES["separate"]):
        torch._dynamo.reset()
        check(Case({**mode, "policy": "all"}, compiled(ddp)))


def check_second_order() -> None:
    """Curvatures are against the whole batch's gradient, which every rank has after the backward."""
    torch.manual_seed(2)
    V = tokens(2, LENGTH)
    modes: list[dict[str, Any]] = [{}, {"bitwise": True}, {"val_batch_size": 1}]
    for mode in modes:
        case = Case({"val_mode": "separate", "order": 2, **mode}, ddp, k=2, last_rows=1)
        alone, inner = case.model(), case.model()
        parts = batches(case, distributed.get_world_size())
        X, Y, _ = (torch.cat([part[i] for part in parts]) for i in range(3))
        expected = reference.curvatures(alone, causal_loss, (X, Y), (V, V), CAUSAL)
        model = ddp(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = {**case.mode, "loss_reduction": CAUSAL}
        manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
        for t in range(2):
            optimizer.zero_grad()
            run_step(case, model, manager, t)
            mine = torch.cat([part[2] for part in parts[distributed.get_rank() :: len(parts) // case.k]])
            assert_near(manager.curvatures, expected[mine])
        manager.cleanup()


def check_policies() -> None:
    """The policy sees the samples of all ranks, and every rank's gradient is that of the batch so weighed."""
    world_size, rank = distributed.get_world_size(), distributed.get_rank()
    torch.manual_seed(2)
    V = tokens(4, LENGTH)
    for mode in (MODES["concat"], MODES["separate"], {"val_mode": "separate", "order": 2}):
        for case in (Case(mode, ddp), Case(mode, ddp, k=2, tied=False, last_rows=1, checkpointed=True)):
            alone, inner = case.model(), case.model()
            parts = batches(case, world_size)
            # Ranks come one behind the other, and of each its micro-batches.
            ordered = [part for r in range(world_size) for part in parts[r::world_size]]
            X, Y, index = (torch.cat([part[i] for part in ordered]) for i in range(3))
            scores = reference.scores(alone, causal_loss, (X, Y), (V, V), CAUSAL)
            kept = scores.argsort(descending=True)[:4]
            plain = reference.gradient(alone, causal_loss(alone, X[kept], Y[kept]))
            model = ddp(inner)
            config = {**case.mode, "loss_reduction": CAUSAL, "policy": {"name": "top_k", "k": 4}}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
            for t in range(2):
                optimizer.zero_grad()
                run_step(case, model, manager, t)
                assert_gradients({name: p.grad for name, p in inner.named_parameters()}, plain)
            whole = torch.zeros(len(index), dtype=torch.float64)
            whole[kept] = int(count(Y, CAUSAL)) / int(count(Y[kept], CAUSAL))
            sizes = [sum(len(part[2]) for part in parts[r::world_size]) for r in range(world_size)]
            assert_near(manager.weights, whole.split(sizes)[rank])
            if case.mode.get("order") == 2:
                bent = reference.hessian_product(alone, causal_loss, (V, V), plain)
                own = reference.sample_gradients(alone, causal_loss, X, Y, CAUSAL)
                curvatures = torch.stack([reference.dot(bent, g) for g in own])
                assert_near(manager.curvatures, curvatures.split(sizes)[rank])
            manager.cleanup()
            assert model.require_backward_grad_sync  # a pass of the loop's own is averaged as ever
    check_policy_in_no_sync()
    check_policy_refusals()


def check_policy_in_no_sync() -> None:
    """A loop holds the averaging back by itself, and has it again afterwards."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    case = Case(MODES["separate"], ddp, k=2)
    V = torch.arange(2 * LENGTH).view(2, LENGTH) % 7
    alone, inner = case.model(), case.model()
    parts = batches(case, world_size)
    X, Y = (torch.cat([part[i] for part in parts]) for i in range(2))
    total = int(count(Y, CAUSAL))
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {**case.mode, "loss_reduction": CAUSAL, "policy": "all"}
    manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    with pytest.raises(IndexError), manager.step(X[:2], Y[:2], batch_idx=[0, 1], iteration=0) as step:
        model(input_ids=step.X + 10**6)
    assert model.require_backward_grad_sync  # whatever becomes of the forward
    for m, held in enumerate((model.no_sync(), nullcontext())):
        own, labels, index = parts[m * world_size + rank]
        share = int(count(labels, CAUSAL)) / total
        with held, manager.step(own, labels, batch_idx=index, iteration=0, share=share, last=m == 1) as step:
            step.backward(causal_loss(model, step.X, step.Y))
    plain = reference.gradient(alone, causal_loss(alone, X, Y))
    assert_gradients({name: p.grad for name, p in inner.named_parameters()}, plain)
    manager.cleanup()
    assert model.require_backward_grad_sync


def check_policy_refusals() -> None:
    """What ranks cannot decide together."""
    case, rank = Case(MODES["separate"], ddp), distributed.get_rank()
    V = torch.arange(2 * LENGTH).view(2, LENGTH)
    config = {**case.mode, "loss_reduction": CAUSAL}
    inner = case.model()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    with pytest.raises(GhostConfigError, match="a policy needs the averaged training gradient"):
        GhostEngineManager({**config, "policy": "all"}, inner, optimizer, {"ddp": True}, (V, V), causal_loss)
    model = ddp(inner)
    with pytest.raises(GhostConfigError, match="policy='greedy' needs the inner products of all samples"):
        GhostEngineManager(
            {**config, "policy": "greedy"}, model, optimizer, val_data=(V, V), loss_fn=causal_loss
        )
    manager = GhostEngineManager(
        config, model, optimizer, val_data=(V, V), loss_fn=causal_loss,
        policy=lambda samples: torch.full((len(samples.indices),), 1.0 + rank),
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="weights on rank 1 differ from rank 0's"):
        run_step(case, model, manager, 0)
    sharded = fsdp(case.model())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    with pytest.raises(GhostConfigError, match=r"policy='all' forms .* fully_shard \(FSDP2\)"):
        GhostEngineManager(
            {**config, "policy": "all"}, sharded, optimizer, val_data=(V, V), loss_fn=causal_loss
        )


def check_protocol() -> None:
    """GhostSuite's loop, which divides losses by their number and knows no shares: ranks count alike."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(3)
    X, V = tokens(2 * 2 * world_size, LENGTH), tokens(2, LENGTH)
    for mode in MODES.values():
        case = Case(mode, ddp)
        alone, inner = case.model(), case.model()
        expected = reference.scores(alone, causal_loss, (X, X), (V, V), CAUSAL)
        wrapped = ddp(inner)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        config = {**mode, "method": "GradDotProd", "gradient_accumulation_steps": 2}
        info = {"ddp": True, "ddp_rank": rank, "ddp_world_size": world_size}
        manager = GhostEngineManager(config, inner, optimizer, info, (V, V), causal_loss)
        rows = torch.arange(len(X)).view(2, world_size, 2)[:, rank]
        for m, index in enumerate(rows):
            manager.attach_train_batch(X[index], X[index], 0, index)
            X_fwd, Y_fwd = manager.prepare_forward_input(X[index], X[index])
            sync_gradients(wrapped, m == 1)
            (causal_loss(wrapped, X_fwd, Y_fwd) / 2).backward()
        manager.prepare_gradients()
        assert_near(manager.scores, expected[rows.flatten()])
        plain = reference.gradient(alone, causal_loss(alone, X, X))
        assert_gradients({name: p.grad for name, p in inner.named_parameters()}, plain)
        manager.cleanup()


def check_shards() -> None:
    """What is FSDP2's own: layers sharded on their own, other dtypes inside, shards in the host's memory."""
    for mode in MODES.values():
        check(Case(mode, fsdp_layers, k=2, tied=False))
        check(Case(mode, fsdp_layers))
        check(Case(mode, fsdp_on_host))


def check_mixed_precision() -> None:
    """Layers that compute in float32 from float64 shards are those of a float32 model."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    for mode in MODES.values():
        check(Case(mode, lambda model: fsdp(model, mp_policy=policy), k=2, rtol=1e-5))


def check_projections() -> None:
    """Rows of the projection engine on shards are those on the whole model."""
    case = Case({}, fsdp)
    alone, model = case.model().eval(), fsdp(case.model().eval())
    torch.manual_seed(distributed.get_rank())
    X = tokens(ROWS, LENGTH)
    config = GhostConfig.read({"engine": "gradprojlora", "proj_rank_total": 16, "loss_reduction": CAUSAL})
    rows = []
    for each in (alone, model):
        engine = GradProjLoRAEngine(each, config)
        with engine.attached():
            rows.append(engine.project(X, X, causal_loss))
    assert_near(rows[1], rows[0])


def check_projections_beside_training() -> None:
    """Rows and gradients of a training step that is projected on the way are those of one process."""
    case, rank = Case({"engine": "gradprojlora"}, ddp), distributed.get_rank()
    parts = batches(case, distributed.get_world_size())
    X, Y = (torch.cat([part[i] for part in parts]) for i in range(2))
    alone, inner = case.model(), case.model()
    config = {"proj_rank_total": 16, "loss_reduction": CAUSAL, **case.mode}
    model = ddp(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    manager = GhostEngineManager(config, model, optimizer)
    run_step(case, model, manager, 0)
    engine = GradProjLoRAEngine(alone, GhostConfig.read(config))
    with engine.attached():
        expected = engine.project(X, Y, causal_loss)
    assert isinstance(manager.engine, GradProjLoRAEngine)
    assert_near(manager.engine.rows, expected[parts[rank][2]])
    plain = reference.gradient(alone, causal_loss(alone, X, Y))
    assert_gradients({name: p.grad for name, p in inner.named_parameters()}, plain)


def check_coverage_and_state() -> None:
    """Coverage of shards, and a state between steps of a validation gradient that is kept."""
    case = Case({"val_mode": "separate", "val_every": 2}, fsdp)
    V = tokens(2, LENGTH) if distributed.get_rank() < 0 else torch.arange(2 * LENGTH).view(2, LENGTH)
    alone, model = case.model(), fsdp(case.model())
    config = GhostConfig.read({"resolution": "head"})
    reports = [coverage(each, config, causal_loss(each, V, V)) for each in (alone, model)]
    for mine, theirs in zip(reports[1]["layers"], reports[0]["layers"], strict=True):
        assert mine["type"] == theirs["type"]
        assert mine["val_grad_share"] == pytest.approx(theirs["val_grad_share"], rel=1e-8)
    managers, scores = [], []
    for each in (model, copy.deepcopy(case.model())):
        wrapped = each if each is model else fsdp(each)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        state = managers[0].state_dict() if managers else None
        manager = GhostEngineManager(
            case.mode, wrapped, optimizer, val_data=(V, V), loss_fn=causal_loss, state=state
        )
        if not managers:
            run_step(case, wrapped, manager, 0)
        managers.append(manager)
    for manager in managers:
        run_step(case, manager.model, manager, 1)
        scores.append(manager.scores)
    assert torch.equal(*scores)


def check_refusals() -> None:
    """What would be silently wrong on several ranks."""
    case, rank = Case(MODES["concat"], ddp), distributed.get_rank()
    V = tokens(2, LENGTH)
    plain = case.model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(GhostConfigError, match="neither DistributedDataParallel nor"):
        GhostEngineManager(case.mode, plain, optimizer, val_data=(V, V))
    alone = GhostEngineManager(
        {"result_dir": None, **case.mode}, plain, optimizer, {"ddp": False}, (V, V), causal_loss
    )
    alone.cleanup()
    wrapped = ddp(plain)
    for each in (wrapped, fsdp(case.model())):
        with pytest.raises(GhostConfigError, match="verify the plain model in one process"):
            verify(each, case.mode, (V, V), (V, V), causal_loss)
    with pytest.raises(GhostConfigError, match="val_data of rank 1 differs"):
        GhostEngineManager(case.mode, wrapped, optimizer, val_data=(V + rank, V), loss_fn=causal_loss)
    V = torch.arange(2 * LENGTH).view(2, LENGTH)
    manager = GhostEngineManager(case.mode, wrapped, optimizer, val_data=(V, V), loss_fn=causal_loss)
    with (
        pytest.raises(ProtocolError, match="went past DistributedDataParallel"),
        manager.step(V, V, batch_idx=range(2), iteration=0) as step,
    ):
        step.backward(causal_loss(plain, step.X, step.Y))
    manager.cleanup()
    second = {"val_mode": "separate", "order": 2}
    with pytest.raises(GhostConfigError, match="does not say when a loop averages"):
        GhostEngineManager(second, plain, optimizer, {"ddp": True}, (V, V), causal_loss)
    sharded = fsdp(case.model())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    with pytest.raises(GhostConfigError, match=r"fully_shard \(FSDP2\) does not give"):
        GhostEngineManager(second, sharded, optimizer, val_data=(V, V), loss_fn=causal_loss)
    manager = GhostEngineManager(MODES["separate"], sharded, optimizer, val_data=(V, V), loss_fn=causal_loss)
    sharded.set_requires_gradient_sync(False)
    with pytest.raises(ProtocolError, match="set_requires_gradient_sync"):
        manager.attach_train_batch(V, V, 0, range(2))
    sharded.set_requires_gradient_sync(True)
    stray = StrayUse(case.model())
    fully_shard(stray)
    manager = GhostEngineManager(
        {**MODES["concat"], "loss_reduction": CAUSAL}, stray, torch.optim.SGD(stray.parameters(), lr=0.1),
        val_data=(V, V),
    )  # fmt: skip
    with (
        pytest.raises(UnsupportedModelError, match="used outside its layer"),
        manager.step(V, V, batch_idx=range(2), iteration=0) as step,
    ):
        step.backward(causal_loss(stray, step.X, step.Y))


class StrayUse(nn.Module):
    """A model that reads a layer's weight without calling the layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Any:
        outputs = self.inner(input_ids=input_ids)
        outputs.logits = outputs.logits + self.inner.transformer.ln_f.weight.sum()
        return outputs


SUITES: dict[str, Callable[[], None]] = {
    "ddp": lambda: check_every_mode(ddp),
    "fsdp": lambda: check_every_mode(fsdp),
    "shards": check_shards,
    "mixed precision": check_mixed_precision,
    "projections": check_projections,
    "projections beside training": check_projections_beside_training,
    "coverage and state": check_coverage_and_state,
    "refusals": check_refusals,
    "protocol": check_protocol,
    "second order": check_second_order,
    "policies": check_policies,
    "compiled": check_compiled,
}


def main(file: str, rank: int, world_size: int) -> None:
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)  # until all ranks are there
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    faulthandler.cancel_dump_traceback_later()
    for line in sys.stdin:
        faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
        SUITES[line.strip()]()
        gc.collect()  # of sharded models, before their group goes
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(line)
        sys.stdout.flush()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
