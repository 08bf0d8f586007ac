"""Every YAML in `conf/` composes and passes the checks; impossible combinations are refused in a sentence."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from runners.config import GROUPS, SCHEMAS
from runners.tasks import DATA, model_task
from runners.validate import check

CONF = Path(__file__).resolve().parents[2] / "conf"

LLAVA_DATA = ["data=digit_questions", "data.image_size=336", "data.patch_size=14"]
LLAVA_DATA += ["data.image_token_id=32000"]

# What a choice needs beside it to be a whole run.
COMPANIONS = {
    "model=mlp": ["data=digits"],
    "model=cnn": ["data=digits", "data.as_image=true"],
    "model=hf": ["model.architecture=llama"],
    "model=llava-7b": LLAVA_DATA,
    "model=llava-13b": LLAVA_DATA,
    "data=digits": ["model=mlp"],
    "data=text": ["data.path=corpus.txt"],
    "data=tokens": ["data.path=tokens"],
    "data=hf": ["data.path=corpus.csv"],
    "data=table": ["model=mlp"],
    "data=digit_questions": ["model=llava-tiny"],
}


@pytest.fixture(scope="module", autouse=True)
def hydra_context() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


@cache
def _base(choices: tuple[str, ...]) -> DictConfig:
    return composed(*choices)


def varied(overrides: str) -> DictConfig:
    """`composed`, for values over a composition made once: composing takes most of these tests' time."""
    words = overrides.split()
    chosen = tuple(word for word in words if word.partition("=")[0] in GROUPS)
    values = [word for word in words if word not in chosen]
    merged = OmegaConf.merge(_base(chosen), OmegaConf.from_dotlist(values))
    assert isinstance(merged, DictConfig)
    return merged


def choices() -> list[str]:
    return sorted(f"{group}={file.stem}" for group in GROUPS for file in (CONF / group).glob("*.yaml"))


def companions(choice: str) -> list[str]:
    if choice in COMPANIONS or not choice.startswith("model="):
        return COMPANIONS.get(choice, [])
    return DATA[model_task(composed(choice).model)].split()


@pytest.mark.parametrize("choice", choices())
def test_every_choice_composes_and_passes(choice: str) -> None:
    group, name = choice.split("=")
    if group == "hparams_search":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'ghostrunner[optuna]'")
    cfg = composed(choice, *companions(choice))
    check(cfg)
    if group == "model":
        assert cfg.model.name == (name if name != "hf" else "llama")
    elif group in ("data", "engine", "optimizer"):
        kind = cfg[group].name if group == "engine" else cfg[group].get("kind") or cfg[group].name
        assert kind == name.partition("-")[0]


def test_every_group_has_a_folder_and_every_folder_is_a_group() -> None:
    folders = {path.parent.name for path in CONF.glob("*/*.yaml")}
    assert folders - {"local", "fidelity"} == set(GROUPS)  # the latter is runners.fidelity's


def test_defaults_are_the_main_job() -> None:
    cfg = composed()
    assert (cfg.model.kind, cfg.data.kind, cfg.engine.name) == ("hf", "interpreter", "graddotprod")
    assert cfg.trainer.max_steps == 24
    assert cfg.model.config.n_embd == 768


def test_experiments_set_what_they_say() -> None:
    planted = composed("experiment=planted")
    assert planted.data.shuffled_domain == "docs"
    assert planted.model.name == "gpt2-tiny"
    guide = composed("experiment=guide")
    assert (guide.data.tokenizer, guide.model.config.vocab_size) == ("bytes", None)
    digits = composed("experiment=digits", "debug=short")
    assert (digits.model.kind, digits.optimizer.name, digits.trainer.max_steps) == ("mlp", "sgd", 3)


def test_command_line_beats_experiment() -> None:
    cfg = composed("experiment=planted", "model=gpt2-tiny", "trainer.max_steps=5")
    assert cfg.model.name == "gpt2-tiny"
    assert cfg.trainer.max_steps == 5


