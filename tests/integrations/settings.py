"""What the runs of all integrations have in common."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS

STEPS = 24
SAVED = 19
"""Steps before a checkpoint: by then nothing is young, and refreshes are in flight."""
ACCUMULATED = 2
BATCH = 4
OPTIONS: dict[str, Any] = {
    "lr": 2.0**-6,
    "precondition_frequency": 3,
    "shampoo_beta": 0.5,
    "weight_decay": 0.0,
}
"""Of the optimizers: many refreshes in few steps. Factors are young for 16 of them."""
MAX_NORM = 0.1
"""Gradients are clipped to it at every step."""


def build(name: str, params: Iterable[Any], **options: Any) -> SecondOrderOptimizer:
    """The optimizer called ``name`` over ``params``."""
    return OPTIMIZERS[name](params, **(OPTIONS | options))


def network() -> nn.Sequential:
    """A small regression model, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def rows(batches: int = STEPS * ACCUMULATED) -> DataLoader[tuple[Tensor, ...]]:
    """Inputs (4, 6) and targets (4, 4) of ``batches`` batches, in a fixed order."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(batches * BATCH, size, generator=generator) for size in (6, 4))
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that changes the learning rate at every step."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def has_flights(state_dict: dict[str, Any]) -> bool:
    """Whether refreshes in flight are part of an optimizer's saved state."""
    return any(
        bool(entries["shadow_lands"].any())
        for entries in state_dict["state"].values()
        if "shadow_lands" in entries
    )


def plain_loop(
    name: str, *, epochs: int = 1, batches: int = STEPS * ACCUMULATED, bf16: bool = False
) -> nn.Module:
    """The model after the loop that everybody would write by hand."""
    model = network()
    optimizer = build(name, model.parameters())
    scheduler = cosine(optimizer)
    for _ in range(epochs):
        for number, (x, y) in enumerate(rows(batches), start=1):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = nn.functional.mse_loss(model(x), y)
            (loss / ACCUMULATED).backward()
            if number % ACCUMULATED == 0:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return model
