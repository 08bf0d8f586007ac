"""A run's largest step on tensors that have shapes and no memory, counted as it goes.

It is the run's own code that is rehearsed: model, manager, loss and optimizer as the config builds them, so
that the count knows every mode, number format and layer that a run knows.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ghost import GhostConfig, GhostEngineManager, GradProjLoRAEngine
from ghost.batch import Inputs
from ghost.config import ValMode
from ghost.engines.graddotprod import GradDotProdEngine
from ghost.gram import exact_gram
from ghost.items import Items
from ghost.memory import release_scratch
from ghost.nesting import leaves
from runners.losses import build_task
from runners.memory.rows import empty_rows
from runners.memory.tally import Tally
from runners.models import build_on_meta, parameter_dtype, place
from runners.models.hf_config import DataFacts
from runners.optim import build_optimizer
from runners.wrapping import checkpoint_activations

WEIGHTS, OPTIMIZER, TARGETS = "weights", "optimizer", "validation gradients"
ACTIVATIONS, LOGITS, GRADIENTS, BACKWARD = "activations", "logits and loss", "gradients", "backward"
BATCH, VAL_ROWS, PROJECTIONS = "batches", "validation rows", "projection matrices and rows"

_FEW = 3  # columns of a pairwise separate pass that are rehearsed; the others are as large


class Rehearsal:
    """A run's parts on its device, without memory.

    Args:
        cfg: The config.
        config: The engine's settings that the run makes of it.
        facts: What the data tells the model.
        val_rows: Validation rows by the set that they are in.
        device: Where the run computes.

    Attributes:
        model: The model.

    Raises:
        ConfigError, GhostError: As the run itself.
    """

    def __init__(
        self, cfg: DictConfig, config: GhostConfig, facts: DataFacts, val_rows: Mapping[str, int],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.cfg, self.facts, self._device = cfg, facts, device
        self.config, self.val_rows = replace(config, result_dir=None), val_rows
        if config.defers:  # no policy can decide on scores without memory; at most it keeps the whole batch
            self.config = replace(self.config, policy=None, gram=True)
        self.task = build_task(cfg, device)
        self.model = _without_memory(build_on_meta(cfg.model, facts), parameter_dtype(cfg.dtype), device)
        self._tally = Tally(device, BATCH)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._tally.note(tensor, WEIGHTS)

    def peak(self) -> Counter[str]:
        """Bytes by what they hold when most is held."""
        with torch.random.fork_rng(self.task.cuda_devices()), _unsaid(), _own_scratch(), self._tally:
            if self.cfg.trainer.eval_only:
                self._evaluate()
                further: Counter[str] = Counter()
            elif self.config.engine == GradProjLoRAEngine.name:
                further = self._project()
            else:
                further = self._train()
        return Counter(self._tally.peak) + further

    @property
    def in_small_blocks(self) -> int:
        """Bytes of the peak in blocks that a process does not give back to the system one by one."""
        return self._tally.small

    def _train(self) -> Counter[str]:
        """A step in which the optimizer has its state already; returns what is held beside all the time."""
        if self.cfg.trainer.activation_checkpointing:
            checkpoint_activations(self.model, self.cfg.model.name)
        optimizer = self._optimizer()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
            for parameter in trained if not self.config.defers
        ]  # fmt: skip
        manager = GhostEngineManager(
            self.config, self.model, optimizer, ddp_info={"ddp": False}, val_data=self._val_data(),
            loss_fn=self.task.mean,
        )  # fmt: skip
        # What a third micro-batch adds to is held since the first.
        parts = min(2, self.cfg.trainer.gradient_accumulation_steps)
        for number in range(1, parts + 1):
            self._micro_batch(manager, last=number == parts)
        if self.config.defers:  # no gradient before the step's end
            for parameter in trained:
                self._note_gradient(parameter)
        further = self._unrehearsed(manager)
        with self._tally.labelled(OPTIMIZER):
            optimizer.step()
        self._evaluate()  # gradients are held until the next step
        manager.cleanup()
        for hook in hooks:
            hook.remove()
        return further

    def _micro_batch(self, manager: GhostEngineManager, last: bool) -> None:
        X, Y = self._rows(self.cfg.trainer.batch_size)
        with self._tally.labelled(TARGETS):  # a separate pass comes before the forward
            step = manager.step(X, Y, batch_idx=range(len(Y)), iteration=0, share=1.0, last=last)
            with step as scored:
                loss = self._forward(scored.X, scored.Y)
                self._tally.label = BACKWARD
                scored.backward(loss)

    def _forward(self, X: Inputs, Y: Tensor) -> Tensor:
        """The loss of a pass over the rows."""
        with self._labelled_forward():
            return self.task.mean(self.model, X, Y)

    @contextmanager
    def _labelled_forward(self) -> Iterator[None]:
        """The model's forward keeps activations, and all that comes behind it is the logits'."""

        def behind(module: nn.Module, args: Any, output: Any) -> None:
            logits = output if isinstance(output, Tensor) else output.logits
            self._tally.note(logits, LOGITS)
            self._tally.label = LOGITS

        hook = self.model.register_forward_hook(behind)
        try:
            with self._tally.labelled(ACTIVATIONS):
                yield
        finally:
            hook.remove()

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._tally.note(parameter.grad, GRADIENTS)

    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer with the state that its first step makes."""
        optimizer = build_optimizer(self.cfg.optimizer, self.model)
        with self._tally.labelled(OPTIMIZER):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return optimizer

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        held_out = max(sum(self.val_rows.values()), self.cfg.data.test_samples)
        self._forward(*self._rows(min(self.cfg.trainer.eval_batch_size, held_out)))

    def _project(self) -> Counter[str]:
        """A batch of a projection pass; returns the rows that wait for a shard to be written."""
        self.model.eval()
        with self._tally.labelled(PROJECTIONS):
            engine = GradProjLoRAEngine(self.model, self.config)
        X, Y = self._rows(self.cfg.trainer.batch_size)
        with engine.attached(), self._tally.labelled(BACKWARD), self._labelled_forward():
            rows = engine.project(X, Y, self.task.mean)
        del X, Y
        self._measure_distortion(engine)
        return Counter({PROJECTIONS: self.cfg.engine.save_every * rows.nbytes})

    def _measure_distortion(self, engine: GradProjLoRAEngine) -> None:
        """Two blocks of the pass over pairs of samples that ends a projection run."""
        samples = self.cfg.engine.distortion_samples
        if samples:
            block = min(self.cfg.trainer.batch_size, samples)
            with self._tally.labelled(BACKWARD):
                exact_gram(
                    self.model, self.config, *self._rows(min(samples, 2 * block)), self.task.mean,
                    parameters=engine.layout.parameters, block=block,
                )  # fmt: skip

    def _rows(self, rows: int) -> tuple[Inputs, Tensor]:
        return self.task.place(*empty_rows(self.cfg, self.facts, rows))

    def _val_data(self) -> dict[str, tuple[Inputs, Tensor]] | tuple[Inputs, Tensor]:
        """As many validation rows as a step, or a pass and one of its micro-batches more, works on."""
        sets = {name: self._rows(self._rehearsed(rows)) for name, rows in self.val_rows.items()}
        return sets.get("", sets)

    def _rehearsed(self, rows: int) -> int:
        """How many of a set's validation rows are rehearsed."""
        batch = self.config.val_batch_size or rows
        if self.config.val_mode is ValMode.CONCAT:
            return min(rows, batch)
        return min(rows, _FEW) if self.config.pairwise else min(rows, 2 * batch)

    def _unrehearsed(self, manager: GhostEngineManager) -> Counter[str]:
        """Bytes of the validation rows, and of columns, that the rehearsal goes without."""
        rows = sum(self.val_rows.values())
        one = self._rows(1)
        found = Counter({VAL_ROWS: rows * sum(_bytes(leaf) for _, leaf in leaves(one))})
        engine = manager.engine
        if isinstance(engine, GradDotProdEngine) and self.config.val_mode is ValMode.SEPARATE:
            columns = rows - self._rehearsed(rows) if self.config.pairwise else 0
            if self.config.val_every > 1:  # a step that fails goes back to what was before it
                columns += rows if self.config.pairwise else len(self.val_rows)
            found[TARGETS] = columns * self._target_bytes(engine)
        return found

    def _target_bytes(self, engine: GradDotProdEngine) -> int:
        """Bytes of the device in one column's validation gradient; tied parameters have one tensor."""
        targets = {id(target): target for target in engine.state.targets.values()}.values()
        return sum(target[0].nbytes for target in targets if target.device.type == self._device.type)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Within the block the library says nothing: the run itself will."""
    library = logging.getLogger("ghost")
    level = library.level
    library.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        library.setLevel(level)


@contextmanager
def _own_scratch() -> Iterator[None]:
    """What the library keeps between steps is the rehearsal's own, and goes with it."""
    release_scratch()
    try:
        yield
    finally:
        release_scratch()


def _bytes(leaf: Any) -> int:
    values = leaf.values if isinstance(leaf, Items) else leaf
    return values.nbytes if isinstance(values, Tensor) else 0


def _without_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model on the meta device as one that computes on `device`, as far as shapes go; ties stay ties."""
    place(model, torch.device("meta"), dtype)
    model.train()
    made: dict[int, Any] = {}  # by the `id` of what they stand for
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty_like(old, device=device)
                        made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
                    module._parameters[name] = made[id(old)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # as the run has it
    return model
