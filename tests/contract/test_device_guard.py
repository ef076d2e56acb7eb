"""The accelerator's way with non-finite gradients: a gate closes, the report follows later.

Here it is taken on the host, where the results can be compared bit by bit.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from asteria import SOAP, NonFiniteGradientError, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime.engine import Engine
from asteria.runtime.guard import DeviceGuard
from tests.support.arms import PERIOD, Arm, over_arms
from tests.support.tolerances import GATED
from tests.support.training import (
    SMALL,
    Bits,
    Shape,
    assert_near,
    assert_same_bits,
    clones,
    everything,
    parameters,
    set_gradients,
    train,
    weights,
)

SHAPES: list[Shape] = [*SMALL, (), (4, 3, 3, 3)]

_look = Engine.accepts


def _through_the_gate(
    self: Engine, names: list[str], gradients: list[Tensor], *, ready: bool
) -> tuple[bool, Tensor | None]:
    """What `Engine.accepts` does if the gradients are on an accelerator."""
    if not ready:
        return _look(self, names, gradients, ready=ready)
    self._counters.steps += 1
    self._collect_verdicts(wait=False)
    return True, self._guard.gate(gradients, names)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "accepts", _through_the_gate)


def skipping(
    arm: Arm, dtype: torch.dtype = torch.float32, **options: object
) -> SecondOrderOptimizer:
    """An optimizer that counts non-finite gradients and goes on."""
    runtime = replace(arm.runtime, nonfinite="skip")
    return arm(parameters(SHAPES, dtype), runtime=runtime, weight_decay=0.3, **options)


def bad_step(optimizer: SecondOrderOptimizer, value: float) -> None:
    """One with a vector's gradient spoilt by ``value``."""
    params = optimizer.param_groups[0]["params"]
    set_gradients(params, 99)
    params[1].grad[3] = value
    optimizer.step()


def due_to_land(optimizer: SecondOrderOptimizer) -> Bits:
    """The bases that the next step will install, by their names in `everything`."""
    landing = {}
    for index, entries in optimizer.state_dict()["state"].items():
        if "shadow_lands" in entries:
            if 0 < entries["shadow_lands"].item() <= entries["step"]:
                landing |= {
                    f"{index}.{key.removeprefix('shadow_')}": value[0, 0]
                    for key, value in entries.items()
                    if key.startswith("shadow_basis")
                }
    return landing


