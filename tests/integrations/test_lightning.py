"""Lightning's Trainer."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from tests.integrations.settings import (
    ACCUMULATED,
    MAX_NORM,
    build,
    cosine,
    has_flights,
    network,
    plain_loop,
    rows,
)
from tests.support.arms import over_optimizers
from tests.support.training import assert_same_bits, weights

EPOCHS = 3
EPOCHS_SAVED = 2
"""Checkpoints are taken at the end of an epoch, of 20 steps by then."""
BATCHES = 10 * ACCUMULATED

pytestmark = [
    # Lightning's own, about torch.utils._pytree.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]


class Regression(lightning.LightningModule):
    """As Lightning's documentation has it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.network = network()
        self.norms: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = build(self.name, self.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"},
        }


class ByHand(Regression):
    """The same in Lightning's manual optimization."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        self.manual_backward(super().training_step(batch, index) / ACCUMULATED)
        if (index + 1) % ACCUMULATED == 0:
            self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


AUTOMATIC = {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": MAX_NORM}


def fit(
    model: Regression, folder: Path, epochs: int, precision: Any = "32-true", **options: Any
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        precision=precision,
        **(AUTOMATIC if model.automatic_optimization else {}),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, rows(BATCHES), **options)
    return trainer


@pytest.mark.parametrize("kind", [Regression, ByHand])
@over_optimizers
def test_it_ends_with_the_bits_of_the_plain_loop(
    name: str, kind: type[Regression], tmp_path: Path
) -> None:
    model = kind(name)
    trainer = fit(model, tmp_path, EPOCHS)
    plain = plain_loop(name, epochs=EPOCHS, batches=BATCHES)
    assert_same_bits(weights(model.parameters()), weights(plain.parameters()))
    (optimizer,) = trainer.optimizers
    assert optimizer.stats().steps == EPOCHS * BATCHES // ACCUMULATED


@over_optimizers
def test_bf16_is_that_of_autocast(name: str, tmp_path: Path) -> None:
    model = Regression(name)
    fit(model, tmp_path, EPOCHS, "bf16-mixed")
    plain = plain_loop(name, epochs=EPOCHS, batches=BATCHES, bf16=True)
    assert_same_bits(weights(model.parameters()), weights(plain.parameters()))


@over_optimizers
def test_a_checkpoint_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, begun, resumed = (Regression(name) for _ in range(3))
    fit(whole, tmp_path, EPOCHS)
    path = tmp_path / "begun.ckpt"
    fit(begun, tmp_path, EPOCHS_SAVED).save_checkpoint(path)
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert has_flights(state)
    fit(resumed, tmp_path, EPOCHS, ckpt_path=path, weights_only=True)
    assert_same_bits(weights(resumed.parameters()), weights(whole.parameters()))
