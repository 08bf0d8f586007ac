"""One of several processes that train with `GhostTrainer`: `torchrun hf_trainer_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch

from tests.ghost.integrations.hf_trainers import drawn_rows, scored_trainer
from tests.ghost.models import tiny_gpt2


def main(out: Path) -> None:
    """Train on the rows that the test draws as well, and leave the model beside the scores."""
    torch.set_num_threads(1)
    train, val = drawn_rows()
    torch.manual_seed(0)
    trainer = scored_trainer(
        out, tiny_gpt2(), train, val, gradient_accumulation_steps=2, num_train_epochs=1,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), out / "model.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
