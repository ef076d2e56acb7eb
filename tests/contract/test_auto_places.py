"""refresh_on="auto" on an accelerator: decided once, told, kept in checkpoints.

The host plays the accelerator, as far as it has to be asked.
"""

import pytest
import torch

from asteria import RuntimeConfig
from asteria.config.refresh_plan import KEY, MEASURING, Choice, read_plan
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.placing import Kind, Means
from asteria.runtime import choices, placer
from asteria.runtime.engine import Engine
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.asynchronous import build
from tests.support.execution import FakeClock, ManualExecutor
from tests.support.sides import ALIKE, DeferredSide, beside, on_host
from tests.support.training import (
    Shape,
    assert_same_bits,
    everything,
    parameters,
    same_bits,
    train,
)

ON_DEVICE = {(6, 4): Choice("device", "qr"), (4, 4): Choice("host", "qr")}


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory is taken for an accelerator's."""
    for module in (choices, placer):
        monkeypatch.setattr(module, "is_accelerator", lambda device: True)


@pytest.fixture
def kinds(accelerator: None, monkeypatch: pytest.MonkeyPatch) -> list[list[Kind]]:
    """What `choose` was asked; it says 6x4 on the device."""
    asked: list[list[Kind]] = []

    def choose(given: list[Kind], means: Means) -> list[Choice]:
        asked.append(given)
        assert means.step_s > 0
        return [
            ON_DEVICE[kind.dims]._replace(
                period=None if kind.period else {(6, 4): 2, (4, 4): 7}[kind.dims]
            )
            for kind in given
        ]

    monkeypatch.setattr(placer, "choose", choose)
    return asked


def auto(
    name: str = "SOAP", shapes: list[Shape] = ALIKE, period: object = PERIOD
) -> tuple[SecondOrderOptimizer, DeferredSide]:
    side = DeferredSide()
    built = build(name, RuntimeConfig(), shapes, precondition_frequency=period)
    return beside(built, side), side


def plan_of(optimizer: SecondOrderOptimizer) -> dict[tuple[int, ...], Choice]:
    return dict(read_plan(optimizer.param_groups[0][KEY]))


def test_in_host_memory_nothing_is_decided() -> None:
    """And the run is that of the host's workers."""
    optimizer, side = auto()
    train(optimizer, range(20))
    assert optimizer.param_groups[0][KEY] == ""
    assert side.runs == 0
    assert "refreshes" not in str(optimizer.describe())
    host = on_host("SOAP", ALIKE, refresh_on="host")
    train(host, range(20))
    assert_same_bits(everything(optimizer), everything(host))


@over_optimizers
def test_each_kind_is_refreshed_where_it_was_decided(name: str, kinds: list[list[Kind]]) -> None:
    """With the same bits as elsewhere, as the method is the same."""
    optimizer, side = auto(name)
    train(optimizer, range(30))
    assert plan_of(optimizer) == ON_DEVICE
    assert [[(k.dims, k.units, k.period) for k in given] for given in kinds] == [
        [((6, 4), 5, PERIOD), ((4, 4), 3, PERIOD)]
    ], "once, and for all kinds"
    stats = optimizer.stats()
    assert stats.device_s > 0
    assert stats.worker_s > 0
    assert side.waits == 0 or stats.steps == 30
    host = on_host(name, ALIKE)
    train(host, range(30))
    assert_same_bits(everything(optimizer), everything(host))


def test_it_says_what_it_does(kinds: list[list[Kind]]) -> None:
    optimizer, _ = auto(shapes=[*ALIKE, (5,)])
    assert "to be decided" in str(optimizer.describe())
    train(optimizer, range(3))
    rows = optimizer.describe().rows
    assert rows[0].refreshes == ("device qr",)
    assert rows[5].refreshes == ("host qr",)
    assert rows[-1].refreshes == ()
    head, first, *_ = str(optimizer.describe()).splitlines()
    assert head.endswith("refreshes")
    assert first.endswith("device qr")


