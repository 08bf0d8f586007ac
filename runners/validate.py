"""Checks across keys, before anything is built: what Hydra's types cannot say.

Each check raises `ConfigError` with one sentence: the key, its value, and what to type instead. Torch is not
imported, except by the last check: a Hugging Face model's keys are what its configuration class says.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import isfinite

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError
from conf.help_text import is_unresolved, typed
from conf.hydra_errors import suggestion
from conf.refuse import refuse as _refuse
from runners.tasks import refuse_other_task
from runners.validate_data import check_data
from runners.validate_policy import check_policy
from runners.validate_projection import check_projection, refuse_test_samples
from runners.validate_world import check_hardware

# Whole numbers and their smallest sensible value; null is allowed where the schema allows it.
SMALLEST = {
    "seed": 0,
    "data.seed": 0,
    "data.seq_len": 2,  # one token to read, one to predict
    "data.train_samples": 1,
    "data.val_samples": 1,
    "data.test_samples": 0,
    "data.num_workers": 0,
    "data.target_len": 1,
    "data.image_size": 1,
    "data.patch_size": 1,
    "data.image_token_id": 0,
    "data.vocab_size": 2,
    "engine.val_batch_size": 1,
    "policy.steps": 1,
    "engine.chunk_mb": 1,
    "engine.val_every": 1,
    "engine.rank_total": 1,
    "engine.rank_min": 1,
    "engine.seed": 0,
    "engine.save_every": 1,
    "engine.world_size": 1,
    "engine.rank": 0,
    "engine.distortion_samples": 0,
    "hardware.threads": 1,
    "hardware.processes": 1,
    "trainer.max_steps": 1,
    "trainer.batch_size": 1,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.warmup_steps": 0,
    "trainer.eval_every": 1,
    "trainer.eval_batch_size": 1,
    "trainer.flush_every": 1,
    "trainer.overhead_probes": 0,
    "trainer.checkpoint_every": 1,
    "trainer.keep_checkpoints": 1,
}

POSITIVE = ("optimizer.lr", "optimizer.eps", "trainer.clip_grad_norm")
FRACTIONS = (  # in [0, 1)
    "data.label_noise",
    "optimizer.momentum",
)


def check(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a composed config (Hydra's own node removed) that cannot run as it stands."""
    _untrained(cfg)
    ENGINES[cfg.engine.name](cfg)
    _optimizer(cfg)
    check_policy(cfg)
    if cfg.engine.name != "gradprojlora":
        _trainer(cfg)
    _verify(cfg)
    check_hardware(cfg)
    _model(cfg)


def check_untrained(cfg: DictConfig) -> None:
    """The same of a command that has neither an engine, an optimizer nor a trainer."""
    _untrained(cfg)
    refuse_test_samples(cfg)
    _model(cfg)


def _untrained(cfg: DictConfig) -> None:
    refuse_unknown_keys(cfg, prefix="")
    _keys_given(cfg)
    _choices_kept(cfg)
    _output_dir(cfg)
    check_numbers(cfg)
    check_data(cfg)
    refuse_other_task(cfg)
    _layers(cfg)
    _dtype(cfg)
    _tracking(cfg)
    _resume(cfg)


def refuse_unknown_keys(cfg: DictConfig, prefix: str) -> None:
    """Hydra lets `+key=value` past the schema; a key nobody reads would be a setting without effect."""
    schema = OmegaConf.get_type(cfg)
    if not is_dataclass(schema):
        return
    known = [item.name for item in fields(schema)]
    for name in map(str, cfg):
        if name not in known:
            hint = suggestion(name, known, prefix)
            raise ConfigError(f"{prefix}{name}: there is no such key{hint} (keys: {', '.join(known)})")
        if not is_unresolved(cfg, name) and isinstance(cfg[name], DictConfig):
            refuse_unknown_keys(cfg[name], prefix=f"{prefix}{name}.")


def _keys_given(cfg: DictConfig) -> None:
    # Hydra sets output_dir when the job starts.
    own = OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name != "output_dir"])
    try:
        missing = OmegaConf.missing_keys(own)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    if missing:
        key = min(missing)
        raise ConfigError(f"{key} has no value: type {key}=VALUE, see --help")


