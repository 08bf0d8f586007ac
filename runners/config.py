"""What every configuration key is: its type, and one line on its meaning.

The values live in `conf/`, one folder a group; these classes are what Hydra merges them into, so an unknown
key or a wrong type is refused. `python run.py --help` prints the lines written here. Torch is not imported:
help, completion and composition stay quick.
"""
# ruff: noqa: RUF009 -- `key` and `fixed` return dataclass fields, not shared values

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from conf.schema import fixed, free, key, schema_node
from runners.choices import (
    Algebra,
    Architecture,
    Attention,
    Credit,
    DataKind,
    Device,
    EngineName,
    Family,
    FloatType,
    InterpreterDomain,
    ModelKind,
    NonFinite,
    OptimizerName,
    PolicyName,
    Preconditioner,
    ProjectionKind,
    Resolution,
    Schedule,
    ShardFormat,
    StoredType,
    Strategy,
    TaskName,
    TokenType,
    ValGradDevice,
    ValMode,
    ValSets,
)

GROUPS = (
    *("model", "data", "engine", "layers", "dtype", "hardware", "optimizer", "policy", "trainer"),
    "tracking",
    *("experiment", "hparams_search", "debug"),
)


# ---------------------------------------------------------------- model


@dataclass
class ModelConfig:
    """What all models share."""

    kind: ModelKind
    name: str = key("label of the model in logs and in the tracker")


@dataclass
class HuggingFaceModel(ModelConfig):
    """One of Hugging Face's models: from its configuration (random start) or with saved weights."""

    kind: ModelKind = fixed(ModelKind.hf)
    architecture: Architecture = key("the model's type, as transformers names it")
    path: str | None = key("folder, .gguf file or hub id with the weights; null: random start", None)
    attn_implementation: Attention | None = key("attention kernel; null: transformers' choice", None)
    config: dict[str, Any] = free(
        "a key of Hugging Face's configuration class; others have its defaults, or the saved model's, and "
        "dropout is 0; null: as the data needs it"
    )


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
    seed: int = key("draws the training samples and label noise; the run's seed draws the rest")
    keep: str | None = key("list of sample ids (.txt, .csv, .parquet): train on these alone; null: all", None)
    drop: str | None = key("list of sample ids: train on all others; null: all", None)
    test_samples: int = key("of val_samples, so many are never scored with: their loss is test/loss", 0)


@dataclass
class LanguageData(DataConfig):
    """What all token sources share."""

    task: TaskName = key("what the text is for: see docs/data.md")
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
    tokenizer: str = key("gpt2, bytes (256 tokens; both bundled), a local tokenizer folder, or a hub id")


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
    tokenizer: str = key("gpt2, bytes (256 tokens; both bundled), a local tokenizer folder, or a hub id")


@dataclass
class TokensData(LanguageData):
    """Memory-mapped token files: made by the prepare step, or bare .bin files from elsewhere."""

    kind: DataKind = fixed(DataKind.tokens)
    path: str = key("folder with one .bin a domain, and meta.json if the prepare step made it")
    train_samples: int | None = key("samples to train on; null: all", None)
    dtype: TokenType | None = key("format of the tokens; null: as in meta.json", None)
    vocab_size: int | None = key("number of different tokens; null: as in meta.json", None)


@dataclass
class HFData(LanguageData):
    """A Hugging Face data set: from the hub, a folder of save_to_disk, or local files."""

    kind: DataKind = fixed(DataKind.hf)
    name: str | None = key("hub id; null: data.path", None)
    subset: str | None = key("the configuration of the data set on the hub; null: its only one", None)
    path: str | None = key("folder, or .parquet, .jsonl, .json or .csv file; null: data.name", None)
    split: str = key("split to train on")
    val_split: str | None = key("split to validate with; null: val_samples of data.split", None)
    train_samples: int | None = key("samples to train on; null: all", None)
    text_field: str | None = key("column of the text (language, text_classes); null: text", None)
    source_field: str | None = key("column of the source (seq2seq); null: source", None)
    target_field: str | None = key("column of the target (seq2seq); null: target", None)
    image_field: str | None = key("column of the image (image_classes); null: image", None)
    label_field: str | None = key("column of the label (text_classes, image_classes); null: label", None)
    domain_field: str | None = key("column of the domain; null: the class's name, else the split", None)
    id_field: str | None = key("column of a stable id; null: split and row number", None)
    tokenizer: str = key("gpt2, bytes (256 tokens; both bundled), a local tokenizer folder, or a hub id")
    target_len: int | None = key("tokens of the target (seq2seq); null: seq_len", None)
    image_size: int = key("height and width of an image, in pixels (image_classes)")
    channels: int = key("1: grey, 3: colour (image_classes)")
    mean: list[float] | None = key("subtracted from each channel (image_classes); null: nothing", None)
    std: list[float] | None = key("each channel is divided by this (image_classes); null: by nothing", None)


