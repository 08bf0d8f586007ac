"""Checks of a projection run's config, before anything is built. Torch is not imported."""

from omegaconf import DictConfig, OmegaConf

from conf.help_text import typed
from conf.refuse import refuse

# What only a training run reads and is typed on purpose. The other keys of optimizer and trainer have a value
# in every config, and mean nothing here.
IDLE: dict[str, object] = {
    "report_text": False,
    "trainer.eval_only": False,
    "trainer.save_model": False,
    "trainer.compile": False,
    "trainer.activation_checkpointing": False,
    "trainer.gradient_accumulation_steps": 1,
}


def check_projection(cfg: DictConfig) -> None:
    """Raises `ConfigError` for `engine=gradprojlora` with keys that cannot work or would have no effect."""
    for key, neutral in IDLE.items():
        if OmegaConf.select(cfg, key) != neutral:
            refuse(
                cfg,
                key,
                f"has no effect with engine=gradprojlora, which trains nothing: type {key}={typed(neutral)}",
            )
    _ranks(cfg)
    _store(cfg)
    if cfg.dtype.autocast == "float16":
        refuse(
            cfg,
            "dtype.autocast",
            "loses small gradients in a pass without loss scaling: type dtype=bf16_mixed",
        )
    if cfg.dtype.storage == "bfloat16":
        refuse(cfg, "dtype.storage", "is for scores: type engine.storage=bfloat16 dtype.storage=float32")
    refuse_score_formats(cfg)
    refuse_test_samples(cfg)
    if cfg.engine.distortion_samples in (1, 2):
        refuse(cfg, "engine.distortion_samples", "makes too few pairs: type 3 or more, or 0 for none")


def refuse_score_formats(cfg: DictConfig) -> None:
    """Raises `ConfigError` for formats of scores that are not those of every such `dtype` choice: there are
    no scores.
    """
    usual = "float64" if cfg.dtype.model == "float64" else "float32"
    for key in ("score", "storage"):
        if cfg.dtype[key] != usual:
            refuse(
                cfg,
                f"dtype.{key}",
                f"is a format of scores, and there are none: type dtype.{key}={usual}",
            )


def refuse_test_samples(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a test set where nothing is evaluated."""
    if cfg.data.test_samples:
        refuse(cfg, "data.test_samples", "has no effect where nothing is trained: type data.test_samples=0")


def _ranks(cfg: DictConfig) -> None:
    engine = cfg.engine
    if engine.rank_min**2 > engine.rank_total:
        least = engine.rank_min**2
        refuse(
            cfg,
            "engine.rank_min",
            f"keeps {least} numbers or more, and engine.rank_total={engine.rank_total}: lower the former",
        )
    if engine.rank >= engine.world_size:
        refuse(
            cfg,
            "engine.rank",
            f"is none of engine.world_size={engine.world_size} runs, which count from 0: type "
            f"engine.rank={engine.world_size - 1} or less, or engine.world_size={engine.rank + 1} or more",
        )


def _store(cfg: DictConfig) -> None:
    if cfg.engine.store == "":
        refuse(cfg, "engine.store", "names nothing: type engine.store=FOLDER, or null")
    if cfg.engine.store is None and cfg.engine.world_size > 1:
        refuse(
            cfg, "engine.store", f"is no folder that engine.world_size={cfg.engine.world_size} runs can share"
        )
