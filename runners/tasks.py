"""What models learn and what data teaches, so that only those are paired that fit. Torch is not imported."""

from collections.abc import Mapping

from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.choices import Architecture, ModelKind, TaskName
from runners.validate_data import data_task

ARCHITECTURE_TASKS: Mapping[Architecture, TaskName] = {
    Architecture.gpt2: TaskName.language,
    Architecture.gpt_neox: TaskName.language,
    Architecture.llama: TaskName.language,
    Architecture.qwen2: TaskName.language,
    Architecture.opt: TaskName.language,
    Architecture.t5: TaskName.seq2seq,
    Architecture.bert: TaskName.text_classes,
    Architecture.vit: TaskName.image_classes,
    Architecture.resnet: TaskName.image_classes,
    Architecture.llava: TaskName.image_text,
}

# What to type for a model of each task, and for samples of it.
MODELS = {
    TaskName.language: "model=gpt2",
    TaskName.seq2seq: "model=t5-tiny",
    TaskName.text_classes: "model=bert-tiny",
    TaskName.image_classes: "model=cnn",
    TaskName.table_classes: "model=mlp",
    TaskName.image_text: "model=llava-tiny",
}
DATA = {
    TaskName.language: "data=interpreter",
    TaskName.seq2seq: "data=interpreter data.task=seq2seq",
    TaskName.text_classes: "data=interpreter data.task=text_classes",
    TaskName.image_classes: "data=digits data.as_image=true",
    TaskName.table_classes: "data=digits data.as_image=false",
    TaskName.image_text: "data=digit_questions",
}


def model_task(model: DictConfig) -> TaskName:
    """What the model of the config's `model` node learns."""
    if model.kind == ModelKind.hf:
        return ARCHITECTURE_TASKS[model.architecture]
    return TaskName.table_classes if model.kind == ModelKind.mlp else TaskName.image_classes


def refuse_other_task(cfg: DictConfig) -> None:
    """Raises `ConfigError` if the model cannot learn from the data's samples, with what to type."""
    needed, given = model_task(cfg.model), data_task(cfg.data)
    if needed != given:
        raise ConfigError(
            f"model={cfg.model.name} learns from {needed} samples and data={cfg.data.kind} gives {given}: "
            f"type {MODELS[given]}, or {DATA[needed]}"
        )
