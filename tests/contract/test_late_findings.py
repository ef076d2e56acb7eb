"""Corners that a long look found."""

from dataclasses import replace

import pytest
import torch

from asteria import SOAP, NonFiniteGradientError, RuntimeConfig
from asteria.runtime.engine import Engine


def test_a_second_moment_that_never_forgets_is_adams() -> None:
    """The decay is so near 1 that even very many steps of it would leave something."""
    betas = (0.9, 1 - 1e-9)
    ours, theirs = (torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    optimizers = (
        SOAP([ours], lr=1e-2, betas=betas, weight_decay=0.0),
        torch.optim.Adam([theirs], lr=1e-2, betas=betas, eps=1e-30),
    )
    generator = torch.Generator().manual_seed(0)
    optimizers[0].param_groups[0]["eps"] = 1e-30
    for _ in range(5):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)


def test_every_refused_step_is_counted_when_verdicts_come_together() -> None:
    engine = Engine(RuntimeConfig())
    bad = [torch.tensor([float("nan")])]
    for name in ("a", "b", "c"):
        engine._guard.gate(bad, [name])
    with pytest.raises(NonFiniteGradientError, match="gradient of a holds"):
        engine.settle()
    assert engine.stats().skipped_steps == 3


def test_the_control_arm_stays_one_when_it_skips_bad_gradients() -> None:
    stack = torch.nn.Parameter(torch.zeros(3, 32, 32))
    runtime = replace(RuntimeConfig.reference(), nonfinite="skip")
    assert SOAP([stack], runtime=runtime).describe().rows[0].factors == ((3, 32, 32),)
    assert SOAP([stack]).describe().rows[0].factors == ((32, 32),)
