"""Lightning's real `Trainer`, held against a training written out by hand, one backward a sample."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghost.errors import BatchError, GhostConfigError, ProtocolError
from ghost.integrations.indices import IndexedRows
from ghost.integrations.lightning import GhostCallback
from ghost.values import read_shards
from tests.ghost import reference
from tests.ghost.harness import EXACT, assert_gradients, assert_near
from tests.ghost.models import mlp, table, tiny_gpt2, tokens

ROWS = 10
LR = 0.1


class Classifier(pl.LightningModule):
    """Two linear layers, as a user would write them."""

    def __init__(
        self, dropout: float = 0.0, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(dropout), *mlp())
        self.kind = optimizer

    def forward(self, X: Tensor) -> Tensor:
        return self.net(X)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        X, Y, _ = batch
        return F.cross_entropy(self(X), Y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        X, Y = batch
        self.log("val_loss", F.cross_entropy(self(X), Y))

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), lr=LR)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loss_fn(module: nn.Module, X: Any, Y: Tensor) -> Tensor:
    return F.cross_entropy(module(X), Y)


def trainer_in(out: Path, *callbacks: pl.Callback, **given: Any) -> pl.Trainer:
    usual: dict[str, Any] = {
        "default_root_dir": out, "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "gradient_clip_val": 0.05,
    }  # fmt: skip
    return pl.Trainer(**(usual | given), callbacks=list(callbacks))


def callback(out: Path, val: Any, **given: Any) -> GhostCallback:
    settings = {"result_dir": str(out / "scores"), "save_interval": 2} | given.pop("config", {})
    return GhostCallback(settings, val_data=val, **({"loss_fn": loss_fn} | given))


def batches(rows: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(IndexedRows(TensorDataset(*rows)), batch_size=2, shuffle=True)


def held_out(rows: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows), batch_size=2)


def shards(out: Path) -> dict[str, Tensor]:
    found = list(read_shards(out / "scores" / "scores"))
    return {key: torch.cat([shard[key] for shard in found]) for key in found[0]}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_scores_and_training_are_those_of_a_training_by_hand(tmp_path: Path, accumulation: int) -> None:
    train, val, by_hand, model = table(ROWS), table(4), Classifier(), Classifier()
    model.load_state_dict(by_hand.state_dict())
    trainer = trainer_in(
        tmp_path, callback(tmp_path, val), accumulate_grad_batches=accumulation, val_check_interval=2
    )
    trainer.fit(model, batches(train), held_out(val))
    found = shards(tmp_path)
    epoch = found["sample"].reshape(2, ROWS)
    assert epoch.sort(1).values.tolist() == [list(range(ROWS))] * 2
    assert len(found["step"].unique()) == {1: 10, 3: 4}[accumulation]  # 5 micro-batches an epoch: 3, then 2
    for step in range(int(found["step"].max()) + 1):
        now = found["step"] == step
        order = found["sample"][now]
        X, Y = train[0][order], train[1][order]
        # Lightning divides every loss by the full number of micro-batches, also in an epoch's last step.
        weight = len(Y) / (2 * accumulation)
        expected = reference.scores(by_hand, loss_fn, (X, Y), val, reference.LossReduction.SAMPLE_MEAN)
        assert_near(found["score"][now], expected * weight)
        grads = reference.gradient(by_hand, loss_fn(by_hand, X, Y) * weight)
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        clip = (0.05 / (norm + 1e-6)).clamp(max=1.0)
        assert_near(found["clip"][now], clip.expand(len(Y)))
        lr = LR * 0.9**step
        assert found["lr"][now].tolist() == pytest.approx([lr] * len(Y), rel=1e-12)
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                p -= lr * clip * grads[name]
    ours, theirs = ({name: p.detach() for name, p in m.named_parameters()} for m in (model, by_hand))
    assert_gradients(ours, theirs, EXACT)
    assert pq.read_table(tmp_path / "scores" / "values.parquet")["times_seen"].to_pylist() == [2] * ROWS
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("precision", "bitwise"),
    [("32-true", True), ("bf16-mixed", True), ("64-true", True), ("32-true", False)],
)
def test_training_is_what_it_was(tmp_path: Path, precision: str, bitwise: bool) -> None:
    (X, Y), (X_val, Y_val) = table(ROWS), table(4)
    train, val = (X.float(), Y), (X_val.float(), Y_val)
    found = []
    for extra in ([], [callback(tmp_path, val, config={"bitwise": bitwise})]):
        torch.manual_seed(3)
        model = Classifier(dropout=0.2, optimizer=torch.optim.AdamW).float()
        trainer = trainer_in(
            tmp_path, *extra, precision=precision, accumulate_grad_batches=2, gradient_clip_val=1.0
        )
        trainer.fit(model, batches(train), held_out(val))
        found.append({name: p.detach() for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        if bitwise:
            assert torch.equal(found[1][name], expected)
        else:
            torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-5)
    clip = shards(tmp_path)["clip"]
    assert ((clip > 0) & (clip <= 1)).all()


class Language(pl.LightningModule):
    """A Hugging Face model inside a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_gpt2()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_a_hugging_face_model_inside(tmp_path: Path) -> None:
    ids, val = tokens(6, 7), tokens(2, 7)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    scored = callback(
        tmp_path, ({"input_ids": val}, val), module="model", loss_fn=reference.own_loss,
        config={"preconditioner": "auto"},
    )  # fmt: skip
    model = Language()
    trainer_in(tmp_path, scored, max_epochs=1).fit(model, DataLoader(IndexedRows(rows), batch_size=3))
    assert shards(tmp_path)["sample"].tolist() == [0, 1, 2, 3, 4, 5]
    assert scored.manager is not None
    assert scored.manager.scores.abs().min() > 0
    model.extra = nn.Linear(2, 2)
    with pytest.raises(GhostConfigError, match=r"module='model' does not have .* 'extra\.weight'"):
        trainer_in(tmp_path, scored).fit(model, DataLoader(IndexedRows(rows)))
    scored = callback(tmp_path, (val, val), module="net")
    with pytest.raises(GhostConfigError, match="module='net' is no part of Language, which has model, extra"):
        trainer_in(tmp_path, scored).fit(model, DataLoader(IndexedRows(rows)))


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Rows and model of a training that was stopped and went on are those of one that was not."""
    train, val = table(ROWS), table(4)

    def fit(out: Path, epochs: int, ckpt: Path | None = None) -> Classifier:
        torch.manual_seed(3)
        model = Classifier()
        saving = ModelCheckpoint(dirpath=out, filename="{epoch}", save_top_k=-1)
        scored = callback(out, val, config={"val_every": 2})
        trainer = trainer_in(out, scored, saving, enable_checkpointing=True, max_epochs=epochs)
        rows = DataLoader(IndexedRows(TensorDataset(*train)), batch_size=2)
        trainer.fit(model, rows, ckpt_path=None if ckpt is None else str(ckpt))
        return model

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 2)  # what it wrote behind the checkpoint is written again
    resumed = fit(tmp_path / "parts", 3, tmp_path / "parts" / "epoch=0.ckpt")
    expected, found = shards(tmp_path / "whole"), shards(tmp_path / "parts")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_checkpoints_are_taken_between_steps(tmp_path: Path) -> None:
    val, train = table(4), batches(table(ROWS))
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = trainer_in(
        tmp_path, callback(tmp_path / "a", val), saving, enable_checkpointing=True, accumulate_grad_batches=2
    )
    trainer.fit(Classifier(), train)
    assert len(list(tmp_path.glob("*.ckpt"))) == trainer.global_step == 6

    class Hasty(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            trainer.save_checkpoint(tmp_path / "hasty.ckpt")

    trainer = trainer_in(tmp_path, callback(tmp_path / "b", val), Hasty(), accumulate_grad_batches=2)
    with pytest.raises(ProtocolError, match="step 0 is open"):
        trainer.fit(Classifier(), train)


def test_a_checkpoint_without_scores_is_refused(tmp_path: Path) -> None:
    train, val = batches(table(ROWS)), table(4)
    trainer = trainer_in(tmp_path, max_epochs=1)
    trainer.fit(Classifier(), train)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(GhostConfigError, match="goes on from step 5 without"):
        trainer_in(tmp_path, callback(tmp_path, val)).fit(
            Classifier(), train, ckpt_path=str(tmp_path / "plain.ckpt")
        )


class Manual(Classifier):
    """A module that steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.fixture
