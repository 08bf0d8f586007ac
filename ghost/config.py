"""Settings of the manager, read from any mapping or object."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import Enum
from os import PathLike
from typing import Any

import torch

from ghost.algebra import CHUNK_MB
from ghost.choice import Algebra
from ghost.errors import GhostConfigError, shown
from ghost.loss import LossReduction
from ghost.policies import Policy, policy_of
from ghost.preconditioner import Credit, Preconditioner
from ghost.projection import ProjectionKind
from ghost.selection import Selection

log = logging.getLogger(__name__)

ALIKE = 0.85
"""The share of common letters from which on a name is taken for a misspelt one."""


class ValMode(Enum):
    """How the validation gradient comes in: in the same pass (`CONCAT`), or by a backward of its own
    (`SEPARATE`).
    """

    CONCAT = "concat"
    SEPARATE = "separate"


class ValGradDevice(Enum):
    """Where the validation gradient of `SEPARATE` is kept: with the model, or in the CPU's memory."""

    MODEL = "model"
    CPU = "cpu"


class Resolution(Enum):
    """What the stored scores tell apart; whatever it is, they add up to the total."""

    TOTAL = "total"
    LAYER = "layer"
    FAMILY = "family"
    HEAD = "head"


_ALIASES = {"dot_prod_save_interval": "save_interval", "method": "engine"}
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


_WORDS = {
    "proj_dtype": {
        "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
        "bfloat16": "bfloat16", "bf16": "bfloat16", "int8": "int8",
    },
    "proj_format": {"npy": "npy", "pt": "pt"},
}  # fmt: skip
"""What settings that are words can be, and what each way to write one stands for."""


