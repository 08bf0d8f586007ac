"""Models have the shapes that their YAML files and `model.config` give; keys that cannot be are refused."""

import logging

import pytest
import torch
from torch import nn

from conf.errors import ConfigError
from runners.choices import TaskName
from runners.losses import build_task
from runners.models import build_model, build_on_meta, place
from runners.models.hf_config import DataFacts, check_model
from runners.tasks import model_task
from tests.runners.models.zoo import CONF, CPU, TINY, VOCABULARY, composed, rows, tiny

THOUSAND = "model.config.num_labels=1000"
TWO = "model.config.num_labels=2"
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "smollm2-135m": 134_515_008,
    "qwen2-0.5b": 494_032_768,
    "opt-125m": 125_239_296,
    "t5-small": 60_506_624,
    f"bert-base {TWO}": 109_483_778,
    f"minilm {TWO}": 22_713_986,
    f"vit-base {THOUSAND}": 86_567_656,
    f"resnet-18 {THOUSAND}": 11_689_512,
    f"resnet-50 {THOUSAND}": 25_557_032,
    "llava-7b model.path=null": 7_063_427_072,
    "llava-13b model.path=null": 13_351_494_656,
}


def gpt2(*overrides: str, vocab_size: int | None = VOCABULARY) -> nn.Module:
    shape = ["n_layer=1", "n_head=2", "n_embd=8", "n_positions=32", f"vocab_size={VOCABULARY}"]
    words = [f"model.config.{key}" for key in shape]
    return build_model(composed("model=gpt2-tiny", *words, *overrides).model, vocab_size, None, None)


def refused(*overrides: str) -> str:
    cfg = composed(*overrides)
    with pytest.raises(ConfigError) as caught:
        check_model(cfg.model, DataFacts(seq_len=16))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_sizes(command: str) -> None:
    model = build_on_meta(composed(*f"model={command}".split()).model, DataFacts())
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[command]
    assert all(p.is_meta for p in model.parameters())


def test_every_file_is_of_a_published_size_or_tiny() -> None:
    names = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert names == {command.split()[0] for command in PUBLISHED} | set(TINY) | {
        "gpt2-mini",
        "gpt2-nano",
        "hf",
        "mlp-tiny",
    }


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_learn_from_their_rows(name: str) -> None:
    """A few plain steps lower the loss, and a row's loss is what it is alone."""
    model, task = tiny(name)
    X, Y = rows(model_task(composed(f"model={name}").model), 4, 1)
    first = task.loss(model, X, Y)
    for i in range(4):
        row = {key: value[i : i + 1] for key, value in X.items()} if isinstance(X, dict) else X[i : i + 1]
        alone = task.loss(model, row, Y[i : i + 1])
        torch.testing.assert_close(alone.row_sums[0], first.row_sums[i], rtol=1e-5, atol=1e-7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        task.mean(model, X, Y).backward()
        optimizer.step()
    assert task.mean(model, X, Y).item() < first.mean.item()


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("mlp", "cnn")])
def test_the_loss_is_hugging_faces_own(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, task = tiny(name)
    X, Y = rows(model_task(composed(f"model={name}").model), 4, 1)
    inputs = X if isinstance(X, dict) else {"pixel_values": X}
    torch.testing.assert_close(
        task.mean(model, X, Y), model(**inputs, labels=Y).loss.double(), rtol=1e-5, atol=0
    )
    assert not caplog.records  # transformers guesses at a loss with a warning


def test_the_data_fills_what_is_null() -> None:
    cfg = composed("model=vit-tiny").model
    model = build_model(cfg, None, (1, 6, 6), 3)
    assert (model.config.num_channels, model.config.image_size, model.config.num_labels) == (1, 6, 3)
    assert model(pixel_values=torch.zeros(2, 1, 6, 6)).logits.shape == (2, 3)
    assert build_model(composed("model=bert-tiny").model, 77, None, 4).config.vocab_size == 77
    assert build_model(composed("model=llava-tiny").model, 50_300, None, None).lm_head.out_features == 50_300


def test_dropout_is_off_unless_given_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = build_model(
            composed("model=bert-tiny", "model.config.hidden_dropout_prob=0.25").model, 40, None, 2
        )
    assert model.config.hidden_dropout_prob == 0.25
    assert model.config.attention_probs_dropout_prob == 0.0
    said = [record.getMessage() for record in caplog.records if "Dropout is off" in record.getMessage()]
    assert len(said) == 1
    assert "model.config.attention_probs_dropout_prob" in said[0]
    assert "hidden_dropout_prob" not in said[0].replace("attention_probs_dropout_prob", "")


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("mlp", "cnn")])
def test_nothing_is_dropped_out_and_nothing_cached(name: str) -> None:
    model, _ = tiny(name)
    assert model.training
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.0}
    for config in (model.config, model.config.get_text_config()):
        values = config.to_dict()
        assert not any(values[key] for key in values if "drop" in key)
        assert not values.get("use_cache")


@pytest.mark.parametrize(
    "name", ["gpt2-tiny", "opt-tiny", "pythia-tiny", "llama-tiny", "bert-tiny", "t5-tiny"]
)
def test_special_tokens_are_within_the_vocabulary(name: str, caplog: pytest.LogCaptureFixture) -> None:
    cfg = composed(f"model={name}", "model.config.vocab_size=2").model
    config = build_model(cfg, 2, None, 2).config
    tokens = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id")}
    assert tokens
    assert all(value is None or value < 2 for value in tokens.values()), tokens
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_batch_norm_keeps_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = build_model(composed("model=resnet-tiny").model, None, (3, 8, 8), 2)
    assert model.training
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert f"{len(norms)} BatchNorm layers keep their running statistics" in caplog.text


