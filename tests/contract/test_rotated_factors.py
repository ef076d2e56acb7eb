"""``factors="rotated"``: the run of full factors and LDLR, with Q^T L Q in place of every L."""

import contextlib
import dataclasses
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import asteria
from asteria import ConfigError, RuntimeConfig
from asteria.linalg import method as methods
from asteria.linalg.eigenbasis import BasisResult
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import extents, turning
from tests.linalg.matrices import defect
from tests.support.arms import PERIOD
from tests.support.asynchronous import GROWN, build, manual, params_of
from tests.support.sides import ALIKE, DeferredSide, on_device, on_host
from tests.support.training import (
    Shape,
    assert_same_bits,
    everything,
    parameters,
    set_gradients,
    train,
    weights,
)

ROTATED: dict[str, Any] = {"factors": "rotated"}
SHAPES: list[Shape] = [(6, 4), (5,), (4, 4), (3, 2, 4), (6, 4)]
PARITY = 1e-11
"""Largest difference of weights, of order 1, in float64: rounding, over 30 steps."""
RUNTIMES: dict[str, dict[str, Any]] = {
    "async": {},
    "sync": {"refresh": "sync"},
    "stale": {"staleness": 5},
    "eigh": {"start": "eigh"},
    "adam": {"start": "adam"},
    "sync adam": {"refresh": "sync", "start": "adam"},
    "device": {"refresh_on": "device"},
}
over_runtimes = pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)


