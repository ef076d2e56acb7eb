"""Updates that are written down and done in one go: the bits of updates done one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asteria import RuntimeConfig
from asteria.linalg.deferred import Program
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import updater
from asteria.runtime.updater import Updater
from tests.support.arms import OPTIMIZERS, RUNTIMES, over_optimizers
from tests.support.asynchronous import build, params_of
from tests.support.training import MIXED, Bits, assert_same_bits, everything, train, weights

STEPS = 25
SHAPES = [*MIXED, (40, 3), (7,)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"large_dims": "blocks", "max_precond_dim": 6},
    "one-sided": {"max_precond_dim": 6},
    "maximize": {"maximize": True},
    "normalized": {"normalize_grads": True},
    "noise": {"stochastic_rounding": True},
}


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations every program had that was run."""
    found: list[int] = []
    run = Program.run

    def counted(self: Program) -> None:
        found.append(len(self._calls))
        run(self)

    monkeypatch.setattr(Program, "run", counted)
    return found


def trained(name: str, runtime: RuntimeConfig, **options: Any) -> SecondOrderOptimizer:
    optimizer = build(name, runtime, SHAPES, **options)
    for p in params_of(optimizer)[::2]:
        p.data = p.data.bfloat16()
    train(optimizer, range(STEPS))
    return optimizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
@over_optimizers
def test_the_bits_are_those_of_updates_one_by_one(
    name: str,
    runtime: RuntimeConfig,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
) -> None:
    found = everything(trained(name, runtime, **options))
    if not options:
        assert sum(lengths) > 0
    lengths.clear()
    monkeypatch.setattr(Updater, "can_defer", lambda *_: False)
    assert_same_bits(found, everything(trained(name, runtime, **options)))
    assert sum(lengths) == 0


def test_nothing_is_computed_before_all_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(6, 4), (5,), (40, 3)]
    optimizer = build("SOAP", RuntimeConfig.reference(), shapes, precondition_frequency=100)
    train(optimizer, range(3))
    before, seen = everything(optimizer), list[Bits]()
    gather = updater.gather

    def looking(*given: Any) -> Tensor:
        seen.append(everything(optimizer))
        return gather(*given)

    monkeypatch.setattr(updater, "gather", looking)
    train(optimizer, range(3, 4))
    assert len(seen) == len(shapes)
    for bits in seen:
        assert_same_bits(bits, before)


def test_steps_with_refreshes_and_profiled_ones_are_done_where_they_stand(
    lengths: list[int],
) -> None:
    optimizer = build("SOAP", RuntimeConfig.reference(), [(4, 4)] * 3, precondition_frequency=3)
    train(optimizer, range(9))
    assert sum(length > 0 for length in lengths) == 9 - 1 - 2  # the first makes bases
    lengths.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, range(9, 11))
    assert sum(lengths) == 0
    assert any(event.key == "asteria.update" for event in profile.key_averages())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_came_before_an_error_is_done_and_the_rest_by_the_next_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(4, 4), (5,), (6, 4)]
    expected, broken = (build(name, RuntimeConfig.reference(), shapes) for _ in range(2))
    train(expected, range(5))
    train(broken, range(4))
    gather, calls = updater.gather, list[int]()

    def failing(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second chunk")
        return gather(*given)

    monkeypatch.setattr(updater, "gather", failing)
    before = weights(params_of(broken))
    with pytest.raises(RuntimeError, match="second chunk"):
        train(broken, range(4, 5))
    after = weights(params_of(broken))
    assert sum(not torch.equal(after[key], before[key]) for key in before) == 1
    broken.step()
    assert_same_bits(everything(broken), everything(expected))
