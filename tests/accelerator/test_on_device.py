"""On a real accelerator: streams, events and copies in the order that the stand-ins check."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asteria import RuntimeConfig
from asteria.linalg.method import Method, refreshed
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import device_refresh
from asteria.runtime.transfer import DeviceLink
from asteria.store.buffers import pinned_memory
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.training import Bits, Shape, assert_same_bits, everything, parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
DEVICE = torch.device("cuda")
SHAPES: list[Shape] = [(48, 32), (32,), (64, 64), (48, 32), (3, 16, 16)]
DEVICE_CONFIGS = {
    "device": RuntimeConfig(refresh_on="device", refresh_method="ldlr"),
    "device, QR": RuntimeConfig(refresh_on="device", refresh_method="qr"),
    "packed": RuntimeConfig(refresh_on="device", refresh_method="ldlr", factors="packed"),
    "host": RuntimeConfig(refresh_on="host"),
    "auto": RuntimeConfig(),
    "in the step": RuntimeConfig(refresh="sync"),
}
ROTATED_CONFIGS = {
    "rotated": RuntimeConfig(refresh_on="device", factors="rotated"),
    "rotated, in the step": RuntimeConfig(refresh="sync", factors="rotated"),
}
"""Of SOAP."""
over_configs = pytest.mark.parametrize("config", DEVICE_CONFIGS.values(), ids=DEVICE_CONFIGS)


def on(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device)) for p in parameters(SHAPES, dtype)]


def build(name: str, config: RuntimeConfig, params: Any, **options: Any) -> SecondOrderOptimizer:
    settings = {"lr": 2.0**-6, "precondition_frequency": 3, "shampoo_beta": 0.5} | options
    return OPTIMIZERS[name](params, runtime=config, **settings)


def train(optimizer: SecondOrderOptimizer, steps: range, *, load: int = 0) -> None:
    """Steps with gradients that any device draws alike; ``load`` keeps the device busy before."""
    weight = torch.randn(512, 512, device=DEVICE) if load else torch.empty(0)
    for step in steps:
        for index, p in enumerate(optimizer.param_groups[0]["params"]):
            generator = torch.Generator().manual_seed(1000 * step + index)
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = drawn.to(device=p.device, dtype=p.dtype)
        for _ in range(load):
            weight = (weight @ weight).tanh_()
        optimizer.step()


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Operations that make the host wait for the device raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@over_configs
@over_optimizers
def test_bits_do_not_depend_on_how_busy_the_device_is(name: str, config: RuntimeConfig) -> None:
    finals = []
    for load in (0, 60):
        with build(name, config, on(DEVICE)) as optimizer:
            train(optimizer, range(20), load=load)
            finals.append(everything(optimizer))
            assert optimizer.stats().failures == {}
    assert_same_bits(*finals)
    assert all(bool(value.isfinite().all()) for value in finals[0].values())


@pytest.mark.parametrize("config", ROTATED_CONFIGS.values(), ids=ROTATED_CONFIGS)
def test_nor_do_those_of_factors_that_turn(config: RuntimeConfig) -> None:
    test_bits_do_not_depend_on_how_busy_the_device_is("SOAP", config)


@over_optimizers
def test_the_device_computes_what_the_host_computes(name: str) -> None:
    """In float64, where rounding leaves the same run."""
    finals: list[Bits] = []
    for device in (DEVICE, torch.device("cpu")):
        config = RuntimeConfig(refresh_on="device", refresh_method="qr")
        with build(name, config, on(device, torch.float64)) as optimizer:
            train(optimizer, range(12))
            finals.append({str(i): p.detach().cpu() for i, p in enumerate(_params(optimizer))})
    for key, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][key], rtol=1e-5, atol=1e-7)


def _params(optimizer: SecondOrderOptimizer) -> list[Tensor]:
    params: list[Tensor] = optimizer.param_groups[0]["params"]
    return params


@pytest.mark.parametrize(
    "config",
    [*DEVICE_CONFIGS.values(), *ROTATED_CONFIGS.values()],
    ids=[*DEVICE_CONFIGS, *ROTATED_CONFIGS],
)
def test_no_step_waits_for_the_device(config: RuntimeConfig) -> None:
    with build("SOAP", config, on(DEVICE)) as optimizer:
        train(optimizer, range(18))
        for step in range(18, 30):
            for index, p in enumerate(_params(optimizer)):
                generator = torch.Generator(DEVICE).manual_seed(1000 * step + index)
                p.grad = torch.randn(p.shape, generator=generator, device=DEVICE)
            with nothing_waits():
                optimizer.step()


@pytest.mark.parametrize("place", ["pinned", "some pinned", "disk"])
@pytest.mark.parametrize("refresh_on", ["device", "host"])
def test_bits_do_not_depend_on_where_the_state_lives(
    place: str, refresh_on: Any, tmp_path: Path
) -> None:
    budgets: dict[str, dict[str, Any]] = {
        "pinned": {"device_budget": 0},
        "some pinned": {"device_budget": 100_000},
        "disk": {"device_budget": 0, "host_budget": 100_000, "nvme_path": tmp_path},
    }
    finals = []
    for more in ({}, budgets[place]):
        config = RuntimeConfig(refresh_on=refresh_on, refresh_method="qr", **more)
        with build("SOAP", config, on(DEVICE)) as optimizer:
            train(optimizer, range(14), load=20)
            finals.append({k: v.cpu() for k, v in everything(optimizer).items()})
            assert (sum(optimizer.stats().traffic.__getattribute__(k) for k in _MOVED) > 0) == bool(
                more
            )
    assert_same_bits(*finals)


_MOVED = ("uploaded_bytes", "downloaded_bytes")


def test_a_run_resumes_with_refreshes_in_flight() -> None:
    config = DEVICE_CONFIGS["device"]
    with build("SOAP", config, on(DEVICE)) as whole:
        train(whole, range(20))
        expected = everything(whole)
    with build("SOAP", config, on(DEVICE)) as first:
        train(first, range(13))
        saved = first.state_dict()
        params = [nn.Parameter(p.detach().clone()) for p in _params(first)]
    with build("SOAP", config, params) as second:
        second.load_state_dict(saved)
        train(second, range(13, 20))
        assert_same_bits(everything(second), expected)


def test_unusable_bases_are_kept_and_told_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with build("SOAP", DEVICE_CONFIGS["device"], on(DEVICE)) as optimizer:
        train(optimizer, range(18))
        before = {k: v for k, v in everything(optimizer).items() if "basis" in k}

        def unusable(factor: Tensor, basis: Tensor, **how: Any) -> Any:
            fresh = refreshed(factor, basis, **how)
            return fresh._replace(
                basis=fresh.basis * torch.nan, usable=torch.zeros_like(fresh.usable)
            )

        monkeypatch.setattr(device_refresh, "refreshed", unusable)
        optimizer.stats()
        with pytest.warns(RuntimeWarning, match="no basis on the device"):
            train(optimizer, range(20, 27))
        kept = {k: v for k, v in everything(optimizer).items() if "basis" in k}
        changed = [k for k in before if not torch.equal(kept[k], before[k])]
        assert len(changed) < len(before), "but for what was in flight"
        assert optimizer.stats().failed_refreshes > 0
        assert all(bool(v.isfinite().all()) for v in everything(optimizer).values())


def test_parameters_of_both_memories_step_together() -> None:
    """And a gradient that is not finite, on the device, stops both."""
    mixed = [on(torch.device("cpu"))[0], *on(DEVICE)[1:]]
    with build("SOAP", RuntimeConfig(nonfinite="skip"), mixed) as optimizer:
        train(optimizer, range(8), load=60)
        before = [p.detach().cpu().clone() for p in mixed]
        for p in mixed:
            p.grad = torch.ones_like(p)
        assert mixed[2].grad is not None
        mixed[2].grad[0, 0] = torch.nan
        optimizer.step()
        assert optimizer.stats().skipped_steps == 1
        for p, value in zip(mixed, before, strict=True):
            assert torch.equal(p.detach().cpu(), value)


def test_a_backward_pass_on_another_stream() -> None:
    finals = []
    for stream in (None, torch.cuda.Stream()):
        params = on(DEVICE)
        config = RuntimeConfig(device_budget=0, refresh_on="device", refresh_method="qr")
        with build("SOAP", config, params) as optimizer:
            for step in range(12):
                optimizer.zero_grad()
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    torch.manual_seed(step)
                    loss = sum((p * torch.randn_like(p)).tanh().sum() for p in params)
                    loss.backward()  # type: ignore[union-attr]
                if stream is not None:
                    torch.cuda.current_stream().wait_stream(stream)
                optimizer.step()
            finals.append({k: v.cpu() for k, v in everything(optimizer).items()})
    assert_same_bits(*finals)


def test_snapshots_are_of_the_moment() -> None:
    link = DeviceLink(DEVICE)
    tensor = torch.zeros(1 << 20, device=DEVICE)
    taken = []
    for value in range(20):
        tensor.fill_(value)
        taken.append(link.snapshot(tensor, copy=True))
    for value, snapshot in enumerate(taken):
        assert bool((snapshot.on_host() == value).all())
    staged = [link.stage(link.outgoing(torch.full((1 << 20,), float(v)))) for v in range(20)]
    link.arrived(staged)
    for value, result in enumerate(staged):
        assert bool((result == value).all())


def test_pinned_memory_is_of_the_size_asked_for_and_ends() -> None:
    memory = pinned_memory(3_000_001)
    assert memory.is_pinned()
    assert memory.numel() == 3_000_001
    memory.fill_(7)
    assert bool((memory.to(DEVICE, non_blocking=True) == 7).all())
    del memory
    gc.collect()
    torch.ones(1, device=DEVICE).item()


@pytest.mark.parametrize("method", ["qr", "ldlr", "rotated_ldlr"])
@pytest.mark.parametrize("size", [16, 96, 257])
def test_methods_do_not_wait_and_agree_with_the_host(method: Method, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(3, size, size, generator=generator, dtype=torch.float64)
    root *= torch.logspace(0, -1, size, dtype=torch.float64)
    factor = root.mT @ root / size
    start = torch.eye(size, dtype=torch.float64).expand_as(factor).contiguous()
    basis = refreshed(factor, start, method="qr", sort=True).basis
    if method == "rotated_ldlr":
        factor = basis.mT @ factor @ basis
    expected = refreshed(factor, basis, method=method, sort=True)
    there = factor.to(DEVICE), basis.to(DEVICE)
    with nothing_waits():
        found = refreshed(*there, method=method, sort=True)
    assert bool(found.usable.all())
    assert bool(expected.usable.all())
    overlap = torch.linalg.vecdot(found.basis.cpu(), expected.basis, dim=-2).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-6)
