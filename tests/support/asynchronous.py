"""Optimizers whose refreshes are asynchronous, and a hand on their workers."""

from typing import Any

from torch import nn

from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.pipeline import Flight
from tests.support.arms import OPTIMIZERS, PERIOD
from tests.support.execution import FakeClock, ManualExecutor, directed
from tests.support.training import Bits, Shape, parameters

SHAPES: list[Shape] = [(6, 4), (5,), (4, 4), (3, 2, 4)]
BETA = 0.5
"""Of the factors; they are young for 16 steps, of which 2, 3, 5, 8 and 12 refresh at once."""
GROWN = 17
"""Calls of step() after which nothing is young."""
JOB_S = 0.25
"""What a refresh takes by the fake clock."""


def build(
    name: str,
    runtime: RuntimeConfig | None = None,
    shapes: list[Shape] = SHAPES,
    **options: Any,
) -> SecondOrderOptimizer:
    """One of few small parameters, by default under the default runtime."""
    given = {"precondition_frequency": PERIOD, "shampoo_beta": BETA, "lr": 2.0**-6} | options
    return OPTIMIZERS[name](parameters(shapes), runtime=runtime, **given)


def params_of(optimizer: SecondOrderOptimizer) -> list[nn.Parameter]:
    """Those of its first group."""
    return list(optimizer.param_groups[0]["params"])


def manual(
    optimizer: SecondOrderOptimizer, clock: FakeClock | None = None
) -> tuple[SecondOrderOptimizer, ManualExecutor]:
    """A new optimizer, and its workers who do what they are told to."""
    workers = ManualExecutor(clock, JOB_S)
    return directed(optimizer, workers, clock), workers


def bases(optimizer: SecondOrderOptimizer) -> list[Bits]:
    """Of every parameter with bases."""
    return [
        {key: entries[key].clone() for key in entries if key.startswith("basis")}
        for entries in optimizer.state.values()
        if "version" in entries
    ]


def flying(optimizer: SecondOrderOptimizer) -> set[Flight[Any]]:
    """All refreshes in flight."""
    background = optimizer._engine._background
    assert background is not None
    units = background.pipeline.units()
    return {flight for unit in units for flight in background.pipeline.flights(unit)}
