"""Models have the shapes that the config gives, and what `model.path` names is loaded whole or refused."""

import json
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from runners import pretrained
from runners.dryrun import build_on_meta
from runners.errors import ConfigError
from runners.models import build_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 32, "vocab_size": 40}
KEYS = [f"model.config.{key}={value}" for key, value in SHAPE.items()]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def gpt2(*overrides: str, vocab_size: int | None = 40) -> nn.Module:
    return build_model(composed(*overrides).model, vocab_size, None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small GPT-2 as `save_pretrained` leaves it."""
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config(**SHAPE)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)  # fmt: skip
def test_gpt2_has_the_published_sizes(name: str, parameters: int) -> None:
    model = build_on_meta(composed(f"model={name}"))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_gpt2_has_no_dropout_and_its_head_is_the_embedding() -> None:
    model = gpt2("model=gpt2-tiny", *KEYS)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_untied_head_and_attention_as_configured() -> None:
    model = gpt2(*KEYS, "model.config.tie_word_embeddings=false", "model.config.attn_implementation=eager")
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.config._attn_implementation == "eager"


def test_a_vocabulary_below_the_datas_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.config\.vocab_size=40 .* use at least 41"):
        gpt2(*KEYS, vocab_size=41)


def test_mlp_widths() -> None:
    model = build_model(composed("model=mlp", "model.hidden=[7,5]").model, None, (64,), 10)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(7, 64), (5, 7), (10, 5)]
    assert model(torch.zeros(3, 64)).shape == (3, 10)


@pytest.mark.parametrize("channels", ["[4]", "[4,6]", "[2,2,2,2,2]"])
def test_cnn_takes_maps_of_any_size(channels: str) -> None:
    model = build_model(composed("model=cnn", f"model.channels={channels}").model, None, (1, 8, 8), 10)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_tables_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="model=mlp needs labelled tables or images"):
        build_model(composed("model=mlp").model, 100, None, None)


# ---------------------------------------------------------------- model.path


def test_weights_come_from_the_folder_and_dropout_from_the_config(folder: Path) -> None:
    model = gpt2(f"model.path={folder}", *KEYS, "model.config.attn_pdrop=0.25")
    expected = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.config.attn_pdrop == 0.25
    assert model.config.resid_pdrop == 0.0  # 0.1 in the folder
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert gpt2("model.path='~/saved'", *KEYS).config.n_embd == 8


def test_keys_that_the_folder_contradicts_are_refused_with_what_to_type(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        gpt2(f"model.path={folder}", *KEYS, "model.config.n_layer=3", "model.config.vocab_size=50")
    given, _, right = str(caught.value).partition(": type ")
    assert given.endswith("than model.config.n_layer=3 model.config.vocab_size=50")
    assert right == "model.config.n_layer=1 model.config.vocab_size=40"
    assert gpt2(f"model.path={folder}", *KEYS, *right.split()).config.n_layer == 1


def test_a_dry_run_counts_a_saved_model_and_checks_it(folder: Path) -> None:
    model = build_on_meta(composed(f"model.path={folder}", *KEYS))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in GPT2LMHeadModel.from_pretrained(folder).parameters()
    )
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ConfigError, match=r"type model\.config\.n_layer=1"):
        build_on_meta(composed(f"model.path={folder}", *KEYS, "model.config.n_layer=3"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path=.* holds no config\.json"):
        gpt2(f"model.path={tmp_path}", *KEYS)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "runs/nowhere/model"])
def test_what_can_only_be_a_folder_is_not_sought_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pretrained.HfApi, "model_info")
    with pytest.raises(ConfigError, match=rf"^model\.path={path} is no folder"):
        gpt2(f"model.path={path}", *KEYS)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=40, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a model of type bert: give a GPT-2"):
        gpt2(f"model.path={tmp_path}", *KEYS)


def test_missing_weights_are_refused(folder: Path) -> None:
    """A shorter model's weights under a longer model's config would leave a random block behind."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ConfigError, match=r"lacks 12 weights .* such as transformer\.h\.1\."):
        gpt2(f"model.path={folder}", *KEYS, "model.config.n_layer=2")


@pytest.mark.parametrize("size", [0, 20, 2000])
def test_damaged_weights_are_refused(folder: Path, size: int) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(size)
    with pytest.raises(ConfigError, match=r"^model\.path=.* has no weights that fit: .") as caught:
        gpt2(f"model.path={folder}", *KEYS)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 1, so the answer is immediate; retries would take half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert pretrained.HfApi().endpoint == "http://127.0.0.1:1"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"^model\.path=nobody/nothing is no folder with a GPT-2") as caught:
        gpt2("model.path=nobody/nothing", *KEYS)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
