"""The command line: one sentence an error, exit codes, experiments by path, help, what is not imported."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from conf.command import FAILED, INTERRUPTED, MISTAKE
from runners.errors import DataError
from tests.runners.conftest import Line

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "mlflow", "matplotlib", "sklearn", "numpy"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """Stands in for training: records the configs; the seed decides how a run ends."""
    configs: list[DictConfig] = []
    ends: dict[int, BaseException] = {
        1: DataError("data.path=x is empty: type data.path=PATH"),
        2: ValueError("surprise"),
        3: KeyboardInterrupt(),
    }

    def run(cfg: DictConfig, *_: object) -> float:
        OmegaConf.resolve(cfg)  # output_dir is known only while the job runs
        configs.append(cfg)
        if cfg.seed in ends:
            raise ends[cfg.seed]
        return 1.5

    module = ModuleType("runners.train")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runners.train", module)
    return configs


MISTAKES = {
    "model=gpt3": ["model=gpt3", "did you mean gpt2?", "gpt2-tiny", "mlp"],
    "modle=gpt2": ["modle=gpt2", "did you mean model?"],
    "trainer.max_step=3": ["trainer.max_step=3", "did you mean trainer.max_steps?"],
    "max_steps=3": ["max_steps=3", "did you mean trainer.max_steps?"],
    "foo.bar=1": ["foo.bar=1", "there is no key foo", "trainer"],
    "experimnt=planted": ["experimnt=planted", "did you mean experiment?"],
    "experiment=plantd": ["experiment=plantd", "did you mean planted?"],
    "experiment=nowhere.json": ["experiment=nowhere.json", "no such file"],
    "+experiment=planted": ["experiment=CHOICE", "without +"],
    "trainer.max_steps=abc": ["trainer.max_steps=abc", "a whole number"],
    "trainer.max_steps=2.5": ["trainer.max_steps=2.5", "a whole number"],
    "trainer.max_steps=null": ["trainer.max_steps=null", "needs a value"],
    "trainer.eval_only=maybe": ["trainer.eval_only=maybe", "true or false"],
    "optimizer.lr=fast": ["optimizer.lr=fast", "a number"],
    "optimizer.betas=3": ["optimizer.betas=3", "a list"],
    "engine.val_mode=concta": ["engine.val_mode=concta", "did you mean concat?", "separate"],
    "layers.families=[attnn]": ["=attnn", "did you mean attn?", "norm"],
    "~trainer.max_steps": ["trainer.max_steps", "cannot be deleted"],
    "model=3": ["model=3", "--help"],
    "seed=0,1": ["seed=0,1", "add -m"],
    "a b=": ["'a b='", "key=value"],
    "data=text": ["data.path", "data.path=VALUE"],
    "engine.bitwise=true": ["engine.bitwise=true", "engine.val_mode=separate"],
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistakes_get_one_line_and_leave_nothing(
    argument: str, line: Line, trained: list[DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line(argument) == MISTAKE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    for part in MISTAKES[argument]:
        assert part in printed.err
    assert not trained
    assert not list(tmp_path.iterdir())


def test_a_run_writes_its_log_in_its_directory(line: Line, trained: list[DictConfig], tmp_path: Path) -> None:
    assert line("debug=smoke") == 0
    (folder,) = tmp_path.glob("outputs/*/*")
    assert (folder / "run.log").exists()
    assert trained[0].output_dir == str(folder)
    assert Path.cwd() == tmp_path


def test_a_directory_that_cannot_be_made_is_one_line(
    line: Line, trained: list[DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert line("hydra.run.dir=file/run") == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("file/run cannot be written (Not a directory): choose another hydra.run.dir")
    assert len(said.splitlines()) == 1
    assert not trained


def test_a_mistake_in_the_data_is_one_logged_sentence(
    line: Line, trained: list[DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line("seed=1") == MISTAKE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("data.path=x is empty: type data.path=PATH\n")
    (log,) = tmp_path.glob("outputs/*/*/run.log")
    assert "data.path=x is empty" in log.read_text()


def test_a_failed_run_logs_its_traceback(line: Line, trained: list[DictConfig], tmp_path: Path) -> None:
    assert line("seed=2") == FAILED
    (log,) = tmp_path.glob("outputs/*/*/run.log")
    assert "Traceback" in log.read_text()
    assert "ValueError: surprise" in log.read_text()


def test_an_interrupt_is_one_line(
    line: Line, trained: list[DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert line("seed=3") == INTERRUPTED
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Interrupted" in err


def test_a_sweep_goes_on_after_a_failed_job(line: Line, trained: list[DictConfig]) -> None:
    assert line("-m", "tracking=none", "seed=1,2,0") == MISTAKE
    assert [cfg.seed for cfg in trained] == [1, 2, 0]
    logs = [(Path(cfg.output_dir) / "run.log").read_text() for cfg in trained]
    assert "data.path=x is empty" in logs[0]
    assert "ValueError: surprise" in logs[1]
    assert logs[2] == ""


def test_a_sweep_checks_each_job(line: Line, trained: list[DictConfig]) -> None:
    assert line("-m", "data.seq_len=64,4096") == MISTAKE
    assert not trained, "an impossible job is found before the first one starts"


def test_a_sweep_names_an_unknown_choice(
    line: Line, trained: list[DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert line("-m", "model=gpt2,gpt3") == MISTAKE
    assert "model=gpt3 is not a choice: did you mean gpt2?" in capsys.readouterr().err


# ---------------------------------------------------------------- experiments from files

JSON = '{"defaults": [{"override /model": "gpt2-tiny"}], "trainer": {"max_steps": 5}}'
YAML = "# @package _global_\ndefaults:\n  - override /model: gpt2-tiny\ntrainer:\n  max_steps: 5\n"


@pytest.mark.parametrize(
    ("name", "text", "typed"),
    [
        ("mine.json", JSON, "mine/mine.json"),
        ("planted.yml", YAML, "./mine/../mine/planted.yml"),
        ("mine.yaml", YAML, "{here}/mine/mine.yaml"),
    ],
)
def test_an_experiment_file_is_composed(
    name: str, text: str, typed: str, line: Line, trained: list[DictConfig], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(text)
    assert line(f"experiment={typed.format(here=tmp_path)}", "trainer.batch_size=2") == 0
    (cfg,) = trained
    assert (cfg.model.name, cfg.trainer.max_steps, cfg.trainer.batch_size) == ("gpt2-tiny", 5, 2)


def test_a_sweep_over_experiment_files(line: Line, trained: list[DictConfig], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"seed": 7}')
    (tmp_path / "b.yaml").write_text("seed: 8\n")
    assert line("-m", "tracking=none", "experiment=a.json,b.yaml") == 0
    assert [cfg.seed for cfg in trained] == [7, 8]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"trainer": {"max_step": 3}}', ["experiment/bad.json", "did you mean trainer.max_steps?"]),
        (
            '{"trainer": {"max_steps": "abc"}}',
            ["experiment/bad.json", "trainer.max_steps=abc", "whole number"],
        ),
        ('{"defaults": [{"override /model": "gpt3"}]}', ["model=gpt3", "did you mean gpt2?"]),
        ('{\n"seed": ', ["bad.json", "not JSON at line 2"]),
        ("[1]", ["bad.json", "must hold a mapping"]),
    ],
)
def test_a_bad_experiment_file_gets_one_line(
    text: str, parts: list[str], line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert line("experiment=bad.json") == MISTAKE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_shipped_json_and_yaml_say_the_same(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("--cfg", "job", "experiment=planted") == 0
    from_yaml = capsys.readouterr().out
    assert line("--cfg", "job", "experiment=planted.json") == 0
    assert capsys.readouterr().out == from_yaml
    assert line("--cfg", "job", f"experiment={ROOT / 'conf/experiment/planted.json'}") == 0
    assert capsys.readouterr().out == from_yaml


# ---------------------------------------------------------------- help, completion, imports


def test_help_lists_groups_and_keys_with_values(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("--help", "model=mlp", "data=digits") == 0
    out = capsys.readouterr().out
    assert "model: bert-base, bert-tiny, cnn, gpt2, gpt2-large" in out
    assert "schema_" not in out
    assert "model.hidden=[256,256]" in out
    assert "(concat | separate)" in out
    (steps,) = [row for row in out.splitlines() if row.startswith("  trainer.max_steps=24 ")]
    assert steps.endswith("optimizer steps of the run")


def test_help_lists_the_keys_of_a_hugging_face_model(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("--help", "model=llava-tiny", "model.config.projector_hidden_act=relu") == 0
    rows = [row.strip() for row in capsys.readouterr().out.splitlines()]
    assert "model.config.vision_config.patch_size=8" in rows
    assert "model.config.text_config.vocab_size=null" in rows
    assert "model.config.projector_hidden_act=relu" in rows
    assert rows[rows.index("model.config.image_token_index=50257") - 3].startswith("model.config.KEY=VALUE  ")


def test_cfg_job_resolves(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("--cfg", "job", "--resolve") == 0
    assert "output_dir: null" in capsys.readouterr().out


def test_completion_offers_choices(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "python run.py engine=")
    assert line("-sc", "query=bash") == 0
    assert capsys.readouterr().out.split() == ["engine=graddotprod", "engine=gradprojlora", "engine=regular"]


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["engine.bitwise=true"]])
def test_nothing_heavy_is_imported_and_any_directory_will_do(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "run.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if arguments[0].startswith("--") else MISTAKE)
    modules = {
        row.rpartition("|")[2].strip() for row in done.stderr.splitlines() if row.startswith("import time")
    }
    assert "runners.cli" in modules
    assert not {name.partition(".")[0] for name in modules} & HEAVY


# ---------------------------------------------------------------- dry run


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_dry_run_shows_parameters_memory_and_directory(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert line("dry_run=true", f"hydra.run.dir={tmp_path}/o") == 0
    out = capsys.readouterr().out
    assert "124,439,808 parameters in float32" in out
    assert "24,576" in out  # tokens: 24 steps × 8 samples × 128
    assert f"{tmp_path}/o" in out
    assert not (tmp_path / "o" / "config.yaml").exists()


def test_dry_run_shows_what_the_memory_is_for(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert line("dry_run=true", "model=gpt2-tiny", "optimizer=sgd", f"hydra.run.dir={tmp_path}/o") == 0
    out = capsys.readouterr().out
    found = [row for row in out.splitlines() if "memory:" in row]
    for name in ("PyTorch and libraries", "logits and loss", "activations", "weights", "total"):
        assert any(f"memory: {name}" in row for row in found), out
    assert "memory: optimizer" not in out
    assert "of host memory" in out


def test_output_that_nobody_reads_ends_quietly() -> None:
    command = f"{sys.executable} {ROOT / 'run.py'} --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Train a model")
    assert done.stderr == ""