@pytest.mark.parametrize("options", [{}, {"normalize_grads": True, "maximize": True}])
@over_arms
def test_open_gate_changes_nothing_but_rounding(
    arm: Arm, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, through_gate = skipping(arm, **options), skipping(arm, **options)
    start = weights(parameters(SHAPES))
    train(plain, range(3 * PERIOD))
    monkeypatch.setattr(Engine, "accepts", _through_the_gate)
    train(through_gate, range(3 * PERIOD))
    actual, expected = (weights(o.param_groups[0]["params"]) for o in (through_gate, plain))
    assert_near(actual, expected, GATED, torch.float32, start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("gated")
@over_arms
def test_closed_gate_leaves_every_bit(arm: Arm, dtype: torch.dtype) -> None:
    """Of weights, moments, factors and bases, whether or not a refresh was due at that step.

    But for what a worker has computed and is to be installed before that step: it is, and the
    moments are carried along, as in the next step otherwise. Counters are the host's, which learns
    of the skipped step later.
    """
    options = {"normalize_grads": True, "stochastic_rounding": True, "shampoo_beta": 0.0}
    installs = 0
    for steps in range(1, 5 * PERIOD):
        optimizer = skipping(arm, dtype, **options)
        train(optimizer, range(steps))
        before, landing = everything(optimizer), due_to_land(optimizer)
        bad_step(optimizer, float("nan"))
        after = everything(optimizer)
        installs += len(landing)
        moving = {name for name in before if name.endswith((".step", ".version"))}
        for name in landing:
            moving |= {f"{name.split('.')[0]}.{moment}" for moment in ("exp_avg", "exp_avg_sq")}
        assert_same_bits(
            after, before | landing | {name: after[name] for name in moving & after.keys()}
        )
    assert bool(installs) == arm.is_asynchronous


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("gated")
def test_nor_does_a_factor_turn(dtype: torch.dtype) -> None:
    runtime = RuntimeConfig(refresh="sync", factors="rotated")
    test_closed_gate_leaves_every_bit(Arm("SOAP-rotated", SOAP, runtime), dtype)


@pytest.mark.usefixtures("gated")
@over_arms
def test_run_goes_on_as_if_nothing_had_been(arm: Arm) -> None:
    """Whether it was a step that refreshes, launches a refresh or installs one."""
    optimizer, undisturbed = (skipping(arm, shampoo_beta=0.0) for _ in range(2))
    for step in range(9 * PERIOD):
        train(optimizer, [step])
        train(undisturbed, [step])
        if step % 2:
            bad_step(optimizer, float("nan"))
    assert_same_bits(everything(optimizer), everything(undisturbed))


@pytest.mark.usefixtures("gated")
@over_arms
def test_what_is_saved_or_copied_counts_no_refused_step(arm: Arm) -> None:
    """Even right after it: the report is waited for."""
    optimizer, undisturbed = skipping(arm), skipping(arm)
    for each in (optimizer, undisturbed):
        train(each, range(4))
    expected = everything(undisturbed)
    bad_step(optimizer, float("nan"))
    saved = copy.deepcopy(optimizer.state_dict())
    bad_step(optimizer, float("inf"))
    copied = copy.deepcopy(optimizer)
    loaded = arm(clones(optimizer.param_groups[0]["params"]))
    loaded.load_state_dict(saved)
    assert_same_bits(everything(loaded), expected)
    assert_same_bits(everything(copied), expected)


@pytest.mark.usefixtures("gated")
@over_arms
def test_skipped_steps_are_counted_once_the_report_has_arrived(arm: Arm) -> None:
    optimizer = skipping(arm)
    for step in range(6):
        train(optimizer, [step])
        bad_step(optimizer, float("inf"))
    assert optimizer.stats().skipped_steps == 6
    assert optimizer.stats().steps == 12
    assert optimizer.stats().skipped_steps == 6


@pytest.mark.usefixtures("gated")
@over_arms
def test_error_is_raised_at_the_next_step_by_name(arm: Arm) -> None:
    """Before that step changes anything, so it can be repeated."""
    named = [(f"layer.{index}", p) for index, p in enumerate(parameters(SHAPES))]
    optimizer = arm(named)
    train(optimizer, range(3))
    sound = everything(optimizer)
    bad_step(optimizer, float("nan"))
    before = everything(optimizer)
    with pytest.raises(NonFiniteGradientError, match=r"layer\.1 holds inf or nan"):
        train(optimizer, [3])
    counters = {name: sound[name] for name in sound if name.endswith((".step", ".version"))}
    assert_same_bits(everything(optimizer), before | counters)
    train(optimizer, [3])
    assert optimizer.stats().skipped_steps == 1


def test_guard_tells_of_every_bad_step_once() -> None:
    guard = DeviceGuard()
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan")])
    narrow = torch.tensor([float("-inf")], dtype=torch.bfloat16)
    empty = torch.zeros(0)
    cases: list[tuple[list[Tensor], list[str]]] = [
        ([good, good], []),
        ([good, bad], ["b"]),
        ([empty, good], []),
        ([bad, narrow, good], ["a", "b"]),
        ([good.double(), narrow, bad], ["b", "c"]),
    ]
    for gradients, names in cases:
        gate = guard.gate(gradients, ["a", "b", "c"][: len(gradients)])
        assert gate.dtype == torch.float32
        assert gate == (0.0 if names else 1.0)
    told = [sorted(names) for names in guard.collect()]
    assert told == [names for _, names in cases if names]
    assert guard.collect(wait=True) == []