@dataclass
class DigitsData(DataConfig):
    """scikit-learn's 8 × 8 digits, ten classes."""

    kind: DataKind = fixed(DataKind.digits)
    as_image: bool = key("images of shape [channels, image_size, image_size] instead of [64]")
    image_size: int = key("height and width, in pixels; other than 8: interpolated (as_image)")
    channels: int = key("1, or 3 that are alike (as_image)")
    label_noise: float = key("share of training labels replaced by a wrong one, in [0, 1)")


@dataclass
class DigitQuestionsData(DataConfig):
    """Questions about scikit-learn's digits, with no image, one or two: for image-text models."""

    kind: DataKind = fixed(DataKind.digit_questions)
    train_samples: int | None = key("samples to train on; null: all", None)
    seq_len: int = key("tokens a sample is padded to")
    tokenizer: str = key("gpt2, bytes (256 tokens; both bundled), a local tokenizer folder, or a hub id")
    image_size: int = key("height and width, in pixels: that of the model's vision tower")
    patch_size: int = key("height and width of a patch: that of the model's vision tower")
    image_token_id: int = key("id of <image>: the number of tokens where the tokenizer does not know it")


@dataclass
class TableData(DataConfig):
    """A table of numbers with a class for each row."""

    kind: DataKind = fixed(DataKind.table)
    path: str = key("breast_cancer, wine or iris (bundled), or a .csv or .parquet file")
    label_field: str | None = key("column of the class; a file needs it", None)
    domain_field: str | None = key("column of the domain; null: the class's name", None)
    id_field: str | None = key("column of a stable id; null: the row's number", None)
    train_samples: int | None = key("samples to train on; null: all", None)


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
        "validation rows of each set a step (concat) or a micro-batch of the validation pass (separate)"
    )
    val_sets: ValSets = key("validation objectives: all samples as one, or one for each domain")
    preconditioner: Preconditioner = key(
        "whose step values are about: the gradient's (none), or the optimizer's own (auto)"
    )
    credit: Credit = key("what counts of a gradient's way through momentum: its whole effect, or one step's")
    pairwise: bool = key("score every pair of a training and a validation sample")
    resolution: Resolution = key(
        "what stored scores tell apart: nothing, layers, families or attention heads"
    )
    val_every: int = key("steps between two validation gradients (separate)")
    val_grad_device: ValGradDevice = key(
        "where the validation gradient is kept: on the model's device, or in the CPU's memory (separate)"
    )
    order: int = key(
        "1: values of first order; 2: less what samples take from each other, by the Hessian (separate)"
    )
    bitwise: bool = key("keep training bit-identical to engine=regular (separate)")
    algebra: Algebra = key("how the dots are computed; auto: the cheapest for each layer")
    chunk_mb: int = key("MiB that a layer's dots hold at once, beyond their results")
    strict: bool = key("refuse to train where a trainable parameter is not scored")


@dataclass
class RegularEngine(GradDotProdEngine):
    """Plain training: no values, the baseline for cost and for zero impact.

    It takes graddotprod's keys and uses none, so that a word makes any command its own baseline.
    """

    name: EngineName = fixed(EngineName.regular)


