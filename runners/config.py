"""What every configuration key is: its type, and one line on its meaning.

The values live in `conf/`, one folder a group; these classes are what Hydra merges them into, so an unknown
key or a wrong type is refused. `python run.py --help` prints the lines written here. Torch is not imported:
help, completion and composition stay quick.
"""
# ruff: noqa: RUF009 -- `key` and `fixed` return dataclass fields, not shared values

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from runners.choices import (
    Algebra,
    Attention,
    DataKind,
    Device,
    EngineName,
    Family,
    FloatType,
    InterpreterDomain,
    ModelKind,
    OptimizerName,
    Schedule,
    TokenType,
    ValMode,
)

GROUPS = (
    *("model", "data", "engine", "layers", "dtype", "hardware", "optimizer", "trainer", "tracking"),
    *("experiment", "debug"),
)


def key(meaning: str, default: Any = MISSING) -> Any:
    """A field with its documentation; without a default, the YAML of the choice must give the value."""
    return field(default=default, metadata={"meaning": meaning})


def fixed(value: StrEnum) -> Any:
    """The field that tells the choices of a group apart; `check` refuses any other value."""
    return field(default=value, metadata={"fixed": True})


# ---------------------------------------------------------------- model


@dataclass
class ModelConfig:
    """What all models share."""

    kind: ModelKind
    name: str = key("label of the model in logs and in the tracker")


@dataclass
class GPT2Architecture:
    """Hugging Face's `GPT2Config`, as far as it changes the shape of the model."""

    n_layer: int = key("transformer blocks")
    n_head: int = key("attention heads a block; divides n_embd")
    n_embd: int = key("width of the residual stream")
    n_positions: int = key("longest sequence, in tokens")
    vocab_size: int = key("rows of the token embedding")
    tie_word_embeddings: bool = key("LM head and token embedding share one matrix")
    attn_pdrop: float = key("dropout probability on attention weights")
    resid_pdrop: float = key("dropout probability on the residual branches")
    embd_pdrop: float = key("dropout probability on the embeddings")
    attn_implementation: Attention = key("attention kernel")


@dataclass
class GPT2Model(ModelConfig):
    """A GPT-2 from its configuration (random start) or from a folder or hub id (pretrained)."""

    kind: ModelKind = fixed(ModelKind.gpt2)
    path: str | None = key(
        "folder or hub id of a GPT-2 of the same shape as config; null: random start", None
    )
    config: GPT2Architecture = field(default_factory=GPT2Architecture)


@dataclass
class MLPModel(ModelConfig):
    """Linear layers with ReLU between them."""

    kind: ModelKind = fixed(ModelKind.mlp)
    hidden: list[int] = key("widths of the hidden layers")


@dataclass
class CNNModel(ModelConfig):
    """3 × 3 convolutions with ReLU and pooling, then a linear head."""

    kind: ModelKind = fixed(ModelKind.cnn)
    channels: list[int] = key("output channels of the convolutions")


# ---------------------------------------------------------------- data


@dataclass
class DataConfig:
    """What all data sources share."""

    kind: DataKind
    shuffle: bool = key("draw training samples in a new order each epoch")
    num_workers: int = key("loader processes; 0: load in the training process")
    val_samples: int = key("samples held out for validation")


@dataclass
class LanguageData(DataConfig):
    """What all token sources share."""

    seq_len: int = key("tokens a sample")


@dataclass
class InterpreterData(LanguageData):
    """Code, documentation and licences of the running Python installation: real text without a download."""

    kind: DataKind = fixed(DataKind.interpreter)
    train_samples: int = key("samples to train on, spread evenly over the domains")
    domains: list[InterpreterDomain] = key("which texts to use")
    shuffled_domain: InterpreterDomain | None = key(
        "add copies of this domain with their tokens shuffled, as domain NAME-shuffled", None
    )
    tokenizer: str = key("gpt2 (bundled) or a local tokenizer folder")


@dataclass
class TextData(LanguageData):
    """Your own text: .txt, .jsonl (also .xz, .gz) or .parquet."""

    kind: DataKind = fixed(DataKind.text)
    path: str = key("file, folder or glob")
    text_field: str = key("field that holds the text (.jsonl, .parquet)")
    domain_field: str | None = key("field that holds the domain; null: the file's name")
    id_field: str | None = key("field that holds a stable id; null: file name and row number")
    domain: str | None = key("one domain for all rows; null: from domain_field, else the file's name", None)
    train_samples: int | None = key("samples to train on; null: all", None)
    tokenizer: str = key("gpt2 (bundled) or a local tokenizer folder")


@dataclass
class TokensData(LanguageData):
    """Memory-mapped token files: made by the prepare step, or bare .bin files from elsewhere."""

    kind: DataKind = fixed(DataKind.tokens)
    path: str = key("folder with one .bin a domain, and meta.json if the prepare step made it")
    train_samples: int | None = key("samples to train on; null: all", None)
    dtype: TokenType | None = key("format of the tokens; null: as in meta.json", None)
    vocab_size: int | None = key("number of different tokens; null: as in meta.json", None)


@dataclass
class DigitsData(DataConfig):
    """scikit-learn's 8 × 8 digits, ten classes."""

    kind: DataKind = fixed(DataKind.digits)
    as_image: bool = key("samples of shape [1, 8, 8] (for model=cnn) instead of [64]")
    label_noise: float = key("share of training labels replaced by a wrong one, in [0, 1)")


# ---------------------------------------------------------------- engine, layers, dtype, hardware


