"""Training lets torch round its products, and steps under autocast: the optimizer's are its own."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from asteria import RuntimeConfig
from asteria.linalg import precision
from asteria.runtime import engine
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.training import assert_same_bits, everything, train

SIZE = 32  # products that oneDNN would take


def run(name: str, *, steps: int = 12, **runtime: object) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(SIZE, SIZE)), nn.Parameter(torch.randn(SIZE, 2 * SIZE))]
    config = RuntimeConfig(**runtime)
    optimizer = OPTIMIZERS[name](params, lr=0.01, precondition_frequency=2, runtime=config)
    with contextlib.closing(optimizer):
        train(optimizer, range(steps))
        optimizer.state_dict()
    return optimizer


@contextlib.contextmanager
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", ["qr", "ldlr"])
@pytest.mark.parametrize("refresh", ["sync", "async"])
@over_optimizers
def test_no_refresh_fails_for_a_permission_to_round(name: str, refresh: str, method: str) -> None:
    """Rounded to bfloat16, every basis would be found to be not orthogonal."""
    with medium():
        stats = run(name, refresh=refresh, refresh_method=method).stats()
    assert stats.refreshes > 20
    assert stats.failed_refreshes == stats.retried_refreshes == 0


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_nor_does_one_of_factors_that_turn(refresh: str) -> None:
    with medium():
        stats = run("SOAP", refresh=refresh, factors="rotated").stats()
    assert stats.refreshes > 20
    assert stats.failed_refreshes == stats.retried_refreshes == 0


def test_no_setting_of_the_process_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a while: other threads multiply meanwhile."""
    touched: list[object] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", touched.append)
    for module in (torch.backends.mkldnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(type(module), "__setattr__", lambda *given: touched.append(given))
    monkeypatch.setattr(precision, "_host_rounds", lambda setting: True)
    run("SOAP", refresh="sync", refresh_method="ldlr", steps=4)
    assert touched == []


@over_optimizers
def test_a_step_under_autocast_is_the_same_step(name: str) -> None:
    expected = everything(run(name, refresh="sync", refresh_method="ldlr"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(run(name, refresh="sync", refresh_method="ldlr"))
    assert_same_bits(found, expected)


def test_autocast_would_reach_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is for: without the guard not even the first bases are orthogonal."""
    monkeypatch.setattr(engine, "without_autocast", lambda devices: contextlib.nullcontext())
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.warns(RuntimeWarning, match="no first basis"),
    ):
        run("SOAP", refresh="sync", refresh_method="ldlr")
