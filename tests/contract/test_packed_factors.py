"""``factors="packed"``: half of each Kronecker factor is stored, and nobody sees it."""

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import asteria
from asteria import RuntimeConfig
from asteria.linalg.packed import packed_shape
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import device_refresh, extents, host_refresh, inline
from asteria.store.distant import Distant
from asteria.store.layout import Life
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.asynchronous import GROWN, SHAPES, build, params_of
from tests.support.sides import ALIKE, DeferredSide, on_device, on_host
from tests.support.tiers import ARRANGEMENTS, arranged
from tests.support.training import (
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    train,
    weights,
)

PACKED: dict[str, Any] = {"factors": "packed"}
RUNTIMES = {
    "async": RuntimeConfig(**PACKED),
    "sync": RuntimeConfig(refresh="sync", **PACKED),
    "ldlr": RuntimeConfig(refresh="sync", refresh_method="ldlr", **PACKED),
    "eigh": RuntimeConfig(start="eigh", refresh_method="eigh", **PACKED),
    "device": RuntimeConfig(refresh_on="device", refresh_method="ldlr", **PACKED),
    "narrow bases": RuntimeConfig(state_dtype=torch.bfloat16, **PACKED),
}
over_runtimes = pytest.mark.parametrize("runtime", RUNTIMES)
SAVED, STEPS = GROWN + 6, GROWN + 16
HALF_ELEMENTS = sum(n * (n + 1) // 2 for n in (6, 4, 4, 4, 3, 2, 4))
FULL_ELEMENTS = sum(n * n for n in (6, 4, 4, 4, 3, 2, 4))


def trained(name: str, runtime: RuntimeConfig, **options: Any) -> SecondOrderOptimizer:
    optimizer = build(name, runtime, **options)
    with contextlib.closing(optimizer):
        train(optimizer, range(SAVED))
        optimizer.state_dict()
    return optimizer


def twin_of(optimizer: SecondOrderOptimizer, runtime: RuntimeConfig) -> SecondOrderOptimizer:
    return OPTIMIZERS[type(optimizer).__name__](clones(params_of(optimizer)), runtime=runtime)


def factors(optimizer: SecondOrderOptimizer) -> dict[str, Tensor]:
    return {key: t for key, t in everything(optimizer).items() if ".factor_" in key}


def stored(optimizer: SecondOrderOptimizer) -> dict[tuple[int, str], Tensor]:
    """The fields of the cells that factors live in, by extent and name."""
    return {
        (number, name): field
        for number, extent in enumerate(optimizer._engine._all())
        if Life.SUM in extent.cells
        for name, field in extent.door.read(extent.cells[Life.SUM]).items()
    }


@over_optimizers
def test_half_of_each_factor_is_stored_and_nothing_else_changes(name: str) -> None:
    optimizer, full = trained(name, RUNTIMES["async"]), trained(name, RuntimeConfig())
    saved = full.describe().state_bytes - optimizer.describe().state_bytes
    assert saved == 4 * (FULL_ELEMENTS - HALF_ELEMENTS)
    halves, fulls = stored(optimizer), stored(full)
    assert halves.keys() == fulls.keys()
    for place, square in fulls.items():
        assert halves[place].shape == (len(square), *packed_shape(square.shape[-1]))
    shown, wanted = everything(optimizer), everything(full)
    assert {k: t.shape for k, t in shown.items()} == {k: t.shape for k, t in wanted.items()}


@over_runtimes
@over_optimizers
def test_the_run_differs_from_that_with_full_factors_by_rounding(name: str, runtime: str) -> None:
    # In float64, for float32 is so coarse that other rounding turns a basis now and then.
    config = RUNTIMES[runtime]
    full = RuntimeConfig(
        refresh=config.refresh,
        refresh_method=config.refresh_method,
        start=config.start,
        refresh_on=config.refresh_on,
    )
    shapes = [(4, 4), (5,), (4, 4)]
    found, wanted = (
        OPTIMIZERS[name](parameters(shapes, torch.float64), lr=2.0**-6, runtime=each)
        for each in (config, full)
    )
    for each in (found, wanted):
        with contextlib.closing(each):
            train(each, range(12))
    assert found.stats().failed_refreshes == 0
    for key, weight in weights(params_of(wanted)).items():
        torch.testing.assert_close(weights(params_of(found))[key], weight, rtol=0, atol=1e-9)
    for key, factor in factors(wanted).items():
        torch.testing.assert_close(factors(found)[key], factor, rtol=1e-8, atol=1e-10)


KL: list[dict[str, Any]] = [{"init_factor": 0.1}, {"damp_factors": True}]
BEGINNINGS: list[tuple[str, dict[str, Any]]] = [
    ("SOAP", {}),
    *((name, options) for name in ("KLShampoo", "KLSOAP") for options in [{}, *KL]),
]


@pytest.mark.parametrize(("name", "options"), BEGINNINGS)
def test_factors_begin_as_full_ones_do(name: str, options: dict[str, Any]) -> None:
    runs = [
        OPTIMIZERS[name](parameters(SHAPES), runtime=runtime, **options)
        for runtime in (RUNTIMES["sync"], RuntimeConfig(refresh="sync"))
    ]
    for optimizer in runs:
        train(optimizer, range(2))
    found, wanted = map(factors, runs)
    assert len(wanted) == 7
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])
        assert same_bits(found[key], found[key].mT)


