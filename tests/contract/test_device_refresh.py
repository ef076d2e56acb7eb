"""Refreshes beside the training on the parameters' device: the same results, and no host waits.

The device is played by the host; the work is done as late as the order of streams allows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from asteria import ConfigError, RuntimeConfig
from asteria.linalg.eigenbasis import BasisResult
from asteria.linalg.method import refreshed
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import device_refresh, extents
from asteria.runtime.engine import Engine
from asteria.runtime.inline import InlineRefresher
from tests.support.arms import PERIOD, over_optimizers
from tests.support.asynchronous import GROWN, SHAPES, build, manual
from tests.support.sides import ALIKE, ONE, DeferredSide, beside, on_device, on_host
from tests.support.tiers import ARRANGEMENTS, arranged, limit_extents
from tests.support.training import (
    Shape,
    assert_same_bits,
    everything,
    same_bits,
    train,
)

# The same as by workers


@pytest.mark.parametrize(("shapes", "period"), [(SHAPES, PERIOD), (ALIKE, 1), (ALIKE, PERIOD)])
@pytest.mark.parametrize("staleness", [1, 2, 2 * PERIOD + 1])
@over_optimizers
def test_results_are_those_of_workers_bit_by_bit(
    name: str, staleness: int, shapes: list[Shape], period: int
) -> None:
    """And so are versions, ages and counts; not once has the host waited for the device."""
    side = DeferredSide()
    device = on_device(name, side, shapes, period, staleness=staleness)
    host = on_host(name, shapes, period, staleness=staleness)
    for each in (device, host):
        train(each, range(30))
    assert side.waits == 0
    assert side.joins > 10
    assert_same_bits(everything(device), everything(host))
    actual, expected = device.stats(), host.stats()
    assert actual.staleness == expected.staleness
    assert actual.installs == expected.installs
    assert actual.failures == {}
    assert actual.device_s > 0
    assert actual.worker_s == 0


@over_optimizers
def test_methods_and_dtypes_are_those_of_the_host(name: str) -> None:
    device = on_device(name, DeferredSide(), ALIKE, refresh_method="ldlr")
    host = on_host(name, ALIKE, refresh_method="ldlr")
    other = on_host(name, ALIKE, refresh_method="qr")
    narrow = [
        make(name, *more, ALIKE, state_dtype=torch.bfloat16)
        for make, more in ((on_host, ()), (on_device, (DeferredSide(),)))
    ]
    for each in (device, host, other, *narrow):
        train(each, range(24))
    assert_same_bits(everything(device), everything(host))
    assert not same_bits(everything(host)["0"], everything(other)["0"])
    assert_same_bits(*map(everything, narrow))


@over_optimizers
def test_bases_in_bfloat16_are_those_of_the_host(name: str) -> None:
    narrow: dict[str, Any] = {"state_dtype": torch.bfloat16}
    device = on_device(name, DeferredSide(), ALIKE, **narrow)
    host = on_host(name, ALIKE, **narrow)
    for each in (device, host):
        train(each, range(24))
    assert_same_bits(everything(device), everything(host))


@pytest.mark.parametrize("start", ["eigh", "adam"])
@over_optimizers
def test_whatever_the_beginning(name: str, start: Any) -> None:
    """Exact bases are computed by workers: eigensolvers make the host wait for the device."""
    device, host = on_device(name, DeferredSide(), start=start), on_host(name, start=start)
    device, workers = manual(device)
    beside(device, DeferredSide())
    for each in (device, host):
        train(each, range(20))
    assert len(workers.done) == (3 if start == "adam" else 0)
    assert_same_bits(everything(device), everything(host))


@over_optimizers
def test_without_staleness_it_is_the_synchronous_run(name: str) -> None:
    optimizers = [
        build(name, RuntimeConfig(refresh_on="device", staleness=0)),
        build(name, RuntimeConfig(refresh="sync")),
    ]
    for optimizer in optimizers:
        train(optimizer, range(25))
    assert_same_bits(*map(everything, optimizers))


@over_optimizers
def test_host_memory_is_a_device_that_has_nothing_beside(name: str) -> None:
    plain = build(name, RuntimeConfig(refresh_on="device"))
    host = on_host(name)
    for each in (plain, host):
        train(each, range(25))
    assert_same_bits(everything(plain), everything(host))
    assert plain.stats().device_s > 0


def test_tiles_of_a_chunk_that_are_due_together_are_one_piece_of_work() -> None:
    side = DeferredSide()
    optimizer = on_device("SOAP", side, ALIKE, period=1, start="eigh")
    train(optimizer, range(6))
    assert side.runs == 2 * 5  # two block shapes, no refresh in the step that makes the bases


def test_temporary_memory_stays_within_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due together goes through the products in parts, with the same results."""
    finals = []
    for chunk_bytes in (extents.CHUNK_BYTES, 128):
        monkeypatch.setattr(extents, "CHUNK_BYTES", chunk_bytes)
        stacks: list[int] = []

        def counted(
            factor: Tensor, basis: Tensor, *, stacks: list[int] = stacks, **how: Any
        ) -> BasisResult:
            stacks.append(len(factor))
            return refreshed(factor, basis, **how)

        monkeypatch.setattr(device_refresh, "refreshed", counted)
        optimizer = on_device("SOAP", DeferredSide(), [(4, 4)] * 6, 1, start="eigh")
        finals.append(optimizer)
        train(optimizer, range(8))
        assert max(stacks) == (6 if chunk_bytes > 128 else 2)
    assert_same_bits(*map(everything, finals))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_wherever_the_state_lives(arrangement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_extents(monkeypatch, 600)  # with one tile or two
    expected = on_host("SOAP", ALIKE)
    train(expected, range(20))
    side = DeferredSide()
    optimizer = on_device("SOAP", side, ALIKE)
    arranged(optimizer, ARRANGEMENTS[arrangement])
    beside(optimizer, side)
    train(optimizer, range(20))
    assert side.waits == 0
    assert side.joins > 10
    assert_same_bits(everything(optimizer), everything(expected))


def test_ready_results_are_those_that_the_device_has_come_to() -> None:
    side = DeferredSide()
    optimizer = on_device("SOAP", side, ONE, install="ready", staleness=3, period=5)
    train(optimizer, range(GROWN + 15))
    (ages,) = optimizer.stats().staleness.values()
    assert max(ages) == 8, "the device never came to it before the bound"


# Checkpoints and refused steps


@over_optimizers
def test_a_run_resumes_with_refreshes_in_flight(name: str) -> None:
    whole = on_device(name, DeferredSide(), ALIKE, period=1)
    train(whole, range(25))
    first = on_device(name, DeferredSide(), ALIKE, period=1)
    train(first, range(15))
    saved = first.state_dict()
    assert first.stats().in_flight > 0
    second = on_device(name, DeferredSide(), ALIKE, period=1)
    for p, q in zip(_parameters(second), _parameters(first), strict=True):
        p.data.copy_(q)
    second.load_state_dict(saved)
    train(second, range(15, 25))
    assert_same_bits(everything(second), everything(whole))


def _parameters(optimizer: SecondOrderOptimizer) -> list[Tensor]:
    params: list[Tensor] = optimizer.param_groups[0]["params"]
    return params


@over_optimizers
def test_a_refused_step_takes_its_launches_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def through_the_gate(
        self: Engine, names: list[str], gradients: list[Tensor], *, ready: bool
    ) -> Any:
        if not ready:
            return look(self, names, gradients, ready=ready)
        self._counters.steps += 1
        self._collect_verdicts(wait=False)
        return True, self._guard.gate(gradients, names)

    look = Engine.accepts
    monkeypatch.setattr(Engine, "accepts", through_the_gate)
    disturbed, undisturbed = (
        on_device(name, DeferredSide(), period=2, nonfinite="skip") for _ in range(2)
    )
    for step in range(25):
        train(disturbed, [step])
        train(undisturbed, [step])
        if step % 2:
            for p in _parameters(disturbed):
                p.grad = torch.full_like(p, torch.nan)
            disturbed.step()
    assert_same_bits(everything(disturbed), everything(undisturbed))
    assert disturbed.stats().skipped_steps == 12


# Inside the step


@over_optimizers
def test_inside_the_step_the_device_does_what_the_host_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals = []
    for is_on_host in (True, False):
        monkeypatch.setattr(InlineRefresher, "_is_on_host", lambda self, _, on=is_on_host: on)
        optimizer = build(name, RuntimeConfig(refresh="sync"), ALIKE)
        train(optimizer, range(20))
        assert optimizer.stats().failures == {}
        finals.append((everything(optimizer), optimizer.stats().staleness))
    assert_same_bits(finals[0][0], finals[1][0])
    assert finals[0][1] == finals[1][1]


def test_exact_refreshes_on_a_device_are_refused() -> None:
    with pytest.raises(ConfigError, match="eigensolvers make the host wait"):
        RuntimeConfig(refresh_on="device", refresh_method="eigh")
    RuntimeConfig(refresh_on="device", refresh_method="eigh", refresh="sync")
