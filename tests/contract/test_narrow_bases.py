"""``state_dtype=torch.bfloat16``: eigenbases are stored in it, and nothing else is."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

import asteria
from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.asynchronous import GROWN, SHAPES, build, params_of
from tests.support.training import (
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    train,
    weights,
)

NARROW = {"state_dtype": torch.bfloat16}
RUNTIMES = {
    "async": RuntimeConfig(**NARROW),
    "sync": RuntimeConfig(refresh="sync", **NARROW),
    "ldlr": RuntimeConfig(refresh="sync", refresh_method="ldlr", **NARROW),
    "device": RuntimeConfig(refresh_on="device", refresh_method="ldlr", **NARROW),
}
over_runtimes = pytest.mark.parametrize("runtime", RUNTIMES)


def trained(name: str, runtime: RuntimeConfig, steps: int = GROWN + 6) -> SecondOrderOptimizer:
    optimizer = build(name, runtime)
    with contextlib.closing(optimizer):
        train(optimizer, range(steps))
        optimizer.state_dict()
    return optimizer


@over_runtimes
@over_optimizers
def test_bases_are_stored_in_it_and_nothing_else(name: str, runtime: str) -> None:
    optimizer = trained(name, RUNTIMES[runtime])
    wide = build(name, RuntimeConfig())
    for parameter in params_of(optimizer):
        for key, value in optimizer.state[parameter].items():
            narrow = key.startswith("basis")
            assert value.dtype == (torch.bfloat16 if narrow else torch.float32), key
    saved = wide.describe().state_bytes - optimizer.describe().state_bytes
    assert saved == 2 * (6 * 6 + 4 * 4 + 2 * 4 * 4 + 3 * 3 + 2 * 2 + 4 * 4)


@over_optimizers
def test_float64_keeps_float64(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters([(4, 4)], torch.float64), runtime=RUNTIMES["sync"])
    train(optimizer, range(3))
    assert optimizer.state[params_of(optimizer)[0]]["basis_0"].dtype == torch.float64


@over_runtimes
@over_optimizers
def test_the_run_stays_near_that_with_float32_bases(name: str, runtime: str) -> None:
    config = RUNTIMES[runtime]
    found = trained(name, config)
    wanted = trained(name, RuntimeConfig(refresh=config.refresh))
    start = weights(parameters(SHAPES))
    for key, weight in weights(params_of(wanted)).items():
        moved = (weight - start[key]).norm()
        assert (weights(params_of(found))[key] - weight).norm() < 0.2 * moved
    assert found.stats().failed_refreshes == 0
    assert not same_bits(weights(params_of(found))["0"], weights(params_of(wanted))["0"])


@over_optimizers
def test_moments_are_turned_into_the_basis_that_is_stored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    rule = type(OPTIMIZERS[name].rule)
    rotate_ = rule.rotate_

    def listening(self: object, state: object, fresh: list[Tensor], **options: object) -> None:
        given.extend(basis.clone() for basis in fresh if basis is not None)
        rotate_(self, state, fresh, **options)

    monkeypatch.setattr(rule, "rotate_", listening)
    for runtime in ("sync", "async", "device"):
        given.clear()
        trained(name, RUNTIMES[runtime])
        assert len(given) > 10
        for basis in given:
            assert basis.dtype == torch.float32
            assert torch.equal(basis, basis.bfloat16().float())


@over_optimizers
def test_without_staleness_asynchronous_is_synchronous(name: str) -> None:
    found = trained(name, RuntimeConfig(staleness=0, **NARROW))
    assert_same_bits(everything(found), everything(trained(name, RUNTIMES["sync"])))


@over_optimizers
def test_a_resumed_run_repeats_the_bits(name: str) -> None:
    optimizer = trained(name, RUNTIMES["async"])
    saved = copy.deepcopy(optimizer.state_dict())
    kind, options = OPTIMIZERS[name], {"runtime": RUNTIMES["async"]}
    twin = kind(clones(params_of(optimizer)), **options)
    twin.load_state_dict(saved)
    for each in (optimizer, twin):
        with contextlib.closing(each):
            train(each, range(GROWN + 6, GROWN + 16))
            each.state_dict()
    assert_same_bits(everything(twin), everything(optimizer))


@over_optimizers
def test_loading_rounds_or_widens_to_what_the_loader_stores(name: str) -> None:
    wide, narrow = trained(name, RuntimeConfig()), trained(name, RUNTIMES["async"])
    for source, runtime, dtype in (
        (wide, RUNTIMES["async"], torch.bfloat16),
        (narrow, RuntimeConfig(), torch.float32),
    ):
        twin = OPTIMIZERS[name](clones(params_of(source)), runtime=runtime)
        twin.load_state_dict(source.state_dict())
        mine, theirs = (each.state[params_of(each)[0]]["basis_0"] for each in (twin, source))
        assert mine.dtype == dtype
        assert torch.equal(mine.float(), theirs.to(dtype).float())
        with contextlib.closing(twin):
            train(twin, range(GROWN + 6, GROWN + 12))
        assert all(bool(w.isfinite().all()) for w in params_of(twin))


@over_optimizers
def test_a_slim_state_and_a_copy_work_as_ever(name: str) -> None:
    optimizer = trained(name, RUNTIMES["async"])
    twin = OPTIMIZERS[name](clones(params_of(optimizer)), runtime=RUNTIMES["async"])
    twin.load_state_dict(asteria.slim(optimizer.state_dict()))
    other = copy.deepcopy(optimizer)
    for each in (twin, other):
        with contextlib.closing(each):
            train(each, range(GROWN + 6, GROWN + 9))
            state = each.state[params_of(each)[0]]
        assert state["basis_0"].dtype == torch.bfloat16
        assert bool(params_of(each)[0].isfinite().all())