def test_head_is_the_embedding_or_its_own() -> None:
    tied, own = gpt2(), gpt2("model.config.tie_word_embeddings=false")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert own.lm_head.weight is not own.transformer.wte.weight


def test_attention_as_configured() -> None:
    assert gpt2("model.attn_implementation=eager").config._attn_implementation == "eager"
    assert gpt2().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_placing_leaves_rotary_frequencies_alone(dtype: str) -> None:
    model = build_model(composed("model=llama-tiny").model, 40, None, None)
    expected = model.model.rotary_emb.inv_freq.clone()
    place(model, CPU, getattr(torch, dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


def test_placing_takes_batch_statistics_along() -> None:
    model = build_model(composed("model=resnet-tiny").model, None, (3, 8, 8), 2)
    place(model, CPU, torch.bfloat16)
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.bfloat16}
    assert model(pixel_values=torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)).logits.dtype == torch.bfloat16


def test_images_in_a_batch_get_the_weights_dtype_and_tokens_stay() -> None:
    task = build_task(composed("model=llava-tiny", "dtype=bf16"), CPU)
    X, Y = rows(TaskName.image_text, 2, 1)
    placed, _ = task.place(X, Y)
    assert placed["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(placed["input_ids"], X["input_ids"])


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "model.config.n_layr=3": "n_layr is no key of GPT2Config: did you mean model.config.n_layer?",
    "model.config.hidden_size=3": "did you mean model.config.n_embd?",
    "model.config.attn_implementation=eager": "did you mean model.attn_implementation?",
    "model.config.use_cache=true": "model.config.use_cache is no key of GPT2Config",
    "model.config.num_labels=3": "model.config.num_labels is no key of GPT2Config",
    "model.config.n_layer=0": "model.config.n_layer=0 must be at least 1",
    "model.config.n_layer=two": "Field 'n_layer' expected int, got str (value: 'two')",
    "model.config.attn_pdrop=1.5": "model.config.attn_pdrop=1.5 must be at least 0 and less than 1",
    "model.config.n_embd=33": "model.config.n_embd=33 must be a multiple of model.config.n_head=2",
    "model.config.eos_token_id=50257": "eos_token_id=50257 is no token: type a number from 0 to 50256",
    "model.config.n_positions=8": "data.seq_len=16 is more than model.config.n_positions=8",
    "model=llama-tiny model.config.num_key_value_heads=3": (
        "model.config.num_attention_heads=4 must be a multiple of model.config.num_key_value_heads=3"
    ),
    "model=vit-base model.config.patch_size=15": (
        "model.config.image_size=224 must be a multiple of model.config.patch_size=15"
    ),
    "model=resnet-tiny model.attn_implementation=sdpa": "type model.attn_implementation=null",
    "model=llava-tiny model.config.text_config.n_layer=2": (
        "model.config.text_config.n_layer is no key of LlamaConfig"
    ),
    "model=llava-tiny model.config.text_config.model_type=lama": "did you mean llama?",
    "model=llava-tiny model.config.text_config.hidden_size=0": "text_config.hidden_size=0 must be at least 1",
    "model=llava-tiny model.config.vision_config.patch_size=5": (
        "vision_config.image_size=32 must be a multiple of model.config.vision_config.patch_size=5"
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", REFUSED)
def test_impossible_keys_are_refused(command: str) -> None:
    words = command.split()
    model = [] if words[0].startswith("model=") else ["model=gpt2-tiny"]
    assert REFUSED[command] in refused(*model, *words)


def test_keys_are_checked_where_a_saved_model_gives_the_rest() -> None:
    assert "did you mean model.config.n_layer?" in refused("model.path=somewhere", "model.config.n_layr=3")


@pytest.mark.parametrize(
    ("command", "facts", "said"),
    [
        ("model=gpt2-tiny", DataFacts(vocab_size=60_000), "vocab_size=50257 is below the 60000 tokens"),
        ("model=llava-tiny model.config.text_config.vocab_size=9", DataFacts(vocab_size=10),
         "model.config.text_config.vocab_size=9 is below the 10 tokens"),
        (f"model=vit-tiny {TWO}", DataFacts(input_shape=(3, 8, 8), num_classes=3), "is below the data's 3"),
        ("model=vit-base", DataFacts(input_shape=(3, 8, 8), num_classes=3),
         "model.config.image_size=224 does not fit the data's images [3, 8, 8]: type 8"),
        ("model=resnet-18", DataFacts(input_shape=(1, 8, 8), num_classes=3),
         "model.config.num_channels=3 does not fit the data's images [1, 8, 8]: type 1"),
        ("model=vit-tiny", DataFacts(input_shape=(1, 8, 6), num_classes=3), "image_size=8 does not fit"),
        ("model=vit-tiny", DataFacts(input_shape=(1, 9, 9), num_classes=3), "must be a multiple of"),
        ("model=llava-tiny", DataFacts(vocab_size=50_258, input_shape=(3, 16, 16)),
         "model.config.vision_config.image_size=32 does not fit"),
        ("model=mlp", DataFacts(vocab_size=9), "model=mlp needs labelled tables or images"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused(command: str, facts: DataFacts, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_on_meta(composed(*command.split()).model, facts)
    assert said in str(caught.value)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.config makes no gpt2: .*gelo"):
        gpt2("model.config.activation_function=gelo")


def test_a_new_key_needs_no_plus() -> None:
    assert gpt2("model.config.layer_norm_epsilon=1e-3").transformer.ln_f.eps == 1e-3
