"""Whatever the shape and the options, the tiles are the parameter, each element once."""

import math
import random
from typing import Any

import pytest
import torch

from asteria.algorithms.algorithm import Algorithm
from asteria.algorithms.kl import KLShampoo
from asteria.algorithms.soap import SOAP
from asteria.runtime import routing
from asteria.runtime.records import Route
from asteria.runtime.routing import route

Case = tuple[tuple[int, ...], dict[str, Any]]


def cases(count: int) -> list[Case]:
    numbers = random.Random(0)
    found = []
    for _ in range(count):
        rank = numbers.randint(0, 5)
        options = {
            "max_precond_dim": numbers.choice([1, 2, 3, 5, 12, 40]),
            "large_dims": numbers.choice(["one_sided", "blocks"]),
            "merge_dims": numbers.random() < 0.5,
            "precondition_1d": numbers.random() < 0.5,
            "data_format": numbers.choice(["channels_first", "channels_last"]),
            "normalize_grads": numbers.random() < 0.2,
            "batch_dims": numbers.choice([None, 0, min(1, max(0, rank - 1))]),
        }
        found.append((tuple(numbers.choice([1, 2, 3, 7, 33]) for _ in range(rank)), options))
    return [(shape, options) for shape, options in found if math.prod(shape) < 50_000]


def routes(rule: Algorithm) -> list[tuple[Case, Route]]:
    return [
        ((shape, options), route(torch.Size(shape), options, rule, "p"))
        for shape, options in cases(200)
    ]


@pytest.fixture(autouse=True, params=[None, 256])
def _chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stacks cut into chunks as well."""
    if request.param is not None:
        monkeypatch.setattr(routing, "CHUNK_BYTES", request.param)


RULES = pytest.mark.parametrize("rule", [SOAP(), KLShampoo()], ids=lambda rule: rule.name)


@RULES
def test_the_tiles_cover_every_element_once(rule: Algorithm) -> None:
    for case, way in routes(rule):
        seen = torch.zeros(case[0])
        for tile in way.tiles:
            region = tile.region(seen)
            assert region.numel() == tile.blocks * math.prod(tile.shape.dims), case
            region += 1
        assert torch.equal(seen, torch.ones(case[0])), case


@RULES
def test_a_route_that_keeps_the_layout_has_its_elements_in_order(rule: Algorithm) -> None:
    kept = 0
    for case, way in routes(rule):
        if way.keeps_layout:
            whole = torch.arange(math.prod(case[0])).view(case[0])
            parts = [tile.region(whole).reshape(-1) for tile in way.tiles]
            assert torch.equal(torch.cat(parts), whole.reshape(-1)), case
            kept += 1
    assert kept > 50


@RULES
def test_factors_are_at_most_the_limit_and_blocks_have_some(rule: Algorithm) -> None:
    for case, way in routes(rule):
        limit = case[1]["max_precond_dim"]
        sizes = [size for tile in way.tiles for size in tile.shape.factor_sizes()]
        assert all(1 < size <= limit for size in sizes), case
        assert bool(sizes) == (way.rule is rule), case
        if way.rule is rule and case[1]["large_dims"] == "blocks" and not case[1]["merge_dims"]:
            assert all(all(tile.shape.factored) for tile in way.tiles), case


@RULES
def test_tiles_are_numbered_and_counted(rule: Algorithm) -> None:
    for case, way in routes(rule):
        assert [tile.ordinal for tile in way.tiles] == list(range(len(way.tiles))), case
        total = sum(blocks * math.prod(shape.dims) for _, shape, blocks in way.extents())
        assert total == math.prod(case[0]), case


@RULES
def test_all_kinds_of_routes_were_tried(rule: Algorithm) -> None:
    kinds = {(way.rule is rule, len(way.tiles) > 1, way.keeps_layout) for _, way in routes(rule)}
    assert {(True, False, True), (True, True, False), (False, False, True)} <= kinds