def _output_dir(cfg: DictConfig) -> None:
    """The key tells where Hydra has put the run; the log would not follow another value."""
    if not OmegaConf.is_interpolation(cfg, "output_dir"):
        _refuse(
            cfg,
            "output_dir",
            "does not move the run: type hydra.run.dir=PATH, or hydra.sweep.dir=PATH with -m",
        )


def check_numbers(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a number below what can work, of those keys that the config has."""
    for key, smallest in SMALLEST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value < smallest:
            _refuse(cfg, key, f"is too small: type {key}={smallest} or more")
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key)
        if value is not None and not (value > 0 and isfinite(value)):
            _refuse(cfg, key, "must be a number greater than 0")
    for key in FRACTIONS:
        value = OmegaConf.select(cfg, key)
        if value is not None and not 0 <= value < 1:
            _refuse(cfg, key, "must be at least 0 and less than 1")
    for key, value in _widths(cfg):
        if not value or min(value) < 1:
            _refuse(cfg, key, "must list one or more positive whole numbers, such as [32,64]")


def _widths(cfg: DictConfig) -> Iterator[tuple[str, ListConfig]]:
    for key in ("model.hidden", "model.channels"):
        value = OmegaConf.select(cfg, key)
        if value is not None:
            yield key, value


def _model(cfg: DictConfig) -> None:
    if cfg.model.kind == "hf":
        from runners.models.hf_config import DataFacts, check_model

        check_model(cfg.model, DataFacts(seq_len=OmegaConf.select(cfg, "data.seq_len")))


def _choices_kept(cfg: DictConfig) -> None:
    """The key that tells a group's choices apart does not change the choice: its other keys would not fit."""
    for group in ("model", "data", "engine", "optimizer", "policy"):
        if group not in cfg:
            continue
        schema = OmegaConf.get_type(cfg[group])
        for item in fields(schema) if is_dataclass(schema) else ():
            if item.metadata.get("fixed") and cfg[group][item.name] != item.default:
                value = cfg[group][item.name]
                _refuse(cfg, f"{group}.{item.name}", f"does not change the choice: type {group}={value}")


def _graddotprod(cfg: DictConfig) -> None:
    engine = cfg.engine
    if engine.val_mode == "concat":
        if engine.bitwise:
            _refuse(cfg, "engine.bitwise", "needs its own validation pass: type engine.val_mode=separate")
        if engine.val_every > 1:
            _refuse(cfg, "engine.val_every", "needs its own validation pass: type engine.val_mode=separate")
        if engine.val_grad_device != "model":
            _refuse(
                cfg, "engine.val_grad_device", "needs its own validation pass: type engine.val_mode=separate"
            )
    elif engine.algebra == "token_token":
        _refuse(
            cfg, "engine.algebra", "needs the validation rows in the same pass: type engine.val_mode=concat"
        )
    if engine.order != 1:
        _second_order(cfg)
    if engine.bitwise and engine.algebra == "fused":
        _refuse(
            cfg,
            "engine.algebra",
            "changes rounding, which engine.bitwise=true forbids: type engine.algebra=auto",
        )
    if engine.preconditioner != "none":
        _preconditioner(cfg)
    elif engine.credit != "trajectory":
        _refuse(
            cfg,
            "engine.credit",
            "has no effect with engine.preconditioner=none: type engine.credit=trajectory",
        )
    if engine.pairwise and engine.val_sets != "one":
        _refuse(cfg, "engine.val_sets", "has no columns with engine.pairwise=true: type engine.val_sets=one")
    most = cfg.data.val_samples - cfg.data.test_samples
    if engine.val_batch_size > most:
        apart = f" less data.test_samples={cfg.data.test_samples}" if cfg.data.test_samples else ""
        total = cfg.data.val_samples
        _refuse(
            cfg, "engine.val_batch_size", f"is more than data.val_samples={total}{apart}: type {most} or less"
        )


def _preconditioner(cfg: DictConfig) -> None:
    key, adam = "engine.preconditioner", cfg.optimizer.name in ("adam", "adamw")
    if cfg.engine.preconditioner == "adam" and not adam:
        _refuse(cfg, key, f"is not optimizer={cfg.optimizer.name}'s: type engine.preconditioner=auto")
    if cfg.engine.order == 2:
        _refuse(cfg, "engine.order", f"is of an SGD step: type engine.order=1, or {key}=none")
    if cfg.engine.bitwise:
        _refuse(cfg, key, "takes the layers' backward into its own hands: type engine.bitwise=false")
    if cfg.dtype.autocast == "float16":
        _refuse(cfg, key, "does not go with a loss scale: type dtype=bf16_mixed")
    if cfg.hardware.strategy != "none":
        _refuse(cfg, key, "needs the whole gradient in one process: type hardware.strategy=none")
    if adam and cfg.engine.algebra != "auto":
        _refuse(cfg, "engine.algebra", f"has no effect with {key}={cfg.engine.preconditioner}: type auto")
    if cfg.verify:
        _refuse(cfg, "verify", f"checks plain inner products: type {key}=none")


def _second_order(cfg: DictConfig) -> None:
    engine = cfg.engine
    if engine.order != 2:
        _refuse(cfg, "engine.order", "is not an order that values can have: type engine.order=1, or 2")
    if engine.val_mode != "separate":
        _refuse(cfg, "engine.order", "needs its own validation pass: type engine.val_mode=separate")
    if engine.val_every > 1:
        _refuse(
            cfg,
            "engine.val_every",
            "saves nothing with engine.order=2, which differentiates the validation loss at every step: type "
            "engine.val_every=1",
        )
    if cfg.dtype.autocast == "float16":
        _refuse(
            cfg,
            "dtype.autocast",
            "is too narrow for the second derivatives of engine.order=2: type dtype=bf16_mixed, or "
            "engine.order=1",
        )
    if cfg.hardware.strategy == "fsdp":
        _refuse(
            cfg,
            "hardware.strategy",
            "splits the gradient that engine.order=2 needs whole: type hardware.strategy=ddp, or "
            "engine.order=1",
        )


def _regular(cfg: DictConfig) -> None:
    layers = cfg.layers
    if list(layers.include) != ["*"] or layers.exclude or layers.families or layers.blocks:
        raise ConfigError(
            f"layers.families={typed(layers.families)} (include={typed(layers.include)}, "
            f"exclude={typed(layers.exclude)}, blocks={typed(layers.blocks)}) has no effect with "
            "engine=regular, which scores nothing: type layers=all, or engine=graddotprod"
        )
    for key in ("preview", "report_text"):
        if cfg[key]:
            _refuse(cfg, key, f"has no effect with engine=regular, which values nothing: type {key}=false")


ENGINES = {"graddotprod": _graddotprod, "gradprojlora": check_projection, "regular": _regular}


def _layers(cfg: DictConfig) -> None:
    if not cfg.layers.include:
        _refuse(cfg, "layers.include", 'selects no layer: type layers.include=["*"] for all')
    for key in ("include", "exclude"):
        if "" in cfg.layers[key]:
            _refuse(cfg, f"layers.{key}", "holds an empty pattern: name layers, with * for any characters")


def _dtype(cfg: DictConfig) -> None:
    dtype = cfg.dtype
    if dtype.model == "float16":
        _refuse(
            cfg,
            "dtype.model",
            "cannot be trained, since gradients underflow in it and a gradient scaler refuses them: type "
            "dtype=fp16_mixed, or dtype=bf16",
        )
    if dtype.score in ("bfloat16", "float16"):
        _refuse(cfg, "dtype.score", "would drop most of a score's digits: type dtype.score=float32")
    if dtype.storage == "float16":
        _refuse(cfg, "dtype.storage", "would make scores below 6e-8 zero: type dtype.storage=bfloat16")
    if dtype.model == "float64" and dtype.score != "float64":
        _refuse(
            cfg, "dtype.score", "drops digits that dtype.model=float64 pays for: type dtype.score=float64"
        )
    if dtype.storage == "float64" and dtype.score != "float64":
        _refuse(cfg, "dtype.storage", f"has more digits than dtype.score={dtype.score}: type that or less")
    if dtype.autocast is None:
        return
    if dtype.autocast not in ("bfloat16", "float16"):
        _refuse(cfg, "dtype.autocast", "is not a reduced precision: type dtype.autocast=bfloat16, or null")
    if dtype.model != "float32":
        _refuse(
            cfg, "dtype.model", "does not go with autocast: type dtype.model=float32 or dtype.autocast=null"
        )


def _optimizer(cfg: DictConfig) -> None:
    optimizer = cfg.optimizer
    if optimizer.weight_decay < 0:
        _refuse(cfg, "optimizer.weight_decay", "must be 0 or more")
    if optimizer.name in ("adam", "adamw") and (
        len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas)
    ):
        _refuse(
            cfg,
            "optimizer.betas",
            "must be two numbers from 0 to below 1, such as [0.9,0.999]",
        )
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        _refuse(cfg, "optimizer.nesterov", "needs momentum: type optimizer.momentum=0.9")


