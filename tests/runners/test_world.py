"""Which process this is, what it may be asked to do, and how several end together."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conf.errors import ConfigError, UserError
from ghost.errors import GhostError
from runners import together
from runners.launch import FIRST_PORT, PORTS, Launch, first_host, launched
from runners.logs import log_by_rank
from runners.together import EndingTogether, Failure, PeerFailedError, main_says, note_failure, wait_for_all
from runners.validate_world import refuse_sweep
from runners.world import ALONE, World, joined_world
from tests.runners.conftest import Line

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0",
}  # fmt: skip


# ---------------------------------------------------------------- how it was started


def test_torchrun_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("torchrun", "--nnodes", "2", "--nproc-per-node", "3")
    assert launched(TORCHRUN) == Launch(5, 6, 2, 3, "gpu03", 29500, command)
    assert launched(TORCHRUN | SLURM).address == "gpu03"  # torchrun inside of a SLURM job
    here = launched(TORCHRUN | {"WORLD_SIZE": "3", "RANK": "0"})
    assert here.command == ("torchrun", "--nproc-per-node", "3")


def test_slurms_step_says_all_but_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.launch.first_host", lambda hosts: {"gpu[03-05]": "gpu03"}[hosts])
    found = launched(SLURM)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (4, 5, 0, 1)
    assert found.address == "gpu03"
    assert FIRST_PORT <= found.port < FIRST_PORT + PORTS
    assert found.port != launched(SLURM | {"SLURM_STEP_ID": "1"}).port
    assert launched(SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}).address == "127.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_one_process_is_alone(environ: dict[str, str]) -> None:
    assert launched(environ) == Launch()


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a whole number"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_NODES is not set"),
    ],
)
def test_half_a_description_is_refused(environ: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        launched(environ)


def test_without_scontrol_there_is_no_first_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"gpu\[03-05\], and there is no scontrol"):
        first_host("gpu[03-05]")


# ---------------------------------------------------------------- what is refused

SMALL = ["model=mlp", "data=digits", "tracking=none"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["hardware=ddp"], "needs several processes, and this is one: type torchrun --nproc-per-node 2 run"),
        (["hardware=fsdp", "hardware.processes=4"], "that were started, 1: type torchrun --nproc-per-node 4"),
        (["hardware=ddp", "hardware.processes=1"], "nothing to share: type hardware.strategy=none"),
        (["hardware=ddp", "hardware.offload=true"], "no effect with hardware.strategy=ddp"),
        (["hardware.reduce_dtype=float32"], "no effect with hardware.strategy=none"),
        (["hardware=fsdp", "dtype=fp16_mixed"], "dtype=bf16_mixed, or hardware.strategy=ddp"),
        (["hardware=fsdp", "hardware.device=cpu", "hardware.offload=true"], "has nowhere to move from"),
        (["model=llava-tiny", "data=digit_questions", "hardware=fsdp"], "where a batch has no image: type"),
        (["hardware=ddp", "engine=gradprojlora"], "number of processes can write one store"),
        (["hardware=ddp", "verify=true"], "has no effect with verify=true"),
        (["hardware=fsdp", "dry_run=true"], "type hardware.processes=2, say"),
        (["trainer.activation_checkpointing=true"], "is for Hugging Face's models"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    line: Line, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert line(*SMALL, *arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert why in said[0]


def test_a_sweep_in_several_processes_is_refused() -> None:
    refuse_sweep(["-m", "seed=0,1"], Launch())
    refuse_sweep(["seed=0"], Launch(world_size=2))
    with pytest.raises(ConfigError, match="-m starts jobs, and this is one of 2 processes"):
        refuse_sweep(["seed=0,1", "-m"], Launch(world_size=2))


# ---------------------------------------------------------------- one process


def test_one_process_needs_no_group() -> None:
    with joined_world() as world:
        assert world is ALONE
        assert not dist.is_initialized()
    values = torch.tensor([1.0, 2.0])
    assert ALONE.sum(values) is values
    assert ALONE.max(values) is values
    assert ALONE.broadcast("x") == "x"
    assert ALONE.on_main(lambda: 3) == 3
    ALONE.barrier()
    with pytest.raises(ConfigError, match="as it is"), EndingTogether(ALONE):
        raise ConfigError("as it is")


# ---------------------------------------------------------------- how several end


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> tuple[World, World]:
    """Two ranks with a place for notes between them, and no patience."""
    monkeypatch.setattr(together, "REASON_SECONDS", 0.2)
    monkeypatch.setattr(together, "SAME_SECONDS", 0.2)
    store = dist.HashStore()
    return World(0, 2, 0, store=store), World(1, 2, 1, store=store)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The root logger as Hydra leaves it."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield root
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers


def fail_with(world: World, error: BaseException) -> None:
    with EndingTogether(world):
        raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("data.path=x is gone"), 2, "data.path=x is gone"),
        (GhostError("a layer is refused"), 2, "a layer is refused"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (SystemExit(143), 143, "SystemExit: 143"),
    ],
)
def test_a_process_left_by_another_says_which_and_why(
    worlds: tuple[World, World], error: BaseException, code: int, text: str
) -> None:
    main, other = worlds
    with pytest.raises(type(error)):
        fail_with(other, error)
    broken = dist.DistBackendError("Connection closed by peer")
    with pytest.raises(PeerFailedError) as left:
        fail_with(main, broken)
    assert str(left.value) == f"Rank 1 has failed, see run-rank00001.log: {text}"
    assert left.value.exit_code == code
    assert left.value.__cause__ is broken


def test_a_process_that_has_gone_without_a_word(worlds: tuple[World, World]) -> None:
    with pytest.raises(PeerFailedError, match="without a word: look at all of") as left:
        fail_with(worlds[0], RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer"))
    assert left.value.exit_code == 1


def test_what_both_say_is_said_by_the_main_process(worlds: tuple[World, World]) -> None:
    main, other = worlds
    assert other.store is not None
    assert not main_says(other.store, "x")
    note_failure(other.store, main.rank, Failure("x", 2))
    assert main_says(other.store, "x")
    assert not main_says(other.store, "y")


def test_the_main_process_waits_for_all(worlds: tuple[World, World]) -> None:
    main, other = worlds
    wait_for_all(other)
    wait_for_all(main)
    late = World(1, 3, store=dist.HashStore())
    waiting = threading.Thread(target=wait_for_all, args=(World(0, 3, store=late.store),))
    waiting.start()
    wait_for_all(late)
    waiting.join(0.2)
    assert waiting.is_alive()
    wait_for_all(late)
    waiting.join(5)
    assert not waiting.is_alive()


def test_the_main_process_does_not_wait_for_one_that_has_failed(worlds: tuple[World, World]) -> None:
    main, other = worlds
    with pytest.raises(UserError):
        fail_with(other, ConfigError("no room"))
    with pytest.raises(PeerFailedError, match=r"Rank 1 .* no room"):
        wait_for_all(main)


def test_each_process_has_its_log_and_one_has_the_console(
    tmp_path: Path, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.handlers[:] = [logging.StreamHandler(), logging.FileHandler(tmp_path / "run.log")]
    logger.setLevel(logging.INFO)
    log_by_rank(World(0, 2), tmp_path)
    logger.info("from the main one")
    log_by_rank(World(1, 2), tmp_path)
    logger.info("for the file")
    logger.warning("for both")
    assert (tmp_path / "run.log").read_text() == "from the main one\n"
    assert (tmp_path / "run-rank00001.log").read_text() == "for the file\nfor both\n"
    said = capsys.readouterr().err
    assert "from the main one" in said
    assert "WARNING rank 1: for both" in said
    assert "for the file" not in said
