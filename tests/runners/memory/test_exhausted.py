"""A run that finds no memory ends with what to type, and keeps what it has scored."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from ghost.memory import is_out_of_memory
from runners.memory.estimate import PROCESS, MemoryEstimate
from runners.memory.exhausted import MemoryExhaustedError, memory_errors_named, sentence
from runners.memory.rehearsal import ACTIVATIONS, BACKWARD, LOGITS, OPTIMIZER, TARGETS, WEIGHTS
from tests.runners.models.zoo import composed
from tests.runners.resume.harness import DIGITS, ROOT

GIB = 2**30
# The fourth step finds that the process may take no more than it has.
STARTER = """
import resource, sys
from pathlib import Path
from runners import cli
from runners.loop import TrainingLoop
plain = TrainingLoop._micro_batch

def starved(self, batch, step, **keys):
    if step == 3:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20,) * 2)
    return plain(self, batch, step, **keys)

if sys.argv.pop(1) == "starved":
    TrainingLoop._micro_batch = starved
sys.exit(cli.main())
"""
# 256 rows on 100,000 hidden values are 100 MB.
WIDE = [
    "model.hidden=[100000]", "trainer.batch_size=256", "engine.val_batch_size=2", "trainer.eval_batch_size=2",
    "data.val_samples=4", "trainer.checkpoint_every=null", "trainer.max_steps=5", "tracking=none",
]  # fmt: skip


def run(folder: Path, how: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", STARTER, how, *arguments]
    return subprocess.run(argv, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_that_finds_no_memory_says_what_to_lower_and_keeps_its_scores(tmp_path: Path) -> None:
    done = run(tmp_path, "starved", *DIGITS, *WIDE, "hydra.run.dir=out")
    said = done.stderr + done.stdout
    assert done.returncode == 2, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert "memory has run out" in last
    assert "lower trainer.batch_size=256" in last
    assert "resume=" in said
    assert (tmp_path / "out" / "checkpoints" / "step-00000003").is_dir()
    shards = [torch.load(path, weights_only=True) for path in (tmp_path / "out/scores").glob("*.pt")]
    assert sorted({int(step) for shard in shards for step in shard["step"]}) == [0, 1, 2]


@pytest.mark.slow
def test_it_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    assert run(tmp_path, "starved", *DIGITS, *WIDE, "hydra.run.dir=out").returncode == 2
    assert run(tmp_path, "fed", "resume=out").returncode == 0
    whole = run(tmp_path, "fed", *DIGITS, *WIDE, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("out", "whole")]
    losses = [[json.loads(line).get("train/loss") for line in found] for found in lines]
    assert losses[0] == losses[1]


def advice(estimate: MemoryEstimate | None, *overrides: str) -> str:
    cfg: DictConfig = composed("model=gpt2-tiny", *overrides)
    return sentence(cfg, estimate)


def test_the_largest_terms_come_first() -> None:
    said = advice(MemoryEstimate({ACTIVATIONS: 3 * GIB, OPTIMIZER: GIB, WEIGHTS: 2**20}, on_device=False))
    assert "4.00 GiB of host memory (3.00 GiB activations, 1.00 GiB optimizer" in said
    assert said.index("trainer.batch_size=8") < said.index("optimizer=sgd")
    assert "trainer.activation_checkpointing=true" in said
    assert "engine.val_mode" not in said


def test_only_what_bounds_something_is_named() -> None:
    said = advice(MemoryEstimate({OPTIMIZER: GIB, LOGITS: 1, PROCESS: 2**20}, on_device=False))
    assert "optimizer=sgd" in said
    assert "batch_size" not in said
    small = advice(
        MemoryEstimate({BACKWARD: GIB}, on_device=False), "trainer.batch_size=1", "engine.val_batch_size=1"
    )
    assert "batch_size=1" not in small
    assert "data.seq_len=128" in small


def test_validation_gradients_can_go_to_the_cpu_of_a_gpu_run_alone() -> None:
    terms = {TARGETS: GIB}
    on_gpu = advice(MemoryEstimate(terms, on_device=True), "engine.val_mode=separate")
    assert "engine.val_grad_device=cpu" in on_gpu
    assert "engine.val_mode=concat" in on_gpu
    on_cpu = advice(MemoryEstimate(terms, on_device=False), "engine.val_mode=separate")
    assert "engine.val_grad_device" not in on_cpu
    assert "engine.pairwise=false" in advice(
        MemoryEstimate(terms, on_device=False), "engine.val_mode=separate", "engine.pairwise=true"
    )


def test_no_key_is_named_that_the_run_would_refuse() -> None:
    held = MemoryEstimate({TARGETS: GIB, OPTIMIZER: GIB, ACTIVATIONS: GIB}, on_device=True)
    for keys in (["engine.order=2"], ["engine.bitwise=true"], ["engine.val_every=2"]):
        assert "engine.val_mode=concat" not in advice(held, "engine.val_mode=separate", *keys)
    second = advice(held, "engine.val_mode=separate", "engine.order=2", "hardware.strategy=ddp")
    assert "engine.order=1" in second
    assert "hardware.strategy=fsdp" not in second
    weighed = advice(held, "policy=top_k", "hardware.strategy=ddp")
    assert "policy=none" in weighed
    assert "hardware.strategy=fsdp" not in weighed
    assert "optimizer=sgd" in advice(held, "optimizer=adam")
    assert "optimizer=sgd" not in advice(held, "optimizer=adam", "engine.preconditioner=adam")


def test_a_chunk_is_worth_no_more_than_it_holds() -> None:
    small, large = ({BACKWARD: size, LOGITS: size} for size in (2**28, 2**40))
    assert "lower engine.chunk_mb=64" in advice(MemoryEstimate(small, on_device=False))
    assert "chunk_mb" not in advice(MemoryEstimate(large, on_device=False))
    assert "chunk_mb" not in advice(MemoryEstimate(small, on_device=False), "engine.chunk_mb=8")


def test_an_evaluation_has_its_own_batch() -> None:
    said = advice(None, "trainer.eval_only=true")
    assert "trainer.eval_batch_size=8" in said
    assert "trainer.batch_size" not in said


def test_without_an_estimate_keys_are_named_all_the_same() -> None:
    assert "trainer.batch_size=8" in advice(None)
    assert "engine.save_every=64" in advice(None, "engine=gradprojlora")


def test_allocators_errors_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(OSError())


def test_other_errors_pass() -> None:
    cfg = composed("model=gpt2-tiny")
    with pytest.raises(RuntimeError, match="other"), memory_errors_named(cfg, None):
        raise RuntimeError("other")
    with pytest.raises(MemoryExhaustedError, match="memory has run out"), memory_errors_named(cfg, None):
        raise MemoryError