@dataclass
class GradProjLoRAEngine(EngineConfig):
    """No training: every training sample's gradient, projected to a few numbers a parameter, into a store."""

    name: EngineName = fixed(EngineName.gradprojlora)
    rank_total: int = key("numbers kept of a matrix's gradient, about: k_out * k_in")
    rank_min: int = key("fewest rows and columns kept of a matrix's gradient, where it has that many")
    kind: ProjectionKind = key("how the projection matrices are drawn")
    seed: int = key("seed of the projection matrices")
    include_embeddings: bool = key("project embeddings and their tied heads too")
    storage: StoredType = key("rows are written in this; int8: with a scale for each row")
    format: ShardFormat = key("files of the store")
    save_every: int = key("batches a shard; what a killed run loses at most, and computes again")
    store: str | None = key(
        "folder of the store, new or to go on with; null: RUN DIRECTORY/projections", None
    )
    world_size: int = key("runs that write one store together, each with its own engine.rank")
    rank: int = key("which of them this is, from 0; each projects its part of the corpus")
    distortion_samples: int = key(
        "samples on which the error of projected inner products is measured; 0: none"
    )


@dataclass
class LayersConfig:
    """Which layers are scored (all are trained): those included, not excluded, and of one of the families."""

    include: list[str] = key("what to score: h.*.mlp.*, re:.*mlp.*, or heads such as h.3.attn.head[0,5]")
    exclude: list[str] = key("what not to score, in the same patterns")
    families: list[Family] = key("families to score; []: all")
    blocks: list[str] = key("blocks to score, such as 7 or 0-3; []: all, and layers outside of blocks")


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
    strategy: Strategy = key(
        "how several processes train one model: ddp: a copy in each, fsdp: a part in each", Strategy.none
    )
    processes: int | None = key("how many there have to be; null: as many as are started", None)
    reduce_dtype: FloatType | None = key(
        "gradients are summed over processes in this (fsdp); null: dtype.model", None
    )
    offload: bool = key("keep weights and optimizer in the CPU's memory between uses (fsdp on GPUs)", False)


# ---------------------------------------------------------------- optimizer


@dataclass
class OptimizerConfig:
    """What all optimizers share."""

    name: OptimizerName
    lr: float = key("peak learning rate")
    weight_decay: float = key("weight decay (in adamw apart from the gradient)")


@dataclass
class AdamWOptimizer(OptimizerConfig):
    """`torch.optim.AdamW`."""

    name: OptimizerName = fixed(OptimizerName.adamw)
    betas: list[float] = key("decay of the first and of the second moment")
    eps: float = key("added to the denominator")


@dataclass
class AdamOptimizer(AdamWOptimizer):
    """`torch.optim.Adam`: the decay is a part of the gradient."""

    name: OptimizerName = fixed(OptimizerName.adam)


@dataclass
class SGDOptimizer(OptimizerConfig):
    """`torch.optim.SGD`."""

    name: OptimizerName = fixed(OptimizerName.sgd)
    momentum: float = key("momentum, in [0, 1)")
    nesterov: bool = key("Nesterov's form of momentum")


# ---------------------------------------------------------------- policy


@dataclass
class PolicyConfig:
    """The ordinary step: scores are taken, and change nothing."""

    name: PolicyName = fixed(PolicyName.none)


@dataclass
class AllPolicy(PolicyConfig):
    """Every sample of a step, by the way that other policies take: their baseline for cost."""

    name: PolicyName = fixed(PolicyName.all)


@dataclass
class TopKPolicy(PolicyConfig):
    """A step is over its samples with the largest scores."""

    name: PolicyName = fixed(PolicyName.top_k)
    k: int | float = key("samples of a step that are kept: a number, or a fraction such as 0.5")


@dataclass
class BottomKPolicy(TopKPolicy):
    """A step is over its samples with the smallest scores."""

    name: PolicyName = fixed(PolicyName.bottom_k)


@dataclass
class GreedyPolicy(TopKPolicy):
    """A step is over samples chosen one after the other, by what each adds to those before it (GREATS)."""

    name: PolicyName = fixed(PolicyName.greedy)
    order: int = key("1: by scores alone; 2: less what samples have in common with those chosen")


@dataclass
class ThresholdPolicy(PolicyConfig):
    """A step is over its samples with scores above a limit."""

    name: PolicyName = fixed(PolicyName.threshold)
    above: float = key("the limit, itself excluded; 0: samples that lower the validation loss")


@dataclass
class SoftmaxPolicy(PolicyConfig):
    """A step's samples weigh by the softmax of their standardised scores."""

    name: PolicyName = fixed(PolicyName.softmax)
    temperature: float = key("large ones weigh all samples alike, small ones the best alone")