def test_a_resumed_run_repeats_it(kinds: list[list[Kind]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = auto()
    train(whole, range(25))
    first, _ = auto()
    train(first, range(15))
    saved = first.state_dict()

    def other(given: list[Kind], means: Means) -> list[Choice]:
        raise AssertionError("it was decided before")

    monkeypatch.setattr(placer, "choose", other)
    second, _ = auto()
    for p, q in zip(*(o.param_groups[0]["params"] for o in (second, first)), strict=True):
        p.data.copy_(q)
    second.load_state_dict(saved)
    train(second, range(15, 25))
    assert plan_of(second) == ON_DEVICE
    assert_same_bits(everything(second), everything(whole))


def test_kinds_that_come_later_are_decided_then(kinds: list[list[Kind]]) -> None:
    optimizer, _ = auto(shapes=[(6, 4)])
    train(optimizer, range(4))
    assert list(plan_of(optimizer)) == [(6, 4)]
    optimizer.param_groups[0][KEY] = "6x4 host qr"  # as if it had been decided otherwise
    optimizer.add_param_group({"params": parameters([(4, 4)], seed=1)})
    train(optimizer, range(4, 8))
    assert plan_of(optimizer) == {(6, 4): Choice("host", "qr")}, "what was decided stays"
    assert dict(read_plan(optimizer.param_groups[1][KEY])) == {(4, 4): Choice("host", "qr")}


def test_a_plan_may_be_written_by_hand(accelerator: None) -> None:
    optimizer, side = auto(shapes=[(4, 4)], period=6)
    optimizer.param_groups[0][KEY] = "4x4 device qr every 2"
    train(optimizer, range(30))
    assert side.runs > 10, "more often than the group's period"
    (state,) = optimizer.state_dict()["state"].values()
    assert state["shadow_version"].shape[0] == 2, "places for what is in flight at that period"


def test_the_modelled_choice_depends_on_shapes_alone(accelerator: None) -> None:
    """Where the period is given: two runs have the same bits, whatever their clocks say."""
    finals = []
    for tick_s in (0.0, 3.0):
        clock = FakeClock()
        side, config = DeferredSide(), RuntimeConfig()
        optimizer = build("SOAP", config, ALIKE)
        optimizer._engine = Engine(config, executor=ManualExecutor(clock, 0.5), clock=clock)
        beside(optimizer, side)
        for step in range(20):
            train(optimizer, [step])
            clock.advance(tick_s)
        finals.append((everything(optimizer), optimizer.param_groups[0][KEY]))
    assert finals[0][1] == finals[1][1] != ""
    assert_same_bits(finals[0][0], finals[1][0])


# Where the clock may decide


def measured() -> tuple[SecondOrderOptimizer, DeferredSide]:
    clock = FakeClock()
    config = RuntimeConfig()
    optimizer = build("SOAP", config, ALIKE, precondition_frequency="auto", shampoo_beta=0.0)
    workers = ManualExecutor(clock)
    optimizer._engine = Engine(config, executor=workers, clock=clock)
    side = DeferredSide()
    beside(optimizer, side)
    for step in range(40):
        train(optimizer, [step])
        workers.run_all()
        if optimizer.param_groups[0][KEY] not in ("", MEASURING):
            break
        clock.advance(1.0)
    return optimizer, side


def test_an_automatic_period_comes_with_measured_places(kinds: list[list[Kind]]) -> None:
    """While it is measured, both take turns."""
    optimizer, side = measured()
    assert side.runs > 1
    ((six, four),) = kinds
    # A test's job takes no time but that of its executor, which is told to the flights alone.
    for kind in (six, four):
        assert kind.period is None
        assert set(kind.device_s) == {"ldlr", "qr"}
        assert min(kind.device_s.values()) <= 0.5, "a share of half a second"
    (group,) = optimizer.param_groups
    assert group["precondition_frequency"] == 7, "the longest of them"
    assert plan_of(optimizer) == {
        (6, 4): Choice("device", "qr", 2),
        (4, 4): Choice("host", "qr"),
    }
    before = optimizer.stats().installs
    train(optimizer, range(50, 64))
    assert optimizer.stats().installs - before >= 5 * 2 * 6, "every second step"


def test_what_is_being_measured_says_so(kinds: list[list[Kind]]) -> None:
    optimizer, _ = auto(period="auto")
    train(optimizer, range(3))
    assert optimizer.param_groups[0][KEY] == MEASURING
    assert optimizer.describe().rows[0].refreshes == (MEASURING,)
    saved = optimizer.state_dict()
    twin, _ = auto(period="auto")
    twin.load_state_dict(saved)
    assert twin.param_groups[0][KEY] == MEASURING


def test_while_it_is_measured_every_kind_sees_host_and_device(kinds: list[list[Kind]]) -> None:
    optimizer, side = auto(shapes=[(4, 4)], period="auto")
    optimizer.param_groups[0][KEY] = MEASURING
    seen = {
        choices._trial_of(choices.Unit(record, 0), turn)
        for record in (_record(optimizer),)
        for turn in range(4)
    }
    assert seen == {None, "ldlr", "qr"}


def _record(optimizer: SecondOrderOptimizer) -> choices.ParameterRecord:
    train(optimizer, range(1))
    (record,) = optimizer._records.values()
    return record


@pytest.mark.parametrize("method", ["qr", "ldlr", "eigh"])
def test_a_method_that_is_asked_for_is_used_wherever(method: str, kinds: list[list[Kind]]) -> None:
    config = RuntimeConfig(refresh_method=method)  # type: ignore[arg-type]
    optimizer = OPTIMIZERS["SOAP"](parameters(ALIKE), runtime=config, precondition_frequency=3)
    beside(optimizer, DeferredSide())
    train(optimizer, range(20))
    if method == "eigh":
        assert kinds == [], "only the host has it"
        return
    assert [set(kind.device_s) for kind in kinds[0]] == [{method}] * 2
    host = OPTIMIZERS["SOAP"](
        parameters(ALIKE),
        runtime=RuntimeConfig(refresh_method=method, refresh_on="host"),  # type: ignore[arg-type]
        precondition_frequency=3,
    )
    train(host, range(20))
    assert_same_bits(everything(optimizer), everything(host))


def test_a_chunk_whose_methods_differ_is_launched_by_method(accelerator: None) -> None:
    """While they are measured, units of one chunk are refreshed in different ways."""
    optimizer, side = auto(shapes=[(4, 4)] * 8, period="auto")
    train(optimizer, range(40))
    assert torch.isfinite(everything(optimizer)["0"]).all()
    assert not same_bits(everything(optimizer)["0"], everything(optimizer)["1"])
