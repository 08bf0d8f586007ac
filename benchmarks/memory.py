"""The memory estimate of a run, said before it begins, against the peak that its process had.

`python -m benchmarks.memory [--runs 18]`: each row is a `run.py` of a few steps in a process of its own,
whose largest resident set the system reports. On a machine with a GPU the estimate is of the GPU's memory,
and the peak is what PyTorch's allocator held of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import report

ROOT = Path(__file__).resolve().parent.parent

IMAGES = "data=digits data.as_image=true data.image_size=32 trainer.batch_size=256"
RUNS = (
    "model=gpt2-mini",
    "model=gpt2-mini engine.val_mode=separate",
    "model=gpt2-mini engine.val_mode=separate engine.pairwise=true data.val_samples=8",
    "model=gpt2-mini optimizer=sgd trainer.batch_size=4 data.seq_len=256",
    "model=gpt2-mini trainer.batch_size=2 trainer.gradient_accumulation_steps=2",
    "model=gpt2-mini trainer.batch_size=2 trainer.activation_checkpointing=true",
    "model=gpt2-mini trainer.batch_size=2 dtype=bf16",
    "model=gpt2-mini trainer.batch_size=4 engine=gradprojlora data.train_samples=32",
    "model=gpt2-tiny",
    "model=llama-tiny trainer.batch_size=4",
    "model=pythia-tiny engine=regular",
    "model=t5-tiny data.task=seq2seq",
    "model=bert-tiny data.task=text_classes trainer.batch_size=64 data.train_samples=128",
    f"model=cnn {IMAGES}",
    f"model=vit-tiny {IMAGES}",
    "experiment=digits trainer.batch_size=512",
    "model=gpt2 trainer.batch_size=4 engine.val_batch_size=1 data.val_samples=4",
    "model=gpt2 trainer.batch_size=2 engine.val_mode=separate engine.val_batch_size=2 data.val_samples=4 "
    "optimizer=sgd",
)
SHORT = ("tracking=none", "trainer.max_steps=3", "trainer.eval_every=3", "trainer.checkpoint_every=null")


def measure(run: str) -> dict[str, object]:
    """Estimate and peak of one run, in MiB, and the one over the other."""
    with tempfile.TemporaryDirectory() as folder:
        steps = () if "engine=gradprojlora" in run else SHORT[1:]
        argv = [
            sys.executable,
            str(ROOT / "run.py"),
            *run.split(),
            SHORT[0],
            *steps,
            f"hydra.run.dir={folder}/run",
        ]
        with (Path(folder) / "said.log").open("w+", encoding="utf-8") as said:
            process = subprocess.Popen(argv, cwd=folder, stdout=said, stderr=said)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                raise RuntimeError(f"{run} has failed: {said.read()[-500:]}")
        out = Path(folder) / "run"
        estimate = int(json.loads((out / "environment.json").read_text())["memory.estimate_bytes"])
        peak = device_peak(out) or usage.ru_maxrss * 1024
    return {
        "run": run,
        "estimate, MiB": round(estimate / 2**20),
        "measured, MiB": round(peak / 2**20),
        "estimate / measured": round(estimate / peak, 3),
    }


def device_peak(out: Path) -> int | None:
    """The most that the run held of a GPU's memory, in bytes; None on the CPU."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    peaks = [line["memory/peak_device_gb"] for line in lines if "memory/peak_device_gb" in line]
    return round(max(peaks) * 1e9) if peaks else None


def main() -> None:
    """Measure all runs and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=len(RUNS), help="how many of the runs to measure")
    args = parser.parse_args()
    rows = [measure(run) for run in RUNS[: args.runs]]
    report("memory", list(rows[0]), rows)


if __name__ == "__main__":
    main()
