"""What is said where memory runs out: which keys to lower, by what the run's estimate holds most of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

from omegaconf import DictConfig, OmegaConf

from conf.errors import UserError
from ghost.memory import is_out_of_memory
from runners.memory.estimate import MemoryEstimate
from runners.memory.rehearsal import (
    ACTIVATIONS,
    BACKWARD,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    PROJECTIONS,
    TARGETS,
    WEIGHTS,
)

_PASS = (ACTIVATIONS, LOGITS, BACKWARD)
_SHOWN = 6  # keys in a sentence
_WORTH = 0.03  # of the estimate: what holds less is not worth a key
_FEW_MB = 8  # of `engine.chunk_mb`: less would take calls and free next to nothing


class MemoryExhaustedError(UserError):
    """The run needs more memory than there is."""


@dataclass(frozen=True)
class Advice:
    """A key that bounds memory.

    Attributes:
        text: What to do with it.
        terms: What of the estimate it bounds.
        most: Bytes that it can free at most.
    """

    text: str
    terms: tuple[str, ...]
    most: float = inf


@contextmanager
def memory_errors_named(cfg: DictConfig, estimate: MemoryEstimate | None) -> Iterator[None]:
    """Raises `MemoryExhaustedError`, one sentence, in place of what PyTorch or Python raise for want of
    memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhaustedError(sentence(cfg, estimate)) from error


def sentence(cfg: DictConfig, estimate: MemoryEstimate | None) -> str:
    """What has happened, what the memory is for, and what to type."""
    needs = "" if estimate is None else f" (the run was estimated to take {estimate})"
    return f"memory has run out{needs}: {', or '.join(_ranked(cfg, estimate))}"


def _ranked(cfg: DictConfig, estimate: MemoryEstimate | None) -> list[str]:
    """What would help, the most first; without an estimate in the order of the list."""
    found = list(_advice(cfg, estimate is not None and estimate.on_device))
    if estimate is not None:
        held = {
            advice: min(advice.most, sum(estimate.terms.get(term, 0) for term in advice.terms))
            for advice in found
        }
        worth = [advice for advice in found if held[advice] >= _WORTH * estimate.total]
        found = sorted(worth, key=held.__getitem__, reverse=True)
    return [advice.text for advice in found[:_SHOWN]] or ["take a smaller model or a larger machine"]


def _advice(cfg: DictConfig, on_device: bool) -> Iterator[Advice]:
    """The keys that could be lowered in this config, on a GPU or not."""
    trainer, projects = cfg.trainer, cfg.engine.name == "gradprojlora"
    if OmegaConf.select(cfg, "data.seq_len") is not None:
        yield Advice(f"lower data.seq_len={cfg.data.seq_len}", _PASS)
    if trainer.eval_only or (trainer.eval_batch_size > trainer.batch_size and not projects):
        yield Advice(f"lower trainer.eval_batch_size={trainer.eval_batch_size}", (LOGITS,))
    if trainer.eval_only:
        return
    if trainer.batch_size > 1:
        same = "" if projects else " and raise trainer.gradient_accumulation_steps as much"
        yield Advice(f"lower trainer.batch_size={trainer.batch_size}{same}", _PASS)
    if projects:
        yield Advice(f"lower engine.save_every={cfg.engine.save_every}", (PROJECTIONS,))
        yield Advice(f"lower engine.rank_total={cfg.engine.rank_total}", (PROJECTIONS,))
        return
    if cfg.engine.name != "regular":
        yield from _scoring(cfg, on_device)
    yield from _training(cfg)


def _scoring(cfg: DictConfig, on_device: bool) -> Iterator[Advice]:
    engine = cfg.engine
    if engine.val_batch_size > 1:
        yield Advice(f"lower engine.val_batch_size={engine.val_batch_size}", _PASS)
    if engine.order == 2:
        yield Advice("type engine.order=1", (ACTIVATIONS, BACKWARD))
    if cfg.policy.name != "none":
        yield Advice("type policy=none", (ACTIVATIONS, BACKWARD))
    if engine.chunk_mb > _FEW_MB:
        yield Advice(f"lower engine.chunk_mb={engine.chunk_mb}", (BACKWARD,), engine.chunk_mb << 20)
    if engine.val_mode == "concat":
        return
    if engine.pairwise:
        yield Advice("type engine.pairwise=false", (TARGETS,))
    if engine.val_sets != "one":
        yield Advice("type engine.val_sets=one", (TARGETS,))
    if engine.val_grad_device == "model" and on_device and cfg.hardware.strategy != "fsdp":
        yield Advice("type engine.val_grad_device=cpu", (TARGETS,))
    needs_own_pass = engine.order == 2 or engine.bitwise or engine.val_every > 1
    if not needs_own_pass and engine.val_grad_device == "model":
        yield Advice("type engine.val_mode=concat", (TARGETS,))


def _training(cfg: DictConfig) -> Iterator[Advice]:
    if (
        cfg.model.kind == "hf"
        and not cfg.trainer.activation_checkpointing
        and cfg.model.architecture != "resnet"
    ):
        yield Advice("type trainer.activation_checkpointing=true", (ACTIVATIONS,))
    if cfg.dtype.autocast is None and cfg.dtype.model in ("float32", "float64"):
        yield Advice("type dtype=bf16_mixed", (ACTIVATIONS,))
    scores_adam = OmegaConf.select(cfg, "engine.preconditioner") == "adam"
    if cfg.optimizer.name in ("adam", "adamw") and not scores_adam:
        yield Advice("type optimizer=sgd", (OPTIMIZER,))
    needs_whole = OmegaConf.select(cfg, "engine.order") == 2 or cfg.policy.name != "none"
    if cfg.hardware.strategy == "ddp" and not needs_whole:
        yield Advice("type hardware.strategy=fsdp", (WEIGHTS, OPTIMIZER, GRADIENTS))
    yield Advice("take a smaller model", (WEIGHTS,))
