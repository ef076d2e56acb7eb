"""What fails on one rank is known to all; a rank that is lost is named."""

import threading
from typing import Any

import pytest
import torch

from asteria import CoherenceError, RefreshError, RuntimeConfig, StoreError
from asteria.distributed.topology import Topology
from asteria.linalg import verified
from asteria.linalg.eigenbasis import BasisResult
from asteria.runtime import host_refresh, shared_refresh
from tests.support.asynchronous import GROWN
from tests.support.ranks import Ranks
from tests.support.training import Shape, assert_same_bits, set_gradients

SHAPES: list[Shape] = [(6, 4), (5, 4), (7, 4), (5,)]
PAIR = Topology.even(2, 2)
STEPS = GROWN + 12
RUNTIMES = {"async": RuntimeConfig(), "sync": RuntimeConfig(refresh="sync")}
over_runtimes = pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)


def same_everywhere(ranks: Ranks) -> None:
    first, *others = ranks.bits()
    for other in others:
        assert_same_bits(other, first)


def failing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Refreshes of factors of this size fail in every precision."""
    real = verified._attempt

    def attempt(factor: torch.Tensor, basis: torch.Tensor, **options: Any) -> BasisResult:
        result = real(factor, basis, **options)
        if factor.shape[-1] == size:
            return BasisResult(result.basis, torch.zeros_like(result.usable))
        return result

    monkeypatch.setattr(verified, "_attempt", attempt)


@pytest.mark.filterwarnings("ignore:a refresh of:RuntimeWarning")
@over_runtimes
@pytest.mark.parametrize("sizes", [(6,), (6, 4)], ids=["one side", "both sides"])
def test_a_basis_that_was_kept_is_kept_everywhere(
    runtime: RuntimeConfig, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks("SOAP", PAIR, runtime, shapes=SHAPES)
    ranks.train(range(3))
    for size in sizes:
        failing(monkeypatch, size)
    assert ranks.train(range(3, GROWN)) == [None, None]
    same_everywhere(ranks)
    first, second = (optimizer.stats() for optimizer in ranks.optimizers)
    assert first.failures == second.failures
    assert first.failures["no basis"] > 0
    assert first.installs == second.installs


@pytest.mark.filterwarnings("ignore:a refresh of:RuntimeWarning")
@over_runtimes
def test_too_many_failures_end_the_training_everywhere(
    runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = RuntimeConfig(refresh=runtime.refresh, max_failures=3)
    ranks = Ranks("SOAP", PAIR, runtime, shapes=SHAPES)
    ranks.train(range(3))
    for size in (4, 5, 6, 7):
        failing(monkeypatch, size)
    errors = ranks.train(range(3, STEPS))
    assert all(isinstance(error, RefreshError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    same_everywhere(ranks)


class Broken(Exception):
    """What nobody expects of a refresh."""


@pytest.mark.parametrize("where", ["worker", "step"])
def test_what_a_refresh_raises_is_raised_everywhere(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its own rank with its traceback; elsewhere with its name. Then the training goes on."""
    runtime = RUNTIMES["async" if where == "worker" else "sync"]
    ranks = Ranks("SOAP", PAIR, runtime, shapes=SHAPES)
    ranks.train(range(GROWN))
    place: Any = host_refresh if where == "worker" else shared_refresh
    real = place.verified_refresh
    broken: list[str] = []

    def once(factor: torch.Tensor, basis: torch.Tensor, **options: Any) -> Any:
        if factor.shape[-1] == 7 and not broken:
            broken.append(threading.current_thread().name)
            raise Broken("disk on fire")
        return real(factor, basis, **options)

    monkeypatch.setattr(place, "verified_refresh", once)
    counts: list[int] = []
    errors: list[Any] = [None, None]
    for step in range(GROWN, STEPS):
        raised = ranks.train([step])
        if any(raised):
            errors = raised
            counts.append(step)
    assert len(counts) == 1, "at the same step"
    own = next(rank for rank in range(2) if isinstance(errors[rank], Broken))
    assert isinstance(errors[1 - own], RefreshError)
    assert "Broken: disk on fire" in str(errors[1 - own])
    assert "parameter 2" in str(errors[1 - own])
    same_everywhere(ranks)
    failures = [optimizer.stats().failures for optimizer in ranks.optimizers]
    assert failures[0] == failures[1]