def test_words_equal_their_strings() -> None:
    cfg = composed("dtype=bf16_mixed")
    assert cfg.dtype.autocast == "bfloat16"
    assert f"{cfg.engine.val_mode}" == "concat"
    assert OmegaConf.to_yaml(cfg.dtype).splitlines()[1] == "autocast: bfloat16"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_key_is_documented(schema: type) -> None:
    for item in fields(schema):
        inner = is_dataclass(item.type)
        assert (
            inner
            or item.metadata.get("fixed")
            or item.metadata.get("meaning")
            or item.name in ("kind", "name")
        )


def test_every_key_is_read_somewhere() -> None:
    """A name counts as read where the runners' code has it as an attribute or as a string."""
    described = {"config.py", "validate.py", "choices.py", "help_text.py"}
    read: set[str] = set()
    for path in (CONF.parent / "runners").rglob("*.py"):
        if path.name not in described:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    read.add(node.value)
    keys = {item.name for schema in SCHEMAS.values() for item in fields(schema)}
    assert len(keys) > 60
    assert keys - read == set()


REFUSED = {
    "output_dir=/elsewhere": ["output_dir=/elsewhere", "type hydra.run.dir=PATH"],
    "dtype=fp64 dtype.score=float32": ["dtype.score=float32", "type dtype.score=float64"],
    "dtype.storage=float64": ["dtype.storage=float64", "dtype.score=float32"],
    "data=text": ["data.path has no value", "data.path=VALUE"],
    "data=text data.path=''": ["data.path= names nothing"],
    "seed=${nowhere}": ["seed: Interpolation key 'nowhere' not found"],
    "model.kind=mlp": ["model.kind=mlp", "type model=mlp"],
    "engine.name=regular": ["engine.name=regular", "type engine=regular"],
    "data=digits": ["model=gpt2 learns from language samples", "gives table_classes", "model=mlp"],
    "model=mlp": ["model=mlp learns from table_classes", "model=gpt2"],
    "model=cnn data=digits": ["model=cnn learns from image_classes", "data=digits data.as_image=true"],
    "model=mlp data=digits data.as_image=true": ["data=digits gives image_classes", "data.as_image=false"],
    "model=mlp data=digits data.label_noise=1.0": ["data.label_noise=1.0", "less than 1"],
    "model=mlp data=digits model.hidden=[]": ["model.hidden=[]", "[32,64]"],
    "data.seq_len=2048": ["data.seq_len=2048", "model.config.n_positions=1024"],
    "data.domains=[]": ["data.domains=[]", "code, docs, legal"],
    "data.shuffled_domain=docs data.domains=[code]": ["data.shuffled_domain=docs", "data.domains=[code]"],
    "data.task=image_classes": ["data.task=image_classes", "language, seq2seq, text_classes"],
    "data.task=text_classes data.shuffled_domain=docs": ["data.shuffled_domain=docs", "type null"],
    "data=hf": ["data.name=null", "data.path=null", "give one"],
    "data=hf data.name=a/b data.path=c": ["data.name=a/b", "data.path=c", "give one"],
    "data=hf data.path=c data.subset=d": ["data.subset=d", "type data.subset=null"],
    "data=hf data.path=c data.split='train[:9]'": ["data.split=", "data.train_samples"],
    "data=hf data.path=c data.val_split=train": ["data.val_split=train", "type null"],
    "data=hf data.path=c data.mean=[0.5]": ["data.mean=[0.5]", "data.task=language", "type data.mean=null"],
    "data=hf data.path=c data.channels=2": ["data.channels=2", "1 (grey)"],
    "model=mlp data=digits data.image_size=32": ["data.image_size=32", "type data.as_image=true"],
    "model=mlp data=table data.path=''": ["data.path= names nothing"],
    "data=digit_questions data.image_size=30": ["data.image_size=30", "data.patch_size=8"],
    "model.config.n_embd=100": ["model.config.n_embd=100", "model.config.n_head=12"],
    "model.config.attn_pdrop=1.5": ["model.config.attn_pdrop=1.5"],
    "data.keep=nowhere.txt": ["data.keep=nowhere.txt is no file"],
    "model.config.n_layr=3": ["model.config.n_layr is no key of GPT2Config", "model.config.n_layer?"],
    "engine.bitwise=true": ["engine.bitwise=true", "engine.val_mode=separate"],
    "engine.val_every=2": ["engine.val_every=2", "engine.val_mode=separate"],
    "engine.val_grad_device=cpu": ["engine.val_grad_device=cpu", "engine.val_mode=separate"],
    "engine.val_mode=separate engine.bitwise=true engine.algebra=fused": ["engine.algebra=fused", "=auto"],
    "engine.val_mode=separate engine.algebra=token_token": ["engine.algebra=token_token", "=concat"],
    "engine.order=2": ["engine.order=2", "type engine.val_mode=separate"],
    "engine.credit=step": ["engine.credit=step", "type engine.credit=trajectory"],
    "engine.preconditioner=adam optimizer=sgd": ["optimizer=sgd", "type engine.preconditioner=auto"],
    "engine.preconditioner=auto engine.algebra=fused": ["engine.algebra=fused", "type auto"],
    "engine.preconditioner=auto dtype=fp16_mixed": ["engine.preconditioner=auto", "dtype=bf16_mixed"],
    "engine.preconditioner=auto verify=true": ["verify=true", "type engine.preconditioner=none"],
    "engine.preconditioner=auto engine.order=2 engine.val_mode=separate": [
        "engine.order=2",
        "engine.order=1",
    ],
    "engine.preconditioner=auto engine.bitwise=true engine.val_mode=separate": ["engine.bitwise=false"],
    "engine.preconditioner=auto hardware.strategy=ddp hardware.processes=2": ["hardware.strategy=none"],
    "engine.order=3 engine.val_mode=separate": ["engine.order=3", "type engine.order=1, or 2"],
    "engine.order=2 engine.val_mode=separate engine.val_every=3": [
        "engine.val_every=3",
        "engine.val_every=1",
    ],
    "engine.order=2 engine.val_mode=separate dtype=fp16_mixed": [
        "dtype.autocast=float16",
        "dtype=bf16_mixed",
    ],
    "engine.order=2 engine.val_mode=separate hardware.strategy=fsdp hardware.processes=2": [
        "hardware.strategy=fsdp",
        "type hardware.strategy=ddp",
    ],
    "policy=top_k engine=regular": ["policy.name=top_k", "type policy=none, or engine=graddotprod"],
    "policy=top_k engine=gradprojlora": ["policy.name=top_k", "engine=gradprojlora has none of"],
    "policy=all trainer.eval_only=true": ["policy.name=all", "type policy=none"],
    "policy=all engine.val_mode=separate engine.bitwise=true": ["engine.bitwise=true", "bitwise=false"],
    "policy=all engine.preconditioner=auto": ["engine.preconditioner=auto", "preconditioner=none"],
    "policy=all engine.val_mode=separate engine.algebra=fused": ["engine.algebra=fused", "algebra=auto"],
    "policy=all engine.algebra=fused": ["engine.algebra=fused", "no effect with policy=all", "algebra=auto"],
    "policy=all hardware.strategy=fsdp hardware.processes=2": ["strategy=fsdp", "strategy=ddp, or policy="],
    "policy=greedy hardware.strategy=ddp hardware.processes=2": ["policy.order=2", "policy.order=1"],
    "policy=greedy policy.order=3": ["policy.order=3", "type policy.order=1, or 2"],
    "policy=top_k policy.k=1.5": ["policy.k=1.5", "type policy.k=4, or 0.5"],
    "policy=top_k policy.k=0": ["policy.k=0", "type policy.k=4, or 0.5"],
    "policy=softmax policy.temperature=-1": ["policy.temperature=-1", "greater than 0"],
    "policy=threshold policy.above=nan": ["policy.above=nan", "finite"],
    "policy=curriculum policy.start=[0.5]": ["policy.start=[0.5]", "[0.5,1]"],
    "policy=curriculum policy.end=[0.5,0.5]": ["policy.end=[0.5,0.5]", "the lower one first"],
    "policy=curriculum policy.steps=0": ["policy.steps=0", "policy.steps=1 or more"],
    "policy=top_k policy.name=all": ["policy.name=all", "type policy=all"],
    "engine.val_batch_size=31": ["engine.val_batch_size=31", "data.val_samples=30"],
    "engine=regular layers=attn": ["layers.families=[attn]", "layers=all"],
    "engine=regular preview=true": ["preview=true", "preview=false"],
    "engine=regular report_text=true": ["report_text=true", "type report_text=false"],
    "trainer.eval_only=true report_text=true": ["report_text=true", "eval_only=true", "report_text=false"],
    "engine=gradprojlora report_text=true": ["report_text=true", "trains nothing", "type report_text=false"],
    "engine=gradprojlora trainer.eval_only=true": ["trainer.eval_only=true", "engine=gradprojlora", "=false"],
    "engine=gradprojlora trainer.save_model=true": ["trainer.save_model=true", "trainer.save_model=false"],
    "engine=gradprojlora trainer.compile=true": ["trainer.compile=true", "trainer.compile=false"],
    "engine=gradprojlora trainer.gradient_accumulation_steps=2": ["steps=2", "steps=1"],
    "engine=gradprojlora verify=true": ["verify=true", "engine=gradprojlora", "type engine=graddotprod"],
    "engine=gradprojlora dtype=fp16_mixed": ["dtype.autocast=float16", "type dtype=bf16_mixed"],
    "engine=gradprojlora dtype.storage=bfloat16": ["dtype.storage=bfloat16", "engine.storage=bfloat16"],
    "engine=gradprojlora engine.rank_min=17": ["engine.rank_min=17", "289", "engine.rank_total=256"],
    "engine=gradprojlora engine.rank_total=0": ["engine.rank_total=0", "engine.rank_total=1"],
    "engine=gradprojlora engine.rank=1": ["engine.rank=1", "engine.world_size=1", "engine.rank=0"],
    "engine=gradprojlora dtype.score=float64": ["dtype.score=float64", "no", "dtype.score=float32"],
    "engine=gradprojlora engine.rank=-1": ["engine.rank=-1", "engine.rank=0"],
    "engine=gradprojlora engine.world_size=4": ["engine.store=null", "engine.world_size=4", "share"],
    "engine=gradprojlora engine.store=''": ["engine.store= names nothing"],
    "engine=gradprojlora engine.distortion_samples=1": ["engine.distortion_samples=1", "3 or more"],
    "model=mlp data=digits trainer.save_model=true": ["trainer.save_model=true", "model=mlp", "model.path"],
    "trainer.eval_only=true trainer.save_model=true": ["trainer.save_model=true", "trainer.save_model=false"],
    "tracking=none tracking.upload_large=true": ["tracking.upload_large=true", "tracking.upload=false"],
    "layers.include=[]": ["layers.include=[]"],
    "layers.exclude=['']": ["layers.exclude=[]", "empty pattern"],
    "dtype=fp64 dtype.autocast=bfloat16": ["dtype.model=float64", "dtype.autocast=null"],
    "dtype.autocast=float64": ["dtype.autocast=float64", "dtype.autocast=bfloat16"],
    "dtype.score=bfloat16": ["dtype.score=bfloat16", "dtype.score=float32"],
    "dtype.score=float16": ["dtype.score=float16", "dtype.score=float32"],
    "dtype.model=float16": ["dtype.model=float16", "underflow", "type dtype=fp16_mixed", "dtype=bf16"],
    "dtype.storage=float16": ["dtype.storage=float16", "below 6e-8", "type dtype.storage=bfloat16"],
    "dtype=fp16_mixed dtype.model=bfloat16": ["dtype.model=bfloat16", "dtype.autocast=null"],
    "dtype=fp16_mixed dtype.model=float64 dtype.score=float64": ["dtype.model=float64", "autocast"],
    "dtype=bf16 dtype.autocast=float16": ["dtype.model=bfloat16", "dtype.autocast=null"],
    "verify=true engine=regular": ["verify=true", "engine=regular", "type engine=graddotprod"],
    "verify=true trainer.eval_only=true": [
        "trainer.eval_only=true",
        "verify=true",
        "trainer.eval_only=false",
    ],
    "verify=true dry_run=true": ["dry_run=true", "verify=true", "type dry_run=false"],
    "verify=true preview=true": ["preview=true", "verify=true", "type preview=false"],
    "verify=true report_text=true": ["report_text=true", "verify=true", "type report_text=false"],
    "optimizer.lr=0": ["optimizer.lr=0.0", "greater than 0"],
    "optimizer.lr=nan": ["optimizer.lr=nan"],
    "optimizer.betas=[0.9]": ["optimizer.betas=[0.9]", "[0.9,0.999]"],
    "optimizer.weight_decay=-1": ["optimizer.weight_decay=-1.0"],
    "optimizer=sgd optimizer.nesterov=true": ["optimizer.nesterov=true", "optimizer.momentum=0.9"],
    "trainer.clip_grad_norm=0": ["trainer.clip_grad_norm=0.0"],
    "trainer.batch_size=0": ["trainer.batch_size=0", "trainer.batch_size=1"],
    "trainer.batch_size=513": ["trainer.batch_size=513", "data.train_samples=512"],
    "trainer.warmup_steps=25": ["trainer.warmup_steps=25", "trainer.max_steps=24"],
    "trainer.eval_only=true layers=attn": ["layers.families=[attn]", "trainer.eval_only=true"],
    "trainer.eval_only=true engine.chunk_mb=32": ["engine.chunk_mb=32", "type engine.chunk_mb=64"],
    "trainer.eval_only=true engine.algebra=fused": ["engine.algebra=fused", "engine.algebra=auto"],
    "trainer.eval_only=true engine.val_mode=separate engine.val_every=2": ["engine.val_every=2", "=1"],
    "trainer.eval_only=true engine.val_mode=separate engine.val_grad_device=cpu": [
        "engine.val_grad_device=cpu",
        "eval_only=true",
        "engine.val_grad_device=model",
    ],
    "trainer.eval_only=true engine.val_mode=separate engine.order=2": ["engine.order=2", "engine.order=1"],
    "trainer.eval_only=true trainer.compile=true": ["trainer.compile=true", "trainer.compile=false"],
    "hardware.threads=0": ["hardware.threads=0", "hardware.threads=1"],
    "tracking=none tracking.uri=http://host": ["tracking.uri=http://host", "tracking=mlflow"],
    "tracking=none tracking.run_name=a": ["tracking.run_name=a", "tracking=mlflow"],
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_impossible_combinations_are_refused(overrides: str) -> None:
    cfg = varied(overrides)
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in REFUSED[overrides]:
        assert part in sentence


def test_an_added_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.max_step: .* did you mean trainer\.max_steps\?"):
        check(composed("+trainer.max_step=3"))


ALLOWED = [
    "verify=true dtype=fp16_mixed engine.strict=true",
    "dtype.storage=bfloat16",
    "trainer.eval_only=true",
    "trainer.eval_only=true engine=regular",
    "experiment=planted engine=regular engine.bitwise=true",
    "engine.val_mode=separate engine.val_every=4 engine.bitwise=true",
    "engine.val_mode=separate engine.order=2 engine.bitwise=true engine.pairwise=true",
    "trainer.lr_schedule=constant trainer.warmup_steps=4",
    "optimizer=sgd optimizer.momentum=0.9 optimizer.nesterov=true",
    "model.config.n_positions=2048 data.seq_len=2048",
    "model.path=somewhere data.seq_len=2048",
    "data=text data.path=x trainer.batch_size=513",
    "engine.val_batch_size=30",
    "engine=gradprojlora layers=attn preview=true dtype=fp64 trainer.batch_size=513",
    "engine=gradprojlora engine.world_size=4 engine.rank=3 engine.store=x engine.storage=int8",
    "trainer.save_model=true",
]


@pytest.mark.parametrize("overrides", ALLOWED)
def test_possible_combinations_pass(overrides: str) -> None:
    check(varied(overrides))