def run(
    runtime: dict[str, Any],
    *,
    steps: int = 30,
    shapes: list[Shape] = SHAPES,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> SecondOrderOptimizer:
    given = {"lr": 2.0**-6, "shampoo_beta": 0.5, "precondition_frequency": 1} | options
    group = {"params": parameters(shapes, dtype), "batch_dims": given.pop("batch_dims", None)}
    optimizer = asteria.SOAP([group], runtime=RuntimeConfig(**runtime), **given)
    with contextlib.closing(optimizer):
        train(optimizer, range(steps))
        optimizer.state_dict()
    return optimizer


def pairs(optimizer: SecondOrderOptimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, factor, basis) of all factors."""
    for index, p in enumerate(params_of(optimizer)):
        state = optimizer.state[p]
        for key in state:
            if key.startswith("factor_"):
                yield f"{index}.{key}", state[key], state[key.replace("factor", "basis")]


def assert_is_the_run_of(found: SecondOrderOptimizer, wanted: SecondOrderOptimizer) -> None:
    """Weights and bases are the same but for rounding, factors in the coordinates of these."""
    ours, theirs = weights(params_of(found)), weights(params_of(wanted))
    for key, weight in theirs.items():
        assert (ours[key] - weight).abs().max() < PARITY, key
    for (key, rotated, basis), (_, factor, other) in zip(pairs(found), pairs(wanted), strict=True):
        same = (basis.mT @ other).abs()  # the first of start="adam" have other signs
        assert (same - torch.eye(same.shape[-1], dtype=same.dtype)).abs().max() < 1e-8, key
        assert (rotated - basis.mT @ factor @ basis).abs().max() < PARITY, key
    assert found.stats().installs == wanted.stats().installs
    assert found.stats().failures == {}


@over_runtimes
def test_it_is_the_trajectory_of_full_factors(runtime: dict[str, Any]) -> None:
    found, wanted = (run(runtime | how) for how in (ROTATED, {"refresh_method": "ldlr"}))
    assert_is_the_run_of(found, wanted)


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_it_is_so_with_steps_between_refreshes(refresh: str) -> None:
    found, wanted = (
        run({"refresh": refresh, **how}, precondition_frequency=PERIOD)
        for how in (ROTATED, {"refresh_method": "ldlr"})
    )
    assert_is_the_run_of(found, wanted)


OPTIONS: dict[str, dict[str, Any]] = {
    "one-sided": {"max_precond_dim": 4},
    "tiles": {"max_precond_dim": 4, "large_dims": "blocks"},
    "stacks": {"batch_dims": 1},
    "normalized": {"normalize_grads": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("refresh", ["sync", "async"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_the_blocks(options: dict[str, Any], refresh: str) -> None:
    shapes: list[Shape] = [(7, 4), (4, 4), (3, 4, 5), (7, 4)]
    shapes = [(3, 6, 4), (2, 4, 4)] if "batch_dims" in options else [*shapes, (5,)]
    found, wanted = (
        run({"refresh": refresh, **how}, shapes=shapes, steps=20, **options)
        for how in (ROTATED, {"refresh_method": "ldlr"})
    )
    assert_is_the_run_of(found, wanted)


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_large_blocks_go_by_rows_and_turn_once(
    refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shapes": [(40, 4), (4, 4)], "max_precond_dim": 8}
    wanted = run({"refresh": refresh, "refresh_method": "ldlr"}, **options)
    monkeypatch.setattr(extents, "CHUNK_BYTES", 12 * 4 * 8)
    assert_is_the_run_of(run({"refresh": refresh, **ROTATED}, **options), wanted)


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_stacks_turn_a_chunk_at_a_time(refresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits."""
    options: dict[str, Any] = {"shapes": [(7, 6, 4)], "batch_dims": 1, "dtype": torch.float32}
    stacks: list[int] = []
    real = turning.conjugated

    def counted(rotated: Tensor, by: Tensor) -> Tensor:
        stacks.append(len(rotated))
        return real(rotated, by)

    monkeypatch.setattr(turning, "conjugated", counted)
    wanted = everything(run({"refresh": refresh, **ROTATED}, **options))
    assert set(stacks) == {7}
    stacks.clear()
    monkeypatch.setattr(extents, "CHUNK_BYTES", 3 * 36 * 4)
    found = everything(run({"refresh": refresh, **ROTATED}, **options))
    assert set(stacks) == {3, 1}
    assert_same_bits(found, wanted)


def test_without_staleness_asynchronous_is_synchronous() -> None:
    found, wanted = (
        run(ROTATED | how, dtype=torch.float32) for how in ({"staleness": 0}, {"refresh": "sync"})
    )
    assert_same_bits(everything(found), everything(wanted))


@pytest.mark.parametrize("period", [1, PERIOD])
def test_results_do_not_depend_on_the_workers_speed(period: int) -> None:
    runs = []
    for seed in range(2):
        chance = random.Random(seed)
        given = {"precondition_frequency": period, "shapes": SHAPES}
        optimizer, workers = manual(build("SOAP", RuntimeConfig(**ROTATED), **given))
        for step in range(30):
            set_gradients(params_of(optimizer), step)
            workers.run_some(chance)
            optimizer.step()
        runs.append(everything(optimizer))
    assert_same_bits(*runs)


# What it costs


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        self.count += name in ("mm", "bmm", "addmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def test_a_step_projects_its_gradient_once() -> None:
    counts = []
    for how in (ROTATED, {}):
        optimizer = run({"refresh": "sync"} | how, steps=GROWN, precondition_frequency=100)
        with Products() as products:
            train(optimizer, [GROWN])
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


def test_bytes_are_those_of_full_factors_and_the_table_says_how_they_are_kept() -> None:
    ours, full = (
        asteria.SOAP(parameters(SHAPES), runtime=RuntimeConfig(**how)).describe()
        for how in (ROTATED, {})
    )
    assert ours.state_bytes == full.state_bytes
    assert [row.factors_kept for row in ours.rows] == [
        "rotated",
        "",
        "rotated",
        "rotated",
        "rotated",
    ]
    assert "6, 4, rotated" in str(ours)
    assert "rotated" not in str(full)
    assert {row.factors_kept for row in full.rows} == {"full", ""}


# Numbers


@pytest.mark.parametrize("runtime", [{"refresh": "sync"}, {}, {"staleness": 5}])
def test_the_factor_is_that_of_all_gradients_and_does_not_drift(runtime: dict[str, Any]) -> None:
    """Two hundred steps in float32, against L from the same gradients in float64."""
    shapes: list[Shape] = [(12, 8), (8, 8)]
    beta, steps = 0.9, 200
    params = parameters(shapes)
    given = {"precondition_frequency": 1, "shampoo_beta": beta, "lr": 2.0**-8}
    optimizer = asteria.SOAP(params, runtime=RuntimeConfig(**ROTATED, **runtime), **given)
    true: dict[str, Tensor] = {}
    errors = []
    with contextlib.closing(optimizer):
        for step in range(steps):
            set_gradients(params, step)
            for index, p in enumerate(params):
                # The last singular values of the gradient are a hundredth of the first.
                size = p.shape[1]
                p.grad = p.grad * torch.logspace(0, -2, size)
                gradient = p.grad.double()
                for mode, gram in enumerate((gradient @ gradient.mT, gradient.mT @ gradient)):
                    key = f"{index}.factor_{mode}"
                    true[key] = beta * true.get(key, torch.zeros(())) + (1 - beta) * gram
            optimizer.step()
            worst = 0.0
            for key, rotated, basis in pairs(optimizer) if step >= 20 else ():
                q = basis.double()
                wanted = q.mT @ true[key] @ q
                unit = wanted.diagonal().rsqrt()
                error = (rotated - wanted) * unit * unit.unsqueeze(-1)
                worst = max(worst, float(error.abs().max()))
                assert defect(basis[None]) < 1e-5
            errors.append(worst)
    assert max(errors) < 1e-3, "relative to the roots of the diagonal"
    assert max(errors[-60:]) < 3 * max(errors[20:80]), "it does not grow"
    assert optimizer.stats().failed_refreshes == 0


# Failures


class Failing:
    """A refresh of rotated factors that comes to nothing in some dtypes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
        self._dtypes, self._real = dtypes, methods.rotated_ldlr
        monkeypatch.setattr(methods, "rotated_ldlr", self)

    def __call__(self, factor: Tensor, basis: Tensor, **options: Any) -> BasisResult:
        result = self._real(factor, basis, **options)
        if factor.dtype not in self._dtypes:
            return result
        return BasisResult(result.basis * float("nan"), torch.zeros_like(result.usable))


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_what_float64_mends_is_only_counted(refresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run({"refresh": refresh, **ROTATED}, dtype=torch.float32)
    Failing(monkeypatch, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run({"refresh": refresh, **ROTATED}, dtype=torch.float32)
    assert found.stats().retried_refreshes > 100
    assert found.stats().failed_refreshes == 0
    for key, weight in weights(params_of(wanted)).items():
        torch.testing.assert_close(weights(params_of(found))[key], weight, rtol=0, atol=1e-3)


def test_a_failure_in_float64_too_is_left_to_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, torch.float32, torch.float64)
    found = run({"refresh": "sync", **ROTATED}, dtype=torch.float32)
    assert found.stats().retried_refreshes > 100
    assert found.stats().failed_refreshes == 0
    for _, rotated, basis in pairs(found):
        off = rotated - rotated.diagonal().diag()
        assert off.abs().max() < 1e-5 * rotated.max()
        assert defect(basis[None]) < 1e-5


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_a_factor_that_is_not_finite_leaves_the_basis_in_use(refresh: str) -> None:
    runtime = RuntimeConfig(refresh=refresh, **ROTATED)
    optimizer, _ = manual(build("SOAP", runtime, SHAPES, precondition_frequency=1))
    train(optimizer, range(GROWN + 3))
    spoilt, other = (optimizer.state[params_of(optimizer)[index]] for index in (0, 2))
    spoilt["factor_0"][1, 1] = float("nan")
    before = spoilt["basis_0"].clone()
    with pytest.warns(RuntimeWarning, match="nonfinite factor"):
        train(optimizer, range(GROWN + 3, GROWN + 9))
    if refresh == "sync":
        assert torch.equal(spoilt["basis_0"], before)
    assert defect(spoilt["basis_0"][None]) < 1e-5, "what was in flight was sound"
    assert optimizer.stats().failures["nonfinite factor"] >= 3
    assert torch.isfinite(other["factor_0"]).all()


# Beside the training on the parameters' device


@pytest.mark.parametrize("period", [1, PERIOD])
@pytest.mark.parametrize("staleness", [1, 2, 2 * PERIOD + 1])
def test_on_a_device_it_is_what_workers_do(staleness: int, period: int) -> None:
    side = DeferredSide()
    given: dict[str, Any] = {"staleness": staleness, "refresh_method": "ldlr", **ROTATED}
    device = on_device("SOAP", side, ALIKE, period, **given)
    host = on_host("SOAP", ALIKE, period, **given)
    for each in (device, host):
        train(each, range(30))
    assert side.waits == 0
    assert side.joins > 10
    assert_same_bits(everything(device), everything(host))


def test_a_block_that_keeps_its_bases_on_a_device_keeps_its_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To every bit, where the same step without an install has them."""
    device = on_device("SOAP", DeferredSide(), ALIKE, 100, **ROTATED)
    lone = on_device("SOAP", DeferredSide(), ALIKE, 100, **ROTATED)
    for each in (device, lone):
        train(each, range(GROWN))
    Failing(monkeypatch, torch.float32)
    device.param_groups[0]["precondition_frequency"] = 1
    with pytest.warns(RuntimeWarning, match="no basis on the device"):
        train(device, range(GROWN, GROWN + 6))
    train(lone, range(GROWN, GROWN + 6))
    stats = device.stats()
    assert stats.failures["no basis on the device"] > 0
    ours, theirs = everything(device), everything(lone)
    keys = [key for key in theirs if "factor" in key or "exp_avg" in key or "basis" in key]
    assert_same_bits({key: ours[key] for key in keys}, {key: theirs[key] for key in keys})


# Refusals


@pytest.mark.parametrize(
    "given",
    [{"refresh_method": "qr"}, {"refresh_method": "eigh"}, {"state_dtype": torch.bfloat16}],
)
def test_what_does_not_turn_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"rotated.*{next(iter(given))}"):
        RuntimeConfig(**ROTATED, **given)


@pytest.mark.parametrize("optimizer", [asteria.KLShampoo, asteria.KLSOAP])
def test_only_soap_has_it(optimizer: type[SecondOrderOptimizer]) -> None:
    with pytest.raises(ConfigError, match=f"rotated.*{optimizer.rule.name}"):
        optimizer(parameters(SHAPES), runtime=RuntimeConfig(**ROTATED))


def test_the_method_is_ldlr() -> None:
    config = RuntimeConfig(**ROTATED)
    assert (config.refresh_method, config.method) == ("auto", "ldlr")
    assert dataclasses.replace(config, factors="full").method == "auto"
    assert RuntimeConfig(refresh_method="ldlr", **ROTATED).method == "ldlr"