@pytest.mark.filterwarnings("ignore:a refresh of:RuntimeWarning")
def test_what_a_disk_has_lost_is_lost_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks("SOAP", PAIR, shapes=SHAPES)
    ranks.train(range(GROWN))
    real = host_refresh.verified_refresh

    def lost(factor: torch.Tensor, basis: torch.Tensor, **options: Any) -> Any:
        if factor.shape[-1] == 7:
            raise StoreError("no such file")
        return real(factor, basis, **options)

    monkeypatch.setattr(host_refresh, "verified_refresh", lost)
    assert ranks.train(range(GROWN, STEPS)) == [None, None]
    same_everywhere(ranks)
    failures = [optimizer.stats().failures for optimizer in ranks.optimizers]
    assert failures[0] == failures[1] == {"lost on disk": failures[0]["lost on disk"]}


def test_no_memory_on_a_device_is_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks("SOAP", PAIR, RuntimeConfig(refresh_on="device"), shapes=SHAPES)
    ranks.train(range(GROWN))
    for optimizer in ranks.optimizers[:1]:
        background = optimizer._engine._background
        assert background is not None

        def launch(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(background.launcher._devices, "launch", launch)
    with pytest.warns(RuntimeWarning, match="no memory on the device"):
        assert ranks.train(range(GROWN, STEPS)) == [None, None]
    same_everywhere(ranks)
    first, second = (optimizer.stats().failures for optimizer in ranks.optimizers)
    assert first == second
    assert first["no memory on the device"] > 0


@over_runtimes
def test_a_rank_that_is_gone_is_named_with_what_it_owes(runtime: RuntimeConfig) -> None:
    ranks = Ranks("SOAP", Topology.even(3, 3), runtime, shapes=SHAPES)
    ranks.train(range(GROWN))
    ranks.network.lose(2)

    def work(rank: int) -> int:
        optimizer, step = ranks.optimizers[rank], GROWN
        while rank != 2:
            set_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
            step += 1
        return step

    errors = ranks.on_all(work)[:2]
    for error in errors:
        assert isinstance(error, CoherenceError)
        assert "rank 2 is gone" in str(error)
        assert "refresh of parameter" in str(error)


def test_a_rank_that_was_stopped_may_go_on() -> None:
    """The step that has timed out is taken again, and all ranks have the same bits."""
    ranks = Ranks("SOAP", PAIR, RUNTIMES["sync"], shapes=SHAPES, timeout_s=0.7)
    ranks.train(range(4))
    period = 3
    step = next(s for s in range(4, 20) if (s + 1) % period == 0)
    ranks.train(range(4, step))
    ranks.network.stopped.add(1)

    def first() -> None:
        set_gradients(ranks.optimizers[0].param_groups[0]["params"], step)
        ranks.optimizers[0].step()

    error = ranks.on_all(lambda rank: first() if rank == 0 else None)[0]
    assert isinstance(error, CoherenceError)
    assert "rank 1 does not answer" in str(error)
    ranks.network.stopped.clear()
    ranks.on_all(
        lambda rank: (
            set_gradients(ranks.optimizers[1].param_groups[0]["params"], step)
            or ranks.optimizers[1].step()
            if rank == 1
            else None
        )
    )
    assert ranks.train(range(step + 1, STEPS)) == [None, None]
    same_everywhere(ranks)


def test_ranks_that_step_differently_are_told_apart() -> None:
    """One of them leaves a parameter out."""
    ranks = Ranks("SOAP", PAIR, RUNTIMES["sync"], shapes=SHAPES, timeout_s=1.0)
    ranks.train(range(3))

    def work(rank: int) -> None:
        optimizer = ranks.optimizers[rank]
        params = optimizer.param_groups[0]["params"]
        for step in range(3, GROWN):
            set_gradients(params, step)
            if rank == 1:
                params[0].grad = None
            optimizer.step()

    errors = ranks.on_all(work)
    assert any(isinstance(error, CoherenceError) for error in errors)
    told = [str(error) for error in errors if "their schedules differ" in str(error)]
    assert told
    assert "parameter 0" in told[0]