@dataclass(frozen=True)
class GhostConfig:
    """What the manager and its engine read.

    Attributes:
        engine: A registered engine's name. GhostSuite's `method` names are accepted.
        val_mode: How the validation gradient comes in.
        val_batch_size: Validation rows a step (`concat`) or a micro-batch of the validation pass
            (`separate`); None for all rows.
        val_every: Steps between validation gradients (`separate`).
        val_grad_device: Where the validation gradient is kept (`separate`); from the CPU each layer's part
            comes to the model's device when the layer's backward needs it.
        order: 1 for scores alone; 2 for the samples' curvatures as well, the second-order term of their
            values (`separate`).
        bitwise: Leave every layer's own backward alone, so that training is bit-identical to `regular`
            (`separate`).
        loss_reduction: What the model's loss is a mean of; None to infer it from a Hugging Face class.
        preconditioner: Which optimizer's step the scores are about: `NONE` takes the gradient itself, `AUTO`
            what the optimizer makes of it.
        credit: What of a gradient's effect through momentum is credited, with a preconditioner.
        policy: Which of a step's samples its gradient is of, and by what weights, once their scores are
            known: a registered policy's name, a mapping `{"name": …, **settings}`, or a `Policy`; None for
            the ordinary step, or `"none"`. A function of one's own is one, too.
        gram: Give the Gram matrix of each step's samples, `manager.gram`.
        pairwise: Score every pair of a training and a validation sample; scores are then `[B, V]`.
        resolution: What the score shards tell apart: nothing, layers, families, or attention heads.
        strict: Refuse a selection that leaves a trainable parameter unscored.
        algebra: How per-sample inner products of matrices are computed.
        chunk_mb: MiB that they hold at once, beyond their results and one validation gradient.
        selection: Which layers are scored.
        score_dtype: dtype in which scores are summed over layers; None for the model's own, but float32 at
            least.
        storage_dtype: dtype of the scores in the shards; None for `score_dtype`.
        gradient_accumulation_steps: Micro-batches a step. The user's loop divides each loss by it;
            `manager.step` does so itself.
        result_dir: Where score shards are written; None writes nothing.
        save_interval: Steps between score shards (GhostSuite: `dot_prod_save_interval`).
        weight_grads: Whether the backward fills `.grad` (gradprojlora); None: where the manager has an
            optimizer.
        proj_layers: Names of layers to project, comma-separated or as a list: parts of names, or patterns as
            in `Selection`; None for those of `selection`.
        proj_rank_total: Numbers that are kept of a parameter's gradient, about.
        proj_rank_min: Fewest rows of a projection matrix; a smaller side is kept whole.
        proj_seed: Seed of the projection matrices.
        proj_kind: How their entries are distributed.
        proj_dtype: Number format of the store: float32, float16, bfloat16, or int8 with a scale for each row.
        proj_format: File format of the store's shards, npy or pt.
        proj_save_interval: Micro-batches a shard.
        include_embeddings: Whether embedding tables, and heads that share one, are projected.
    """

    engine: str = "graddotprod"
    val_mode: ValMode = ValMode.CONCAT
    val_batch_size: int | None = None
    val_every: int = 1
    val_grad_device: ValGradDevice = ValGradDevice.MODEL
    order: int = 1
    bitwise: bool = False
    loss_reduction: LossReduction | None = None
    preconditioner: Preconditioner = Preconditioner.NONE
    credit: Credit = Credit.TRAJECTORY
    policy: Policy | None = None
    gram: bool = False
    pairwise: bool = False
    resolution: Resolution = Resolution.TOTAL
    strict: bool = False
    algebra: Algebra = Algebra.AUTO
    chunk_mb: int = CHUNK_MB
    selection: Selection = field(default_factory=Selection)
    score_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype | None = None
    gradient_accumulation_steps: int = 1
    result_dir: str | None = None
    save_interval: int = 100
    weight_grads: bool | None = None
    proj_layers: tuple[str, ...] | None = None
    proj_rank_total: int = 256
    proj_rank_min: int = 4
    proj_seed: int = 0
    proj_kind: ProjectionKind = ProjectionKind.RADEMACHER
    proj_dtype: str = "float32"
    proj_format: str = "npy"
    proj_save_interval: int = 64
    include_embeddings: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is not None:
                raise GhostConfigError(f"{f.name}=None should be a value: leave it out for the default.")
            object.__setattr__(self, f.name, None if value is None else convert(f.name, value))
        self._check_types()
        if self.bitwise and self.val_mode is not ValMode.SEPARATE:
            raise GhostConfigError(
                "bitwise=True needs val_mode='separate': a joint batch changes the rounding of training."
            )
        if self.bitwise and self.algebra not in (Algebra.AUTO, Algebra.TARGET):
            raise GhostConfigError(
                f"algebra={self.algebra.value!r} has no effect with bitwise=True: leave it at 'auto'."
            )
        if self.preconditioner is not Preconditioner.NONE:
            self._check_preconditioner(self.preconditioner.value)
        elif self.credit is not Credit.TRAJECTORY:
            raise GhostConfigError(
                f"credit={self.credit.value!r} has no effect with preconditioner='none': leave it out."
            )
        if self.defers:
            self._check_deferred()
        if self.val_mode is ValMode.SEPARATE and self.algebra is Algebra.TOKEN_TOKEN:
            raise GhostConfigError("algebra='token_token' needs the validation rows of val_mode='concat'.")
        if self.order == 2 and self.val_mode is not ValMode.SEPARATE:
            raise GhostConfigError(
                "order=2 needs val_mode='separate': a joint pass has no graph of the validation loss alone."
            )
        if self.order == 2 and self.val_every != 1:
            raise GhostConfigError(
                f"val_every={self.val_every} saves nothing with order=2, which differentiates the validation "
                "loss at every step: leave it at 1."
            )
        if self.val_every != 1 and self.val_mode is not ValMode.SEPARATE:
            raise GhostConfigError(
                f"val_every={self.val_every} needs val_mode='separate'; with 'concat' it is 1."
            )
        if self.val_grad_device is not ValGradDevice.MODEL and self.val_mode is not ValMode.SEPARATE:
            raise GhostConfigError(
                f"val_grad_device={self.val_grad_device.value!r} needs val_mode='separate'; with 'concat' no "
                "validation gradient is kept."
            )
        if self.score_dtype not in (None, torch.float32, torch.float64):
            raise GhostConfigError(
                f"score_dtype={self.score_dtype} should be float32 or float64: sums need the digits."
            )
        if self.proj_rank_min**2 > self.proj_rank_total:
            raise GhostConfigError(
                f"proj_rank_min={self.proj_rank_min} needs proj_rank_total to be its square, "
                f"{self.proj_rank_min**2}, or more, but that is {self.proj_rank_total}."
            )

    def _check_preconditioner(self, name: str) -> None:
        if self.order == 2:
            raise GhostConfigError(f"order=2 is of an SGD step: set preconditioner={name!r} to 'none'.")
        if self.bitwise:
            raise GhostConfigError(
                f"preconditioner={name!r} takes the layers' backward into its own hands: set bitwise=False."
            )

    @property
    def defers(self) -> bool:
        """Whether the parameters' gradients wait for the end of the step, with the samples' factors kept."""
        return self.policy is not None or self.gram

    @property
    def deferred_by(self) -> str:
        """The setting for which they wait, as errors name it."""
        return "gram=True" if self.policy is None else f"policy={self.policy.name!r}"

    def _check_deferred(self) -> None:
        what = self.deferred_by
        if self.bitwise:
            raise GhostConfigError(
                f"{what} takes the layers' backward into its own hands: set bitwise=False."
            )
        if self.preconditioner is not Preconditioner.NONE:
            raise GhostConfigError(
                f"preconditioner={self.preconditioner.value!r} scores the optimizer's step on the whole "
                f"batch, which is not known where {what} decides: set it to 'none'."
            )
        if self.algebra is Algebra.FUSED:
            raise GhostConfigError(
                f"algebra='fused' has no effect with {what}, where no gradient is formed before the samples' "
                "weights are known: leave it at 'auto'."
            )

    def _check_types(self) -> None:
        for name in (
            *("val_batch_size", "val_every", "gradient_accumulation_steps", "save_interval", "chunk_mb"),
            *("proj_rank_total", "proj_rank_min", "proj_save_interval"),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise GhostConfigError(f"{name}={value!r} should be a whole number of at least 1.")
        if type(self.order) is not int or self.order not in (1, 2):
            raise GhostConfigError(f"order={shown(self.order)} should be 1 or 2.")
        if type(self.proj_seed) is not int:
            raise GhostConfigError(f"proj_seed={shown(self.proj_seed)} should be a whole number.")
        for name in ("bitwise", "gram", "pairwise", "strict", "include_embeddings", "weight_grads"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "weight_grads" and value is None):
                raise GhostConfigError(f"{name}={shown(value)} should be true or false.")
        if self.result_dir is not None and not isinstance(self.result_dir, str | PathLike):
            raise GhostConfigError(f"result_dir={shown(self.result_dir)} should be the path of a folder.")
        if self.result_dir == "":
            raise GhostConfigError(
                "result_dir is empty: give the path of a folder, or None to write nothing."
            )
        if not isinstance(self.selection, Selection):
            raise GhostConfigError(f"selection={self.selection!r} should be a ghost.Selection.")
        if self.storage_dtype is not None and not self.storage_dtype.is_floating_point:
            raise GhostConfigError(f"storage_dtype={self.storage_dtype} should be a floating-point dtype.")

    @classmethod
    def read(cls, config: Any) -> "GhostConfig":
        """Settings from a mapping or an object with attributes; names that mean nothing here are left alone,
        and a warning names those that look like a setting's.

        Raises:
            GhostConfigError: A setting that is known here has a value that cannot work.
        """
        if isinstance(config, cls):
            return config
        if config is None or isinstance(config, str | bytes | int | float | list | tuple):
            raise GhostConfigError(
                f"config={shown(config)} should be a mapping of settings, or an object that has them."
            )
        given = dict(config) if isinstance(config, Mapping) else _attributes(config)
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in given.items():
            name = _ALIASES.get(key, key)
            for meant in () if name in known else get_close_matches(str(name), known, n=1, cutoff=ALIKE):
                log.warning("config: %r is no setting and has no effect; %r is one.", key, meant)
            if name in known and value is not None:
                converted = convert(name, value)
                if name in values and repr(values[name]) != repr(converted):  # tensors have no one equality
                    raise GhostConfigError(
                        f"{key}={value!r} contradicts {name}={values[name]!r}: give one of them."
                    )
                values[name] = converted
        return cls(**values)


def _attributes(config: Any) -> dict[str, Any]:
    """Public attributes of a settings object, class defaults included; its methods are no settings, and of
    what else can be called those alone are that a setting is named after.
    """
    known = {f.name for f in fields(GhostConfig)}
    found = {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if not callable(value) or (_ALIASES.get(name, name) in known and not _is_method_of(config, value))
    }


def _is_method_of(config: Any, value: Any) -> bool:
    return inspect.ismethod(value) and (value.__self__ is config or value.__self__ is type(config))


def convert(name: str, value: Any) -> Any:
    """A setting's value in its own type; `GhostConfigError` where it has none."""
    enums: dict[str, type[Enum]] = {
        "val_mode": ValMode, "loss_reduction": LossReduction, "algebra": Algebra, "resolution": Resolution,
        "proj_kind": ProjectionKind, "preconditioner": Preconditioner, "credit": Credit,
        "val_grad_device": ValGradDevice,
    }  # fmt: skip
    if name in enums:
        raw = value.value if isinstance(value, Enum) else value
        if name == "loss_reduction" and raw == "auto":
            return None
        choices = [member.value for member in enums[name]]
        if raw not in choices:
            raise GhostConfigError(f"{name}={raw!r} should be one of {', '.join(choices)}.")
        return enums[name](raw)
    if name == "engine":
        return str(value).lower().replace("_", "")
    if name == "policy":
        return policy_of(value)
    if name == "proj_layers":
        return _patterns(value)
    if name in _WORDS:
        word = _WORDS[name].get(str(value).removeprefix("torch."))
        if word is None:
            raise GhostConfigError(
                f"{name}={value!r} should be one of {', '.join(sorted(set(_WORDS[name].values())))}."
            )
        return word
    if name.endswith("_dtype") and not isinstance(value, torch.dtype):
        if str(value) not in _DTYPES:
            raise GhostConfigError(f"{name}={value!r} should be one of {', '.join(_DTYPES)}.")
        return _DTYPES[str(value)]
    return value


def _patterns(value: Any) -> tuple[str, ...] | None:
    """Patterns of layers given as one comma-separated text or as a list; None for none."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise GhostConfigError(f"proj_layers={shown(value)} should be names of layers, comma-separated.")
    return tuple(part.strip() for part in parts if part.strip()) or None
