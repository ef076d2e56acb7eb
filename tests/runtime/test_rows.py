"""Large one-sided blocks go through a step by rows."""

import pytest
import torch
from torch import Tensor

import asteria
from asteria.runtime import extents
from asteria.runtime.rows import parts_of
from tests.runtime.layouts import chunk_of, record

SIDE = 16


def few_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(extents, "CHUNK_BYTES", rows * SIDE * 4)


def run(optimizer: type, steps: int = 12, **options: object) -> tuple[list[Tensor], dict]:
    torch.manual_seed(0)
    shapes = [(300, SIDE), (40, 24)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    made = optimizer(parameters, lr=1e-2, max_precond_dim=128, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise + 0.1 * parameter.detach()
        made.step()
    return [parameter.detach().clone() for parameter in parameters], made.state_dict()["state"]


@pytest.mark.parametrize("start", ["fresh", "eigh", "adam"])
@pytest.mark.parametrize("refresh", ["sync", "async"])
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3}])
def test_rows_add_up_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, start: str, refresh: str, options: dict[str, object]
) -> None:
    options["runtime"] = asteria.RuntimeConfig(start=start, refresh=refresh)
    whole, state = run(asteria.SOAP, **options)
    few_rows(monkeypatch, 70)
    parts, found = run(asteria.SOAP, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    for name, value in state[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_parts_are_the_rows_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(0, 10, SIDE)
    chunk = chunk_of(one)
    few_rows(monkeypatch, 4)
    assert [rows for _, rows in parts_of(chunk)] == [slice(0, 10)], "it has a factor for its rows"
    (tile,) = chunk.tiles
    object.__setattr__(tile.plan.shape, "factored", (False, True))
    assert [rows for _, rows in parts_of(chunk)] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    for part, rows in parts_of(chunk):
        assert part.tiles[0].plan.region(one.parameter).shape == (rows.stop - rows.start, SIDE)


@pytest.mark.parametrize("optimizer", [asteria.KLShampoo, asteria.KLSOAP])
def test_rules_whose_rows_depend_on_each_other_take_the_block_whole(
    monkeypatch: pytest.MonkeyPatch, optimizer: type
) -> None:
    whole, _ = run(optimizer)
    few_rows(monkeypatch, 70)
    parts, _ = run(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_normalized_updates_need_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(asteria.SOAP, normalize_grads=True)
    few_rows(monkeypatch, 70)
    parts, _ = run(asteria.SOAP, normalize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
