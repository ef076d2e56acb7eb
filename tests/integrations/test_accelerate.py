"""Hugging Face Accelerate, one process."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import asteria
from tests.integrations.settings import (
    ACCUMULATED,
    MAX_NORM,
    SAVED,
    STEPS,
    build,
    cosine,
    has_flights,
    network,
    plain_loop,
    rows,
)
from tests.support.arms import over_optimizers
from tests.support.training import assert_same_bits, weights


class Run:
    """A training run whose parts went through ``accelerator.prepare``."""

    def __init__(self, name: str, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **options)
        self.inner = build(name, (model := network()).parameters())
        parts = self.accelerator.prepare(model, self.inner, rows(), cosine(self.inner))
        self.model, self.optimizer, self.rows, self.scheduler = parts
        self.norms: list[float] = []

    def train(self, first: int, last: int) -> None:
        """Steps ``first`` to ``last``, as Accelerate's documentation has it."""
        done = self.accelerator.skip_first_batches(self.rows, first * ACCUMULATED)
        for x, y in islice(done, (last - first) * ACCUMULATED):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.mse_loss(self.model(x), y))
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                    self.norms.append(float(norm))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


@over_optimizers
def test_it_ends_with_the_bits_of_the_plain_loop(name: str) -> None:
    run = Run(name)
    run.train(0, STEPS)
    assert_same_bits(weights(run.model.parameters()), weights(plain_loop(name).parameters()))
    assert run.inner.stats().steps == len(run.norms) == STEPS
    assert max(run.norms) > MAX_NORM
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@over_optimizers
def test_a_saved_run_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, begun, resumed = Run(name), Run(name), Run(name)
    whole.train(0, STEPS)
    begun.train(0, SAVED)
    begun.accelerator.save_state(str(tmp_path))
    resumed.accelerator.load_state(str(tmp_path))
    assert has_flights(torch.load(tmp_path / "optimizer.bin", weights_only=True))
    resumed.train(SAVED, STEPS)
    assert_same_bits(weights(resumed.model.parameters()), weights(whole.model.parameters()))


@over_optimizers
def test_bf16_is_that_of_autocast(name: str) -> None:
    run, model = Run(name, mixed_precision="bf16"), network()
    run.train(0, STEPS)
    optimizer = build(name, model.parameters())
    scheduler = cosine(optimizer)
    for number, (x, y) in enumerate(rows(), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = model(x)
        # Accelerate hands the outputs over in float32.
        (nn.functional.mse_loss(predicted.float(), y) / ACCUMULATED).backward()
        if number % ACCUMULATED == 0:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert_same_bits(weights(run.model.parameters()), weights(model.parameters()))


def test_what_it_does_is_read_from_the_optimizer_inside() -> None:
    run = Run("SOAP")
    run.train(0, 2)
    with pytest.raises(asteria.ConfigError, match="AcceleratedOptimizer"):
        asteria.logging_dict(run.optimizer)
    assert asteria.logging_dict(run.optimizer.optimizer)["asteria/steps"] == 2.0