@over_optimizers
def test_without_staleness_asynchronous_is_synchronous(name: str) -> None:
    found = trained(name, RuntimeConfig(staleness=0, **PACKED))
    assert_same_bits(everything(found), everything(trained(name, RUNTIMES["sync"])))


@pytest.mark.parametrize("method", ["qr", "ldlr"])
@over_optimizers
def test_refreshes_on_a_device_are_those_of_workers(name: str, method: Any) -> None:
    side = DeferredSide()
    device = on_device(name, side, ALIKE, refresh_method=method, **PACKED)
    host = on_host(name, ALIKE, refresh_method=method, **PACKED)
    for each in (device, host):
        train(each, range(24))
    assert side.waits == 0
    assert_same_bits(everything(device), everything(host))


@over_optimizers
def test_what_is_in_flight_is_half_until_its_work_begins(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    take = host_refresh.take_snapshots

    def listening(*given: Any, **options: Any) -> Any:
        snapshots = take(*given, **options)
        taken.extend(pair[0].on_host() for pair in snapshots if pair is not None)
        return snapshots

    monkeypatch.setattr(host_refresh, "take_snapshots", listening)
    trained(name, RUNTIMES["async"])
    assert taken
    assert {tuple(t.shape[-2:]) for t in taken} == {packed_shape(n) for n in (2, 3, 4, 6)}


@over_optimizers
def test_a_factor_that_is_not_finite_keeps_the_basis(name: str) -> None:
    optimizer = build(name, RUNTIMES["sync"])
    train(optimizer, range(3))
    optimizer._engine._all()[0].cells[Life.SUM].window(0, 1)["factor_0"][0, -1, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="nonfinite factor"):
        train(optimizer, range(3, 9))
    assert optimizer.stats().failures["nonfinite factor"] > 0
    assert all(bool(w.isfinite().all()) for w in params_of(optimizer))


def test_factors_are_unpacked_for_few_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks go through a refresh inside the step as if their factors were full."""
    sizes: list[int] = []
    real = inline.verified_refresh

    def listening(factor: Tensor, *given: Any, **options: Any) -> Any:
        sizes.append(factor.nbytes)
        return real(factor, *given, **options)

    monkeypatch.setattr(inline, "verified_refresh", listening)
    monkeypatch.setattr(extents, "CHUNK_BYTES", 2 * 4 * 6 * 6)
    optimizer = build("SOAP", RUNTIMES["sync"], shapes=[(6, 6)] * 5)
    train(optimizer, range(3))
    assert set(sizes) == {2 * 4 * 6 * 6, 4 * 6 * 6}


def test_so_are_those_of_refreshes_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = device_refresh.refreshed

    def listening(factor: Tensor, *given: Any, **options: Any) -> Any:
        sizes.append(factor.nbytes)
        return real(factor, *given, **options)

    monkeypatch.setattr(device_refresh, "refreshed", listening)
    monkeypatch.setattr(extents, "CHUNK_BYTES", 2 * 4 * 8 * 8)
    optimizer = on_device("SOAP", DeferredSide(), [(8, 2)] * 5, 1, start="eigh", **PACKED)
    train(optimizer, range(4))
    assert max(sizes) == 2 * 4 * 8 * 8


# Checkpoints


@over_runtimes
@over_optimizers
def test_a_resumed_run_repeats_the_bits(name: str, runtime: str) -> None:
    config = RUNTIMES[runtime]
    optimizer = trained(name, config)
    twin = twin_of(optimizer, config)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, twin):
        with contextlib.closing(each):
            train(each, range(SAVED, STEPS))
            each.state_dict()
    assert_same_bits(everything(twin), everything(optimizer))


def through_a_file(source: Any, target: Any, _: Path) -> None:
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))


def through_dcp(source: Any, target: Any, folder: Path, *, flat: bool) -> None:
    models = [nn.ParameterList(params_of(optimizer)) for optimizer in (source, target)]
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(models[0], source, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=folder, no_dist=True)
    template = {"optimizer": get_optimizer_state_dict(models[1], target, options=options)}
    dcp.load(template, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(models[1], target, template["optimizer"], options=options)
    with torch.no_grad():  # torch's functions may take a first step
        for theirs, mine in zip(params_of(source), params_of(target), strict=True):
            mine.copy_(theirs)


WAYS: dict[str, Callable[[Any, Any, Path], None]] = {
    "torch.save": through_a_file,
    "dcp": lambda *given: through_dcp(*given, flat=False),
    "dcp-flat": lambda *given: through_dcp(*given, flat=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forms", ["full->packed", "packed->full", "packed->packed"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_do_not_tell_the_form(forms: str, way: str, tmp_path: Path) -> None:
    saving, loading = forms.split("->")
    name = list(OPTIMIZERS)[len(forms + way) % 3]
    source = trained(name, RuntimeConfig(factors=saving))  # type: ignore[arg-type]
    target = twin_of(source, RuntimeConfig(factors=loading))  # type: ignore[arg-type]
    WAYS[way](source, target, tmp_path)
    found, wanted = everything(target), everything(source)
    if saving == "full":  # which is symmetric but for rounding
        for key in factors(source):
            torch.testing.assert_close(found.pop(key), given := wanted.pop(key))
            assert same_bits(factors(target)[key].tril(), given.tril())
    assert_same_bits(found, wanted)
    with contextlib.closing(target):
        train(target, range(SAVED, STEPS))
    assert all(bool(w.isfinite().all()) for w in params_of(target))


@pytest.mark.parametrize("place", [None, "disk", "pinned", "some on disk"])
def test_a_state_dict_that_is_kept_stays_as_it_was_and_takes_half(place: str | None) -> None:
    optimizer = build("SOAP", RUNTIMES["sync"], shapes=[(6, 4), (5,), (6, 4)])
    if place is not None:
        arranged(optimizer, ARRANGEMENTS[place])
    train(optimizer, range(4))
    wanted = factors(optimizer)
    state = optimizer.state_dict()["state"]
    train(optimizer, range(4, 6))
    assert not same_bits(factors(optimizer)["0.factor_0"], wanted["0.factor_0"])
    for key, factor in wanted.items():
        index, entry = key.split(".")
        kept = state[int(index)][entry]
        assert isinstance(kept, Distant)
        assert not kept.is_held, "unpacked they would take twice the room"
        assert same_bits(kept.clone(), factor)


def test_a_slim_state_and_a_copy_work_as_ever() -> None:
    optimizer = trained("KLSOAP", RUNTIMES["async"])
    twin = twin_of(optimizer, RUNTIMES["async"])
    twin.load_state_dict(asteria.slim(optimizer.state_dict()))
    other = copy.deepcopy(optimizer)
    assert other.describe().state_bytes == optimizer.describe().state_bytes
    for each in (twin, other, optimizer):
        with contextlib.closing(each):
            train(each, range(SAVED, SAVED + 3))
            each.state_dict()
    assert_same_bits(everything(other), everything(optimizer))


def test_a_factor_that_somebody_puts_in_is_taken() -> None:
    optimizer = trained("SOAP", RUNTIMES["sync"])
    first = params_of(optimizer)[0]
    optimizer.state[first]["factor_0"] = 3 * torch.eye(6)
    train(optimizer, range(SAVED, SAVED + 1))
    moved = optimizer.state[first]["factor_0"]
    gradient = first.grad @ first.grad.mT
    torch.testing.assert_close(moved, 0.5 * 3 * torch.eye(6) + 0.5 * gradient)
