"""Checkpoints of ``factors="rotated"``: resumed bit by bit, and loaded by other runs."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import asteria
from asteria import CheckpointError, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import PERIOD
from tests.support.asynchronous import GROWN, build, flying, params_of
from tests.support.tiers import ARRANGEMENTS, arranged, limit_extents
from tests.support.training import (
    Bits,
    Shape,
    assert_same_bits,
    clones,
    everything,
    gradient,
    parameters,
    train,
    weights,
)

ROTATED: dict[str, Any] = {"factors": "rotated"}
FULL: dict[str, Any] = {"refresh_method": "ldlr"}
PACKED: dict[str, Any] = {**FULL, "factors": "packed"}
SHAPES: list[Shape] = [(7, 4), (5,), (4, 4), (3, 2, 4)]
TILES: dict[str, Any] = {"max_precond_dim": 4, "large_dims": "blocks"}
"""The first parameter consists of two tiles of different shape."""


def run_of(period: int = PERIOD, **runtime: Any) -> SecondOrderOptimizer:
    given = {"precondition_frequency": period, **TILES}
    return build("SOAP", RuntimeConfig(**runtime), SHAPES, **given)


def all_of(optimizer: SecondOrderOptimizer) -> Bits:
    """Weights, and state with what is in flight."""
    state = optimizer.state_dict()["state"]
    flat = {f"{p}.{key}": t.clone() for p, entries in state.items() for key, t in entries.items()}
    return everything(optimizer) | flat


def saved_and_loaded(optimizer: SecondOrderOptimizer) -> SecondOrderOptimizer:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = asteria.SOAP(clones(params_of(optimizer)), runtime=optimizer._runtime, **TILES)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def pickled(optimizer: SecondOrderOptimizer) -> SecondOrderOptimizer:
    twin: SecondOrderOptimizer = pickle.loads(pickle.dumps(optimizer))
    return twin


WAYS: dict[str, Callable[[SecondOrderOptimizer], SecondOrderOptimizer]] = {
    "saved and loaded": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
}


@pytest.mark.parametrize(
    ("runtime", "period"), [({}, 1), ({}, PERIOD), ({"staleness": 5}, 1)], ids=str
)
def test_every_step_can_be_resumed_to_the_same_bits(runtime: dict[str, Any], period: int) -> None:
    window, end = range(GROWN, GROWN + PERIOD + 1), GROWN + 2 * PERIOD + 5
    optimizer = run_of(period, **ROTATED, **runtime)
    train(optimizer, range(GROWN))
    twins = []
    for step in window:
        for way in WAYS if step == window[1] else ("saved and loaded",):
            twin = WAYS[way](optimizer)
            assert_same_bits(all_of(twin), all_of(optimizer))
            twins.append((step, twin))
        train(optimizer, [step])
    assert flying(optimizer)
    train(optimizer, range(window.stop, end))
    expected = all_of(optimizer)
    for step, twin in twins:
        train(twin, range(step, end))
        assert_same_bits(all_of(twin), expected)
        twin.close()
    optimizer.close()


def test_the_file_says_how_factors_are_given() -> None:
    for runtime, text in ((ROTATED, "soap/1/rotated"), ({}, "soap/1")):
        with contextlib.closing(run_of(**runtime)) as optimizer:
            train(optimizer, range(3))
            (group,) = optimizer.state_dict()["param_groups"]
            assert group["asteria"] == text


def double(runtime: dict[str, Any], steps: int) -> SecondOrderOptimizer:
    """In float64, so that only rounding of that differs."""
    params = parameters(SHAPES, torch.float64)
    options = {"lr": 2.0**-6, "shampoo_beta": 0.5, "precondition_frequency": 1, **TILES}
    optimizer = asteria.SOAP(params, runtime=RuntimeConfig(**runtime), **options)
    train(optimizer, range(steps))
    return optimizer


def loaded(runtime: dict[str, Any], given: SecondOrderOptimizer) -> SecondOrderOptimizer:
    twin = asteria.SOAP(clones(params_of(given)), runtime=RuntimeConfig(**runtime), **TILES)
    twin.load_state_dict(copy.deepcopy(given.state_dict()))
    return twin


@pytest.mark.parametrize("refresh", ["async", "sync"])
@pytest.mark.parametrize(
    ("first", "then"),
    [(ROTATED, FULL), (FULL, ROTATED), (ROTATED, PACKED), (PACKED, ROTATED)],
)
def test_either_form_goes_on_as_the_other(
    first: dict[str, Any], then: dict[str, Any], refresh: str
) -> None:
    """With refreshes in flight, to rounding errors of float64."""
    split, end = GROWN + 3, GROWN + 12
    source = double({**first, "refresh": refresh}, split)
    twin = loaded({**then, "refresh": refresh}, source)
    group = twin.state_dict()["param_groups"][0]
    assert group["asteria"] == ("soap/1/rotated" if then is ROTATED else "soap/1")
    for optimizer in (source, twin):
        train(optimizer, range(split, end))
    for key, weight in weights(params_of(source)).items():
        assert (weights(params_of(twin))[key] - weight).abs().max() < 1e-11
    for optimizer in (source, twin):
        optimizer.close()


def kept_factors(optimizer: SecondOrderOptimizer) -> dict[str, Tensor]:
    return {key: value for key, value in everything(optimizer).items() if "factor" in key}


def test_there_and_back_are_the_same_factors() -> None:
    source = double({"refresh": "sync", **ROTATED}, GROWN)
    full = loaded({"refresh": "sync"}, source)
    back = loaded({"refresh": "sync", **ROTATED}, full)
    for key, factor in kept_factors(source).items():
        torch.testing.assert_close(kept_factors(back)[key], factor, rtol=0, atol=1e-12)
        assert (kept_factors(full)[key] - factor).abs().max() > 1e-3


def test_a_state_that_was_converted_is_not_converted_again() -> None:
    """When blocks move because there are more of them."""
    source = double({"refresh": "sync", **FULL}, GROWN)
    twin = loaded({"refresh": "sync", **ROTATED}, source)
    expected = kept_factors(twin)
    assert not any(record.has_foreign_factors for record in twin._records.values())
    extra = parameters([(4, 4), (7, 4)], torch.float64, seed=1)
    twin.add_param_group({"params": extra})
    for p in extra:
        p.grad = gradient(tuple(p.shape), p.dtype, 0, 9)
    for p in params_of(twin):
        p.grad = None
    twin.step()
    found = kept_factors(twin)
    assert_same_bits({key: found[key] for key in expected}, expected)


def test_a_slim_state_has_no_form() -> None:
    source = double({"refresh": "sync", **ROTATED}, GROWN)
    slim = asteria.slim(source.state_dict())
    assert slim["param_groups"][0]["asteria"] == "soap/1/slim"
    twins = []
    for runtime in (ROTATED, FULL):
        twin = asteria.SOAP(
            clones(params_of(source)), runtime=RuntimeConfig(refresh="sync", **runtime), **TILES
        )
        twin.load_state_dict(copy.deepcopy(slim))
        train(twin, range(GROWN, GROWN + 8))
        twins.append(weights(params_of(twin)))
    for key, weight in twins[0].items():
        assert (twins[1][key] - weight).abs().max() < 1e-11


@pytest.mark.parametrize("widened", [False, True])
def test_bases_in_bfloat16_are_too_coarse_to_convert_factors(widened: bool) -> None:
    """Also once a loader has widened them; nothing is loaded. Without factors it goes."""
    narrow = {"state_dtype": torch.bfloat16, "refresh": "sync"}
    source = asteria.SOAP(parameters(SHAPES), runtime=RuntimeConfig(**narrow), **TILES)
    train(source, range(3))
    twin = asteria.SOAP(clones(params_of(source)), runtime=RuntimeConfig(**ROTATED), **TILES)
    saved = copy.deepcopy(source.state_dict())
    for entries in saved["state"].values() if widened else ():
        entries |= {k: v.float() for k, v in entries.items() if v.dtype == torch.bfloat16}
    with pytest.raises(CheckpointError, match="basis_0 .torch.*not orthogonal enough"):
        twin.load_state_dict(saved)
    assert not twin.state
    twin.load_state_dict(asteria.slim(source.state_dict()))
    train(twin, range(3, 6))
    twin.close()


def test_bases_that_are_none_are_refused_as_ever() -> None:
    source = double({"refresh": "sync", **FULL}, 3)
    twin = asteria.SOAP(clones(params_of(source)), runtime=RuntimeConfig(**ROTATED), **TILES)
    saved = copy.deepcopy(source.state_dict())
    saved["state"][0] |= {"basis_0.0": "a text", "basis_1.0": torch.zeros(4, 4, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match="basis_0.0 is 'a text'"):
        twin.load_state_dict(saved)
    assert not twin.state


def test_other_optimizers_refuse_it_by_name() -> None:
    source = double({"refresh": "sync", **ROTATED}, 3)
    other = asteria.KLSOAP(parameters(SHAPES, torch.float64))
    with pytest.raises(CheckpointError, match="is one of soap"):
        other.load_state_dict(source.state_dict())
    assert not other.state


@pytest.mark.parametrize("arrangement", ["some on disk", "all three"])
def test_it_is_converted_on_every_tier(arrangement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = double({"refresh": "sync", **FULL}, GROWN)
    near = loaded({"refresh": "sync", **ROTATED}, source)
    limit_extents(monkeypatch, 1024)
    far = asteria.SOAP(
        clones(params_of(source)), runtime=RuntimeConfig(refresh="sync", **ROTATED), **TILES
    )
    arranged(far, ARRANGEMENTS[arrangement])
    far.load_state_dict(copy.deepcopy(source.state_dict()))
    for optimizer in (near, far):
        train(optimizer, range(GROWN, GROWN + 3))
    ours, theirs = everything(far), everything(near)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-11, msg=key)