@dataclass
class EngineConfig:
    """What all engines share."""

    name: EngineName


@dataclass
class GradDotProdEngine(EngineConfig):
    """One value a training sample and step: its gradient's dot product with the validation gradient."""

    name: EngineName = fixed(EngineName.graddotprod)
    val_mode: ValMode = key("validation rows in the training pass, or in a pass of their own")
    val_batch_size: int = key(
        "validation rows a step (concat) or a micro-batch of the validation pass (separate)"
    )
    val_every: int = key("steps between two validation gradients (separate)")
    bitwise: bool = key("keep training bit-identical to engine=regular (separate)")
    algebra: Algebra = key("how the dots are computed; auto: the cheapest for each layer")


@dataclass
class RegularEngine(EngineConfig):
    """Plain training: no values, the baseline for cost and for zero impact."""

    name: EngineName = fixed(EngineName.regular)


@dataclass
class LayersConfig:
    """Which layers are scored (all are trained): those included, not excluded, and of one of the families."""

    include: list[str] = key("name patterns (* and ?) of layers to score")
    exclude: list[str] = key("name patterns of layers not to score")
    families: list[Family] = key("families to score; []: all")


@dataclass
class DtypeConfig:
    """Number formats; each setting does one thing."""

    model: FloatType = key("weights and their gradients")
    autocast: FloatType | None = key("forward pass under autocast; null: off", None)
    score: FloatType = key("the dot products are accumulated in this")
    storage: FloatType = key("scores are written in this")


@dataclass
class HardwareConfig:
    """Where the run happens."""

    device: Device = key("auto: cuda where there is one, else cpu")
    threads: int | None = key("CPU threads of PyTorch; null: its own choice", None)


# ---------------------------------------------------------------- optimizer, trainer, tracking


@dataclass
class OptimizerConfig:
    """What all optimizers share."""

    name: OptimizerName
    lr: float = key("peak learning rate")
    weight_decay: float = key("weight decay (decoupled in adamw)")


@dataclass
class AdamWOptimizer(OptimizerConfig):
    """`torch.optim.AdamW`."""

    name: OptimizerName = fixed(OptimizerName.adamw)
    betas: list[float] = key("decay of the first and of the second moment")
    eps: float = key("added to the denominator")


@dataclass
class SGDOptimizer(OptimizerConfig):
    """`torch.optim.SGD`."""

    name: OptimizerName = fixed(OptimizerName.sgd)
    momentum: float = key("momentum, in [0, 1)")
    nesterov: bool = key("Nesterov's form of momentum")


@dataclass
class TrainerConfig:
    """The training loop."""

    max_steps: int = key("optimizer steps of the run")
    batch_size: int = key("training samples a micro-batch")
    gradient_accumulation_steps: int = key("micro-batches an optimizer step")
    clip_grad_norm: float | None = key("largest norm of the whole gradient; null: no clipping", None)
    lr_schedule: Schedule = key("learning rate after the warm-up")
    warmup_steps: int = key("steps over which the learning rate rises from 0")
    eval_every: int = key("steps between two evaluations on all validation samples")
    eval_only: bool = key("evaluate the model once and end")
    eval_batch_size: int = key("validation samples a batch in evaluations")
    flush_every: int = key("steps of scores kept in memory before a shard is written")
    compile: bool = key("torch.compile the model")
    overhead_probes: int = key("plain passes timed beside scored ones to tell what scoring costs")


@dataclass
class TrackingConfig:
    """Where results are recorded beside the run directory."""

    enabled: bool = key("log to MLflow")
    uri: str | None = key("server or store; null: mlflow.db in the folder the command is typed in", None)
    experiment: str = key("name of the MLflow experiment")
    run_name: str | None = key("name of the MLflow run; null: the last two parts of the run directory", None)
    upload: bool = key("copy the run directory's files to the MLflow run")


# ---------------------------------------------------------------- the run


@dataclass
class RunConfig:
    """The whole tree."""

    seed: int = key("seed of weights, data order and noise")
    preview: bool = key("show the samples' first words in the end table (console only)")
    dry_run: bool = key("show parameters, memory and output directory, then end")
    output_dir: str | None = key("where the run's files go; set by hydra.run.dir or hydra.sweep.dir")
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    engine: EngineConfig = MISSING
    layers: LayersConfig = MISSING
    dtype: DtypeConfig = MISSING
    hardware: HardwareConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    trainer: TrainerConfig = MISSING
    tracking: TrackingConfig = MISSING


# Names without a group, so that neither help nor completion offers them as choices. A YAML file takes its
# schema by `defaults: [/schema_model_gpt2@_here_, _self_]`.
SCHEMAS: dict[str, type] = {
    "schema_run": RunConfig,
    "schema_model_gpt2": GPT2Model,
    "schema_model_mlp": MLPModel,
    "schema_model_cnn": CNNModel,
    "schema_data_interpreter": InterpreterData,
    "schema_data_text": TextData,
    "schema_data_tokens": TokensData,
    "schema_data_digits": DigitsData,
    "schema_engine_graddotprod": GradDotProdEngine,
    "schema_engine_regular": RegularEngine,
    "schema_layers": LayersConfig,
    "schema_dtype": DtypeConfig,
    "schema_hardware": HardwareConfig,
    "schema_optimizer_adamw": AdamWOptimizer,
    "schema_optimizer_sgd": SGDOptimizer,
    "schema_trainer": TrainerConfig,
    "schema_tracking": TrackingConfig,
}

for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=_name, node=_schema, provider="ghostrunner")
