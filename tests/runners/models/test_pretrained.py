"""What `model.path` names is loaded whole, for every architecture, or refused in a sentence."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from conf.errors import ConfigError
from runners.models import build_model, build_on_meta, pretrained
from runners.models.hf_config import DataFacts
from tests.runners.models.zoo import CLASSES, OVERRIDES, TINY, VOCABULARY, composed, tiny

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 32, "vocab_size": 40}
KEYS = [f"model.config.{key}={value}" for key, value in SHAPE.items()]
SAVED = [name for name in TINY if name not in ("mlp", "cnn")]
CLASSIFIERS = ("bert-tiny", "vit-tiny", "resnet-tiny")


def gpt2(*overrides: str, vocab_size: int | None = 40) -> nn.Module:
    return build_model(composed("model=gpt2", *KEYS, *overrides).model, vocab_size, None, None)


def rebuilt(name: str, path: Path, classes: int = CLASSES) -> nn.Module:
    cfg = composed(f"model={name}", *OVERRIDES.get(name, []), f"model.path={path}").model
    return build_model(cfg, VOCABULARY, (3, 8, 8), classes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small GPT-2 as `save_pretrained` leaves it."""
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config(**SHAPE)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def saved(name: str, folder: Path) -> nn.Module:
    """The tiny model, in float32, and a copy in the folder."""
    model, _ = tiny(name)
    assert isinstance(model, PreTrainedModel)
    model.float().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", SAVED)
def test_every_architecture_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path).state_dict()
    model = rebuilt(name, tmp_path)
    assert model.training
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not any(norm.training for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize("name", SAVED)
def test_a_dry_run_counts_a_saved_model(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    cfg = composed(
        "model=hf", f"model.architecture={model.config.model_type}", f"model.path={tmp_path}"
    ).model
    empty = build_on_meta(cfg, DataFacts(VOCABULARY, (3, 8, 8), CLASSES))
    assert all(p.is_meta for p in empty.parameters())
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", SAVED)
def test_missing_weights_are_refused(name: str, tmp_path: Path) -> None:
    """A shorter model's weights under a longer model's config would leave random blocks behind."""
    saved(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    part = config.get("text_config", config)
    longer = {"n_layer": 3, "num_layers": 3, "num_hidden_layers": 3, "depths": [1, 2]}
    part |= {key: value for key, value in longer.items() if key in part}
    config.pop("layer_types", None)  # Qwen2's, one for each layer
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = composed("model=hf", f"model.architecture={config['model_type']}", f"model.path={tmp_path}").model
    with pytest.raises(ConfigError, match=r"^model\.path=\S+ lacks \d+ weights of a \w+, such as \S+: give"):
        build_model(cfg, VOCABULARY, (3, 8, 8), CLASSES)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gets_a_new_head_for_other_classes(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = saved(name, tmp_path).state_dict()
    with caplog.at_level(logging.INFO, logger="runners"):
        model = rebuilt(name, tmp_path, classes=3)
    assert model.config.num_labels == 3
    head = {key for key in expected if key.startswith("classifier")}
    same = {key for key, value in model.state_dict().items() if torch.equal(value, expected[key])}
    assert same == set(expected) - head
    said = [record.getMessage() for record in caplog.records if "from a random start" in record.getMessage()]
    assert len(said) == 1
    assert all(key in said[0] for key in head)


def test_a_bare_encoder_becomes_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertModel(BertConfig(vocab_size=40, **shape))
    encoder.save_pretrained(tmp_path)
    cfg = composed("model=hf", "model.architecture=bert", f"model.path={tmp_path}").model
    with caplog.at_level(logging.INFO, logger="runners"):
        model = build_model(cfg, 40, None, 4)
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight
    )
    assert model.classifier.weight.shape == (4, 8)
    assert "from a random start: classifier.bias, classifier.weight" in caplog.text


def test_a_damaged_config_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": "one"}))
    with pytest.raises(ConfigError, match=r"^model\.path=\S+ makes no GPT2Config: .*expected int, got str"):
        gpt2(f"model.path={folder}")


def test_weights_come_from_the_folder_and_dropout_from_the_config(folder: Path) -> None:
    model = gpt2(f"model.path={folder}", "model.config.attn_pdrop=0.25")
    expected = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.config.attn_pdrop == 0.25
    assert model.config.resid_pdrop == 0.0  # 0.1 in the folder
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert gpt2("model.path='~/saved'").config.n_embd == 8


def test_keys_that_the_folder_contradicts_are_refused_with_what_to_type(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        gpt2(f"model.path={folder}", "model.config.n_layer=3", "model.config.vocab_size=50")
    given, _, right = str(caught.value).partition(": type ")
    assert given.endswith("than model.config.n_layer=3 model.config.vocab_size=50")
    assert right == "model.config.n_layer=1 model.config.vocab_size=40"
    assert gpt2(f"model.path={folder}", "model.config.n_layer=3", *right.split()).config.n_layer == 1
    cfg = composed("model=gpt2", *KEYS, f"model.path={folder}", "model.config.n_layer=3").model
    with pytest.raises(ConfigError, match=r"type model\.config\.n_layer=1$"):
        build_on_meta(cfg, DataFacts())


def test_a_row_longer_than_the_saved_model_takes_is_refused(folder: Path) -> None:
    cfg = composed("model=hf", "model.architecture=gpt2", f"model.path={folder}").model
    with pytest.raises(ConfigError, match=r"^data\.seq_len=33 is more than model\.config\.n_positions=32"):
        build_model(cfg, 40, None, None, seq_len=33)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path=.* holds no config\.json"):
        gpt2(f"model.path={tmp_path}")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "runs/nowhere/model"])
def test_what_can_only_be_a_folder_is_not_sought_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pretrained.HfApi, "model_info")
    with pytest.raises(ConfigError, match=rf"^model\.path={path} is no folder"):
        gpt2(f"model.path={path}")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    saved("bert-tiny", tmp_path)
    with pytest.raises(ConfigError, match="holds a model of type bert: give a gpt2"):
        gpt2(f"model.path={tmp_path}")


@pytest.mark.parametrize("size", [0, 20, 2000])
def test_damaged_weights_are_refused(folder: Path, size: int) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(size)
    with pytest.raises(ConfigError, match=r"^model\.path=.* has no weights that fit: .") as caught:
        gpt2(f"model.path={folder}")
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 1, so the answer is immediate; retries would take half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert pretrained.HfApi().endpoint == "http://127.0.0.1:1"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"^model\.path=nobody/nothing is no folder with a gpt2") as caught:
        gpt2("model.path=nobody/nothing")
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- GGUF files


def test_a_gguf_file_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "GGUF_PACKAGES", ("gguf_of_nobody",))
    with pytest.raises(ConfigError, match=r"needs gguf_of_nobody: run pip install 'ghostrunner\[gguf\]'"):
        gpt2(f"model.path={tmp_path}/a.gguf")


@pytest.mark.parametrize("content", [None, b"", b"GGUF but not really"])
def test_gguf_files_that_are_missing_or_damaged_are_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^model\.path=\S+a\.gguf") as caught:
        gpt2(f"model.path={tmp_path}/a.gguf")
    assert "\n" not in str(caught.value)