@dataclass
class CurriculumPolicy(PolicyConfig):
    """A step is over its samples whose scores' quantiles lie in a window that moves over the steps."""

    name: PolicyName = fixed(PolicyName.curriculum)
    start: list[float] = key("quantiles that bound the window at first, such as [0.5,1]")
    end: list[float] = key("and at last, such as [0,1]")
    steps: int = key("steps over which the window moves")


# ---------------------------------------------------------------- trainer, tracking


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
    activation_checkpointing: bool = key("compute activations a second time in the backward, to save memory")
    save_model: bool = key("write the trained weights to RUN DIRECTORY/model, for model.path of later runs")
    overhead_probes: int = key("plain passes timed beside scored ones to tell what scoring costs")
    checkpoint_every: int | None = key(
        "steps between two checkpoints, what a killed run computes again at most; null: only on signals"
    )
    keep_checkpoints: int = key("newest checkpoints kept")
    non_finite: NonFinite = key(
        "on a loss, gradient or score that is no finite number: stop the run, skip the step, or go on and "
        "mark its samples"
    )


@dataclass
class TrackingConfig:
    """Where results are recorded beside the run directory."""

    enabled: bool = key("log to MLflow")
    uri: str | None = key("server or store; null: mlflow.db in the folder the command is typed in", None)
    experiment: str = key("name of the MLflow experiment")
    run_name: str | None = key("name of the MLflow run; null: after its directory and what it trains", None)
    upload: bool = key("copy the run directory's files to the MLflow run")
    upload_large: bool = key("copy saved weights and stores of projections too")


@dataclass
class SweepConfig:
    """What a sweep does with its jobs."""

    skip_finished: bool = key("leave out jobs that a finished run has computed before (sweeps)", True)


# ---------------------------------------------------------------- the run


@dataclass
class RunConfig:
    """The whole tree."""

    seed: int = key("seed of weights, data order and dropout")
    preview: bool = key("show the samples' first words in the end table (console only)")
    report_text: bool = key("show the samples' first words in report.html too, which is uploaded")
    dry_run: bool = key("show parameters, memory and output directory, then end")
    resume: str | None = key(
        "directory or MLflow run id of an unfinished run to go on with; nothing else need be typed", None
    )
    verify: bool = key("check the scores of a few samples against plain autograd, layer by layer, then end")
    output_dir: str | None = key("where the run's files go; set by hydra.run.dir or hydra.sweep.dir")
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    engine: EngineConfig = MISSING
    layers: LayersConfig = MISSING
    dtype: DtypeConfig = MISSING
    hardware: HardwareConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    trainer: TrainerConfig = MISSING
    tracking: TrackingConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)


# Names without a group, so that neither help nor completion offers them as choices. A YAML file takes its
# schema by `defaults: [/schema_model_hf@_here_, _self_]`.
SCHEMAS: dict[str, type] = {
    "schema_run": RunConfig,
    "schema_model_hf": HuggingFaceModel,
    "schema_model_mlp": MLPModel,
    "schema_model_cnn": CNNModel,
    "schema_data_interpreter": InterpreterData,
    "schema_data_text": TextData,
    "schema_data_tokens": TokensData,
    "schema_data_hf": HFData,
    "schema_data_digits": DigitsData,
    "schema_data_digit_questions": DigitQuestionsData,
    "schema_data_table": TableData,
    "schema_engine_graddotprod": GradDotProdEngine,
    "schema_engine_gradprojlora": GradProjLoRAEngine,
    "schema_engine_regular": RegularEngine,
    "schema_layers": LayersConfig,
    "schema_dtype": DtypeConfig,
    "schema_hardware": HardwareConfig,
    "schema_optimizer_adam": AdamOptimizer,
    "schema_optimizer_adamw": AdamWOptimizer,
    "schema_optimizer_sgd": SGDOptimizer,
    "schema_policy_none": PolicyConfig,
    "schema_policy_all": AllPolicy,
    "schema_policy_top_k": TopKPolicy,
    "schema_policy_bottom_k": BottomKPolicy,
    "schema_policy_threshold": ThresholdPolicy,
    "schema_policy_softmax": SoftmaxPolicy,
    "schema_policy_greedy": GreedyPolicy,
    "schema_policy_curriculum": CurriculumPolicy,
    "schema_trainer": TrainerConfig,
    "schema_tracking": TrackingConfig,
}


for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=_name, node=schema_node(_schema), provider="ghostrunner")
