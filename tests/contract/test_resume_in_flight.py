"""What is in flight is part of the state: a resumed or copied run repeats every bit."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from asteria import CheckpointError, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.asynchronous import GROWN, build, flying, manual, params_of
from tests.support.training import (
    Bits,
    Shape,
    assert_same_bits,
    clones,
    everything,
    parameters,
    set_gradients,
    train,
)

SHAPES: list[Shape] = [(7, 4), (5,), (4, 4), (3, 2, 4)]
TILES = {"max_precond_dim": 4, "large_dims": "blocks"}
"""The first parameter consists of two tiles of different shape."""
ALL_FLYING = GROWN + 2
"""Calls of step() after which every tile has a refresh in flight."""
State = dict[int, dict[str, Any]]


def run_of(name: str, staleness: int = 2) -> SecondOrderOptimizer:
    return build(name, RuntimeConfig(staleness=staleness), SHAPES, **TILES)


def saved_and_loaded(optimizer: SecondOrderOptimizer) -> SecondOrderOptimizer:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return resumed(optimizer, torch.load(file, weights_only=True))


def resumed(
    optimizer: SecondOrderOptimizer, saved: dict[str, Any], runtime: RuntimeConfig | None = None
) -> SecondOrderOptimizer:
    twin = type(optimizer)(
        clones(params_of(optimizer)), runtime=runtime or optimizer._runtime, **TILES
    )
    twin.load_state_dict(saved)
    return twin


WAYS: dict[str, Callable[[SecondOrderOptimizer], SecondOrderOptimizer]] = {
    "saved and loaded": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


def all_of(optimizer: SecondOrderOptimizer) -> Bits:
    """Weights, and state with what is in flight."""
    state = optimizer.state_dict()["state"]
    flat = {f"{p}.{key}": t.clone() for p, entries in state.items() for key, t in entries.items()}
    return everything(optimizer) | flat


@pytest.mark.parametrize("staleness", [1, 2, PERIOD + 1])
@over_optimizers
def test_every_step_can_be_resumed_to_the_same_bits(name: str, staleness: int) -> None:
    window = range(GROWN, GROWN + 2 * PERIOD + staleness)
    end = window.stop + PERIOD + staleness + 1
    optimizer, undisturbed = run_of(name, staleness), run_of(name, staleness)
    train(optimizer, range(GROWN))
    twins = []
    units: set[str] = set()
    for step in window:
        for way in WAYS.values():
            twin = way(optimizer)
            assert_same_bits(all_of(twin), all_of(optimizer))
            twins.append((step, twin))
        units |= {flight.job.name.split(" at ")[0] for flight in flying(optimizer)}
        train(optimizer, [step])
    assert len(units) == 4, "every tile has something in flight at times"
    train(optimizer, range(window.stop, end))
    train(undisturbed, range(end))
    expected = all_of(undisturbed)
    assert_same_bits(all_of(optimizer), expected)
    for step, twin in twins:
        train(twin, range(step, end))
        assert_same_bits(all_of(twin), expected)


@over_optimizers
def test_saving_waits_for_the_workers_and_takes_nothing_from_the_run(name: str) -> None:
    optimizer, workers = manual(run_of(name))
    train(optimizer, range(ALL_FLYING))
    flights = flying(optimizer)
    assert workers.queue
    saved = optimizer.state_dict()["state"]
    assert not workers.queue
    assert flying(optimizer) == flights
    assert all(saved[index]["shadow_lands"].all() for index in (0, 2, 3)), "every tile has one"


def keys_and_shapes(state: State) -> dict[int, dict[str, tuple[int, ...]]]:
    return {p: {key: tuple(t.shape) for key, t in e.items()} for p, e in state.items()}


@pytest.mark.parametrize(("staleness", "places"), [(1, 1), (2, 1), (PERIOD, 2), (2 * PERIOD, 3)])
@over_optimizers
def test_keys_and_shapes_do_not_depend_on_what_is_in_flight(
    name: str, staleness: int, places: int
) -> None:
    optimizer = run_of(name, staleness)
    train(optimizer, [0])
    first = keys_and_shapes(optimizer.state_dict()["state"])
    assert first[0]["shadow_version"] == (places, 2)
    assert first[0]["shadow_basis_0.0"] == (places, 1, 4, 4)
    assert first[3]["shadow_basis_1"] == (places, 1, 2, 2)
    assert not any(key.startswith("shadow") for key in first[1]), "a vector has no bases"
    most = 0
    for step in range(1, GROWN + 3 * PERIOD + staleness):
        train(optimizer, [step])
        saved = optimizer.state_dict()["state"]
        assert keys_and_shapes(saved) == first
        most = max(most, int(saved[2]["shadow_lands"].count_nonzero()))
    assert most == places, "every place is used at times"


@over_optimizers
def test_the_live_state_has_the_keys_and_looking_at_them_waits_for_nobody(name: str) -> None:
    optimizer, workers = manual(run_of(name))
    train(optimizer, range(ALL_FLYING))
    queue = list(workers.queue)
    live = [list(optimizer.state[p]) for p in params_of(optimizer)]
    assert workers.queue == queue
    assert live == [list(entries) for entries in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize(
    "runtime", [RuntimeConfig(staleness=0), RuntimeConfig.reference()], ids=str
)
@over_optimizers
def test_a_synchronous_run_has_the_keys_and_nothing_in_flight(
    name: str, runtime: RuntimeConfig
) -> None:
    optimizer, other = build(name, runtime, SHAPES, **TILES), run_of(name)
    for each in (optimizer, other):
        train(each, [0])
    train(optimizer, range(1, GROWN))
    saved = optimizer.state_dict()["state"]
    assert keys_and_shapes(saved) == keys_and_shapes(other.state_dict()["state"])
    for entries in saved.values():
        for key, tensor in entries.items():
            assert not (key.startswith("shadow") and tensor.any())


@over_optimizers
def test_a_file_has_no_room_for_what_is_not_in_flight(name: str) -> None:
    optimizer = build(name, None, [(64, 64)])
    train(optimizer, [0])
    saved = optimizer.state_dict()
    tensors = saved["state"][0].items()
    zeros = sum(t.nbytes for key, t in tensors if key.startswith("shadow"))
    assert zeros > 2 * 64 * 64 * 4
    file = io.BytesIO()
    torch.save(saved, file)
    assert file.tell() < sum(t.nbytes for _, t in tensors) - zeros + 10_000


@over_optimizers
def test_a_changed_schedule_needs_no_more_places(name: str) -> None:
    """The phases move when a parameter gets its first gradient late."""
    params = parameters(SHAPES)
    optimizer = OPTIMIZERS[name](params, precondition_frequency=PERIOD, shampoo_beta=0.5)
    for step in range(4 * GROWN):
        set_gradients(params, step)
        if step < 2 * GROWN:
            params[0].grad = None
        optimizer.step()
        for entries in optimizer.state_dict()["state"].values():
            assert entries.get("shadow_lands", torch.zeros(1, 1)).shape[0] == 1


@pytest.mark.parametrize("keys", [("version",), ("shadow_version", "shadow_basis_0"), None])
@over_optimizers
def test_state_that_a_framework_moves_keeps_what_is_in_flight(
    name: str, keys: tuple[str, ...] | None
) -> None:
    """As frameworks do after loading: every tensor, or some, replaced by an equal one."""
    optimizer, undisturbed = run_of(name), run_of(name)
    train(undisturbed, range(ALL_FLYING + 6))
    train(optimizer, range(ALL_FLYING))
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if key in (keys or entries) and key != "step":
                entries[key] = value.clone()
    train(optimizer, range(ALL_FLYING, ALL_FLYING + 6))
    assert_same_bits(all_of(optimizer), all_of(undisturbed))


@over_optimizers
def test_a_copy_shares_no_flight_with_its_original(name: str) -> None:
    optimizer = run_of(name)
    train(optimizer, range(GROWN))
    before = all_of(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = resumed(optimizer, saved)
    for entries in saved["state"].values():
        for value in entries.values():
            value.fill_(float("nan"))
    train(twin, range(GROWN, GROWN + 6))
    assert_same_bits(all_of(optimizer), before)
    assert all(bool(value.isfinite().all()) for value in all_of(twin).values())


@over_optimizers
def test_loading_replaces_what_was_in_flight(name: str) -> None:
    source, target = run_of(name), run_of(name)
    train(source, range(GROWN))
    train(target, range(GROWN + 2))
    with torch.no_grad():
        for mine, theirs in zip(params_of(target), params_of(source), strict=True):
            mine.copy_(theirs)
    target.load_state_dict(source.state_dict())
    assert_same_bits(all_of(target), all_of(source))
    for optimizer in (source, target):
        train(optimizer, range(GROWN, GROWN + 9))
    assert_same_bits(all_of(target), all_of(source))


@pytest.mark.parametrize(
    "runtime",
    [
        RuntimeConfig(refresh="sync"),
        RuntimeConfig(staleness=0),
        RuntimeConfig(staleness=1),
        RuntimeConfig(staleness=8),
        RuntimeConfig(install="ready"),
        RuntimeConfig(start="adam", refresh_method="eigh"),
    ],
    ids=str,
)
@over_optimizers
def test_another_runtime_takes_the_state_and_keeps_its_own_bound(
    name: str, runtime: RuntimeConfig
) -> None:
    optimizer = run_of(name, 2 * PERIOD + 1)
    train(optimizer, range(GROWN + 6))
    twin = resumed(optimizer, optimizer.state_dict(), runtime)
    train(twin, range(GROWN + 6, GROWN + 20))
    for entries in twin.state.values():
        if "version" in entries:
            staleness = 0 if runtime.refresh == "sync" else runtime.staleness
            assert entries["step"] - entries["version"].min() <= PERIOD + staleness
    assert all(bool(value.isfinite().all()) for value in all_of(twin).values())


@over_optimizers
def test_state_without_flights_is_taken_too(name: str) -> None:
    """As a synchronous run has saved it."""
    source = build(name, RuntimeConfig(refresh="sync"), SHAPES, **TILES)
    train(source, range(GROWN))
    twin = resumed(source, source.state_dict(), RuntimeConfig())
    assert not flying(twin)
    train(twin, range(GROWN, GROWN + 9))
    assert flying(twin)


def lacks_a_basis(state: State) -> list[str]:
    del state[2]["shadow_basis_1"]
    return ["parameter 2 of group 0: shadow_basis_1 is missing"]


def lacks_the_version(state: State) -> list[str]:
    del state[0]["shadow_version"]
    return ["parameter 0 of group 0: shadow_version is missing"]


def of_no_mode(state: State) -> list[str]:
    state[2]["shadow_basis_2"] = torch.eye(4)[None, None]
    return ["parameter 2 of group 0: shadow_basis_2 is not part of"]


def of_a_vector(state: State) -> list[str]:
    state[1]["shadow_version"] = torch.tensor([[3.0]])
    return ["parameter 1 of group 0: shadow_version is not part of adamw's state"]


def misshapen(state: State) -> list[str]:
    state[2]["shadow_basis_0"] = torch.eye(5)[None, None]
    state[0]["shadow_version"] = torch.zeros(1, 1)
    state[3]["shadow_lands"] = torch.zeros(2, 1)
    return [
        "parameter 2 of group 0: shadow_basis_0 has shape (1, 1, 5, 5), needs (1, 1, 4, 4)",
        "parameter 0 of group 0: shadow_version has shape (1, 1), needs (1, 2)",
        "parameter 3 of group 0: shadow_lands has shape (2, 1), needs (1, 1)",
    ]


def misspelt(state: State) -> list[str]:
    for key in ("shadow_versions", "shadow_base_1"):
        state[3][key] = torch.tensor(1.0)
    return [
        f"parameter 3 of group 0: {key} is not part of"
        for key in ("shadow_versions", "shadow_base_1")
    ]


@pytest.mark.parametrize(
    "spoil", [lacks_a_basis, lacks_the_version, of_no_mode, of_a_vector, misshapen, misspelt]
)
@over_optimizers
def test_broken_flights_are_refused_and_listed(
    name: str, spoil: Callable[[State], list[str]]
) -> None:
    source, target = run_of(name), run_of(name)
    train(source, range(ALL_FLYING))
    train(target, range(GROWN))
    before = all_of(target)
    saved = copy.deepcopy(source.state_dict())
    messages = spoil(saved["state"])
    with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
        target.load_state_dict(saved)
    for message in messages:
        assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + len(messages)
    assert_same_bits(all_of(target), before)
