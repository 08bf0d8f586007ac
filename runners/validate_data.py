"""Checks of the `data` part of the config, before anything is built. Torch is not imported."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from conf.help_text import typed
from conf.refuse import refuse
from runners.choices import TaskName

TEXT_TASKS = (TaskName.language, TaskName.seq2seq, TaskName.text_classes)
# What `data.task` can be for the sources that have a choice.
SOURCE_TASKS = {
    "interpreter": TEXT_TASKS,
    "text": TEXT_TASKS,
    "tokens": TEXT_TASKS,
    "hf": (*TEXT_TASKS, TaskName.image_classes),
}
# The keys of data=hf that only these tasks read; where they are not read they must be null.
HF_KEYS = {
    "text_field": (TaskName.language, TaskName.text_classes),
    "source_field": (TaskName.seq2seq,),
    "target_field": (TaskName.seq2seq,),
    "target_len": (TaskName.seq2seq,),
    "image_field": (TaskName.image_classes,),
    "mean": (TaskName.image_classes,),
    "std": (TaskName.image_classes,),
    "label_field": (TaskName.text_classes, TaskName.image_classes),
}
CHANNELS = (1, 3)


def data_task(data: DictConfig) -> TaskName:
    """What the configured samples are for."""
    if data.kind in SOURCE_TASKS:
        return TaskName(data.task)
    if data.kind == "digits":
        return TaskName.image_classes if data.as_image else TaskName.table_classes
    return TaskName.image_text if data.kind == "digit_questions" else TaskName.table_classes


def check_data(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a `data` node that cannot be built, or not for the configured model."""
    data = cfg.data
    if data.kind in SOURCE_TASKS and data.task not in SOURCE_TASKS[data.kind]:
        right = ", ".join(SOURCE_TASKS[data.kind])
        refuse(cfg, "data.task", f"is nothing that data={data.kind} can give: type one of {right}")
    if data.kind in ("text", "tokens", "table") and not data.path:
        refuse(cfg, "data.path", "names nothing: type data.path=PATH")
    if data.keep is not None and data.drop is not None:
        refuse(
            cfg, "data.drop", f"does not go with data.keep={data.keep}: type data.drop=null or data.keep=null"
        )
    for key in ("keep", "drop"):
        if data[key] is not None and not Path(data[key]).is_file():
            refuse(
                cfg, f"data.{key}", "is no file: type the path of a list of sample ids (.txt, .csv, .parquet)"
            )
    if data.test_samples >= data.val_samples:
        most = data.val_samples - 1
        refuse(
            cfg,
            "data.test_samples",
            f"leaves none of data.val_samples={data.val_samples} to score with: type {most} or less",
        )
    if data.kind in CHECKS:
        CHECKS[data.kind](cfg)


def _interpreter_data(cfg: DictConfig) -> None:
    data = cfg.data
    if not data.domains:
        refuse(cfg, "data.domains", "leaves no text: name one or more of code, docs, legal")
    if data.shuffled_domain is not None and data.shuffled_domain not in data.domains:
        refuse(cfg, "data.shuffled_domain", f"is not in data.domains={typed(data.domains)}: add it there")
    if data.shuffled_domain is not None and data.task == TaskName.text_classes:
        refuse(cfg, "data.shuffled_domain", "would be a class without validation samples: type null")


def _hf_data(cfg: DictConfig) -> None:
    data = cfg.data
    if bool(data.name) == bool(data.path):
        raise ConfigError(
            f"data=hf needs one of data.name={typed(data.name)} (hub id) and data.path={typed(data.path)} "
            "(folder or file): give one, and null for the other"
        )
    if data.path and data.subset is not None:
        refuse(cfg, "data.subset", "has no effect with data.path: type data.subset=null")
    for key in ("split", "val_split"):
        if data[key] is not None and set(data[key]) & set("[+"):
            refuse(
                cfg, f"data.{key}", "is no name of a split, which ids need: use data.train_samples for a part"
            )
    if data.val_split == data.split:
        refuse(cfg, "data.val_split", "is what is trained on: type null, and samples are held out")
    for key, tasks in HF_KEYS.items():
        if data[key] is not None and data.task not in tasks:
            refuse(cfg, f"data.{key}", f"has no effect with data.task={data.task}: type data.{key}=null")
    _channels(cfg)


def _digits_data(cfg: DictConfig) -> None:
    _channels(cfg)
    if not cfg.data.as_image:
        for key, neutral in (("image_size", 8), ("channels", 1)):
            if cfg.data[key] != neutral:
                refuse(cfg, f"data.{key}", "has no effect on flat samples: type data.as_image=true")


def _channels(cfg: DictConfig) -> None:
    if cfg.data.channels not in CHANNELS:
        refuse(cfg, "data.channels", "is neither 1 (grey) nor 3 (colour)")


def _questions_data(cfg: DictConfig) -> None:
    """The rows hold as many image tokens as the model's vision tower gives features."""
    data = cfg.data
    if data.image_size % data.patch_size:
        refuse(cfg, "data.image_size", f"must be a multiple of data.patch_size={data.patch_size}")
    pairs = {
        "image_size": "model.config.vision_config.image_size",
        "patch_size": "model.config.vision_config.patch_size",
        "image_token_id": "model.config.image_token_index",
    }
    for key, model_key in pairs.items():
        wanted = OmegaConf.select(cfg, model_key)
        if wanted is not None and data[key] != wanted:
            refuse(cfg, f"data.{key}", f"is not {model_key}={wanted}: type data.{key}={wanted}")
    strategy = OmegaConf.select(cfg, "model.config.vision_feature_select_strategy")
    if strategy not in (None, "default"):
        refuse(
            cfg,
            "model.config.vision_feature_select_strategy",
            "needs an image token for CLIP's class token, which data=digit_questions has not: type default",
        )


CHECKS: dict[str, Callable[[DictConfig], None]] = {
    "interpreter": _interpreter_data,
    "hf": _hf_data,
    "digits": _digits_data,
    "digit_questions": _questions_data,
}