def _trainer(cfg: DictConfig) -> None:
    trainer = cfg.trainer
    if trainer.eval_only:
        _eval_only(cfg)
        return
    if trainer.warmup_steps > trainer.max_steps:
        _refuse(
            cfg,
            "trainer.warmup_steps",
            f"is more than trainer.max_steps={trainer.max_steps}: type that or less",
        )
    if trainer.save_model and cfg.model.kind != "hf":
        _refuse(
            cfg,
            "trainer.save_model",
            f"has no use for model={cfg.model.name}, which has no model.path to load them by: type false",
        )
    if trainer.activation_checkpointing and cfg.model.kind != "hf":
        _refuse(
            cfg,
            "trainer.activation_checkpointing",
            f"is for Hugging Face's models, and model={cfg.model.name} is none: type false",
        )
    train_samples = OmegaConf.select(cfg, "data.train_samples")
    if train_samples is not None and trainer.batch_size > train_samples:
        _refuse(
            cfg, "trainer.batch_size", f"is more than data.train_samples={train_samples}: type that or less"
        )


def _eval_only(cfg: DictConfig) -> None:
    """Nothing is trained. What the training loop's own keys say has a value in every config and means nothing
    here; these keys are typed on purpose.
    """
    idle: dict[str, object] = {
        "preview": False,
        "report_text": False,
        "trainer.compile": False,
        "trainer.save_model": False,
        "trainer.activation_checkpointing": False,
        "engine.val_every": 1,
        "engine.val_grad_device": "model",
        "engine.order": 1,
        "engine.bitwise": False,
        "engine.algebra": "auto",
        "engine.chunk_mb": 64,
        "layers.include": ["*"],
        "layers.exclude": [],
        "layers.families": [],
        "layers.blocks": [],
        "engine.pairwise": False,
        "engine.preconditioner": "none",
        "engine.credit": "trajectory",
        "engine.strict": False,
        "engine.val_sets": "one",
        "engine.resolution": "total",
    }
    for key, neutral in idle.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value != neutral:
            _refuse(cfg, key, f"has no effect with trainer.eval_only=true: type {key}={typed(neutral)}")


