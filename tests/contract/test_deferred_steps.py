"""Updates that are written down and done in one go: the bits of updates done one by one."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria import SOAP, RuntimeConfig
from asteria.linalg.deferred import Program
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import weights
from asteria.runtime.passages import Passage
from asteria.runtime.records import Tile
from asteria.runtime.updater import Updater
from tests.support.arms import OPTIMIZERS, RUNTIMES, over_optimizers
from tests.support.asynchronous import build, params_of
from tests.support.training import (
    MIXED,
    Bits,
    Shape,
    assert_same_bits,
    everything,
    parameters,
    set_gradients,
    train,
)
from tests.support.training import weights as weights_of

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
    for p in params_of(optimizer)[1::2]:
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
    shapes = [(6, 4), (5,), (40, 3), (6, 4)]
    optimizer = build("SOAP", RuntimeConfig.reference(), shapes, precondition_frequency=100)
    train(optimizer, range(3))
    before, seen = everything(optimizer), list[Bits]()
    region = weights._region

    def looking(*given: Any) -> Tensor:
        seen.append(everything(optimizer))
        return region(*given)

    monkeypatch.setattr(weights, "_region", looking)
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
    region, failures = weights._region, list[int]()

    def failing(tile: Tile, tensor: Tensor | None) -> Tensor:
        if not (tile.plan.shape.dims or failures):
            failures.append(1)
            raise RuntimeError("the second chunk")
        return region(tile, tensor)

    monkeypatch.setattr(weights, "_region", failing)
    before = weights_of(params_of(broken))
    with pytest.raises(RuntimeError, match="second chunk"):
        train(broken, range(4, 5))
    after = weights_of(params_of(broken))
    assert sum(not torch.equal(after[key], before[key]) for key in before) == 1
    broken.step()
    assert_same_bits(everything(broken), everything(expected))


# What was written down is done again


EQUAL: list[Shape] = [(6, 4)] * 3 + [(5,), (5,), (0,)]
EMPTY = 5


def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The dims of the blocks whose update was written down."""
    found: list[tuple[int, ...]] = []
    write_down = Updater._write_down

    def noted(self: Updater, chunk: Any) -> Passage | None:
        found.append(chunk.shape.dims)
        return write_down(self, chunk)

    monkeypatch.setattr(Updater, "_write_down", noted)
    return found


def pair_of_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondOrderOptimizer]:
    """Two equal optimizers after a few steps; while the second lives nothing is put off."""
    for puts_off in (True, False):
        if not puts_off:
            monkeypatch.setattr(Updater, "can_defer", lambda *_: False)
        optimizer = build("SOAP", RuntimeConfig.reference(), EQUAL, precondition_frequency=10)
        train(optimizer, range(4))
        yield optimizer


def test_an_update_is_written_down_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(monkeypatch)
    optimizer = build("SOAP", RuntimeConfig.reference(), EQUAL, precondition_frequency=100)
    train(optimizer, range(8))
    assert sorted(found) == [(), (6, 4)]


def test_a_lone_gradient_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(monkeypatch)
    optimizer = build("SOAP", RuntimeConfig.reference(), [(6, 4)], precondition_frequency=100)
    train(optimizer, range(8))
    assert not found


def test_outgrown_scratch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(monkeypatch)
    optimizer = build("SOAP", RuntimeConfig.reference(), EQUAL, precondition_frequency=100)
    train(optimizer, range(8))
    found.clear()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(60, 40))]})
    train(optimizer, range(8, 11))
    assert found.count((6, 4)) == 2, "where more join, and with the memory that these need"


def test_parameters_with_rates_of_their_own_may_share_a_chunk(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    found = []
    for deferred in (True, False):
        if not deferred:
            monkeypatch.setattr(Updater, "can_defer", lambda *_: False)
        params = parameters([(6, 4)] * 3)
        groups = [{"params": [p], "lr": 0.1 * place} for place, p in enumerate(params)]
        optimizer = SOAP(groups, shampoo_beta=0.5, runtime=RuntimeConfig.reference())
        train(optimizer, range(6))
        found.append(everything(optimizer))
        assert bool(sum(lengths)) == deferred
        lengths.clear()
    assert_same_bits(*found)


def schedule(optimizer: SecondOrderOptimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = (0.0, 0.1, 1e-3)[step % 3]
    optimizer.param_groups[0]["weight_decay"] = (0.0, 0.1)[step % 2]


def retune(optimizer: SecondOrderOptimizer, step: int) -> None:
    optimizer.param_groups[0].update(betas=(0.5 + 0.01 * step, 0.9), eps=1e-3)


def skip_one(optimizer: SecondOrderOptimizer, step: int) -> None:
    for index, p in enumerate(params_of(optimizer)):
        p.requires_grad_(index != step % 3)


def skip_an_empty_one(optimizer: SecondOrderOptimizer, step: int) -> None:
    params_of(optimizer)[EMPTY].requires_grad_(step not in (6, 7))


def swap_memory(optimizer: SecondOrderOptimizer, step: int) -> None:
    for p in params_of(optimizer)[:3]:
        p.data = p.data.T.contiguous().T if step % 2 else p.data.clone()


def join(optimizer: SecondOrderOptimizer, step: int) -> None:
    if step == 6:
        torch.manual_seed(0)
        more = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(4)]
        optimizer.add_param_group({"params": [*more, torch.nn.Parameter(torch.randn(60, 40))]})


def reload(optimizer: SecondOrderOptimizer, step: int) -> None:
    if step % 3 == 0:
        optimizer.load_state_dict(optimizer.state_dict())


def start_afresh(optimizer: SecondOrderOptimizer, step: int) -> None:
    if step == 6:
        del optimizer.state[params_of(optimizer)[1]]


def ascend(optimizer: SecondOrderOptimizer, step: int) -> None:
    optimizer.param_groups[0]["maximize"] = step % 2 == 0


CHANGES = [
    schedule,
    retune,
    skip_one,
    skip_an_empty_one,
    swap_memory,
    join,
    reload,
    start_afresh,
    ascend,
]


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_done_again_as_long_as_it_is_the_same(
    change: Callable[[SecondOrderOptimizer, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for optimizer in pair_of_runs(monkeypatch):
        for step in range(4, 15):
            change(optimizer, step)
            set_gradients([p for g in optimizer.param_groups for p in g["params"]], step)
            for p in params_of(optimizer):
                p.grad = p.grad if p.requires_grad else None
            optimizer.step()
        found.append(everything(optimizer))
    assert_same_bits(*found)


def test_gradients_are_not_kept() -> None:
    optimizer = build("SOAP", RuntimeConfig.reference(), EQUAL, precondition_frequency=100)
    train(optimizer, range(4))
    references = [weakref.ref(p.grad) for p in params_of(optimizer)]
    optimizer.zero_grad()
    assert [reference() for reference in references] == [None] * len(EQUAL)