def left_group() -> Iterator[None]:
    """Lightning's processes join a group and do not leave it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("left_group")
@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (Manual(), {"gradient_clip_val": None}, "Manual optimises manually"),
        (Classifier(), {"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm='value'"),
        (Classifier(optimizer=torch.optim.LBFGS), {}, "LBFGS"),
        (Classifier(), {"strategy": "ddp"}, "strategy=DDPStrategy"),
    ],
    ids=["manual", "value", "lbfgs", "ddp"],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, model: pl.LightningModule, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(GhostConfigError, match=message):
        trainer_in(tmp_path, callback(tmp_path, table(4)), **given).fit(model, batches(table(ROWS)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"val_mode": "concat"}, "val_mode='concat'"),
        ({"engine": "gradprojlora"}, "engine='gradprojlora'"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
    ],
)
def test_settings_that_cannot_work(config: dict[str, Any], message: str) -> None:
    with pytest.raises(GhostConfigError, match=message):
        GhostCallback(config, val_data=table(2))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "ghost.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install 'ghostrunner\[lightning\]'"):
        importlib.import_module("ghost.integrations.lightning")


def test_batches_need_indices_and_an_error_puts_the_model_back(tmp_path: Path) -> None:
    model, val = Classifier(), table(4)
    with pytest.raises(BatchError, match="finds no samples' indices"):
        trainer_in(tmp_path, callback(tmp_path, val)).fit(model, held_out(table(ROWS)))
    assert not any("forward" in module.__dict__ for module in model.modules())
    scored = callback(tmp_path, val, split=lambda batch: (batch[0], batch[1], batch[2] + 5))
    trainer_in(tmp_path, scored, max_epochs=1).fit(model, batches(table(ROWS)))
    assert shards(tmp_path)["sample"].sort().values.tolist() == list(range(5, ROWS + 5))