def _verify(cfg: DictConfig) -> None:
    """Checking scores needs an engine that gives some, and a run that does nothing else."""
    if not cfg.verify:
        return
    if cfg.engine.name != "graddotprod":
        raise ConfigError(
            f"verify=true has no scores to check with engine={cfg.engine.name}: type engine=graddotprod"
        )
    for key in ("trainer.eval_only", "dry_run", "preview", "report_text"):
        if OmegaConf.select(cfg, key):
            _refuse(cfg, key, f"does not go with verify=true, which only checks scores: type {key}=false")


def _resume(cfg: DictConfig) -> None:
    """A run that goes on is a run: these do something else."""
    for key in ("dry_run", "verify"):
        if OmegaConf.select(cfg, "resume") is not None and cfg[key]:
            _refuse(cfg, key, f"does not go with resume={cfg.resume}: type {key}=false")


def _tracking(cfg: DictConfig) -> None:
    tracking = cfg.tracking
    if tracking.upload_large and not tracking.upload:
        _refuse(cfg, "tracking.upload_large", "has no effect with tracking.upload=false: type false")
    if tracking.enabled:
        return
    for key in ("uri", "run_name"):
        if tracking[key] is not None:
            _refuse(cfg, f"tracking.{key}", "has no effect with tracking.enabled=false: type tracking=mlflow")
