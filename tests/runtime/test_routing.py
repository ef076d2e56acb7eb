"""From shapes and options to rules and blocks, as tables."""

import math
from typing import Any, NamedTuple

import pytest
import torch

from asteria.algorithms.algorithm import Algorithm
from asteria.algorithms.kl import KLSOAP, KLShampoo
from asteria.algorithms.soap import SOAP
from asteria.errors import ConfigError
from asteria.runtime import routing
from asteria.runtime.records import Route, TilePlan
from asteria.runtime.routing import route

DEFAULTS: dict[str, Any] = {
    "max_precond_dim": 100,
    "large_dims": "one_sided",
    "merge_dims": False,
    "precondition_1d": False,
    "data_format": "channels_first",
    "normalize_grads": False,
    "batch_dims": None,
}
KL_OPTIONS = {"max_precond_dim", "large_dims", "normalize_grads", "batch_dims"}
RULES: list[Algorithm] = [SOAP(), KLShampoo(), KLSOAP()]

Shape = tuple[int, ...]
T, F = True, False


class Case(NamedTuple):
    shape: Shape
    options: dict[str, Any]
    dims: Shape
    factored: tuple[bool, ...]
    blocks: int = 1


def routed(shape: Shape, options: dict[str, Any], rule: Algorithm | None = None) -> Route:
    rule = rule or SOAP()
    group = DEFAULTS | options
    if rule.name != "soap":
        group = {key: value for key, value in group.items() if key in KL_OPTIONS}
    return route(torch.Size(shape), group, rule, "layer.weight")


def only_tile(way: Route) -> TilePlan:
    (tile,) = way.tiles
    return tile


EVERY_RULE = [
    Case((4, 3), {}, (4, 3), (T, T)),
    Case((100, 3), {}, (100, 3), (T, T)),
    Case((101, 3), {}, (101, 3), (F, T)),
    Case((3, 101), {}, (3, 101), (T, F)),
    Case((8, 4, 3, 3), {}, (8, 4, 3, 3), (T, T, T, T)),
    Case((200, 4, 3, 3), {}, (200, 4, 3, 3), (F, T, T, T)),
    Case((1, 4, 3), {}, (4, 3), (T, T)),
    Case((4, 1, 3, 1), {}, (4, 3), (T, T)),
    Case((3, 32, 32), {}, (32, 32), (T, T), 3),
    Case((3, 64, 32), {}, (64, 32), (T, T), 3),
    Case((3, 31, 32), {}, (3, 31, 32), (T, T, T)),
    Case((3, 32, 31), {}, (3, 32, 31), (T, T, T)),
    Case((2, 3, 32, 32), {}, (2, 3, 32, 32), (T, T, T, T)),
    Case((3, 32, 32), {"batch_dims": 0}, (3, 32, 32), (T, T, T)),
    Case((3, 4, 5), {"batch_dims": 1}, (4, 5), (T, T), 3),
    Case((200, 4, 5), {"batch_dims": 1}, (4, 5), (T, T), 200),
    Case((2, 3, 4, 5), {"batch_dims": 2}, (4, 5), (T, T), 6),
    Case((2, 3, 4, 5), {"batch_dims": 1}, (3, 4, 5), (T, T, T), 2),
    Case((3, 200, 5), {"batch_dims": 1}, (200, 5), (F, T), 3),
]

SOAP_ONLY = [
    Case((7,), {"precondition_1d": True}, (7,), (T,)),
    Case((1, 7), {}, (7,), (T,)),
    Case((7, 1), {}, (7,), (T,)),
    Case((5, 7), {"batch_dims": 1, "precondition_1d": True}, (7,), (T,), 5),
    Case((4, 3), {"merge_dims": True}, (12,), (T,)),
    Case((40, 3), {"merge_dims": True}, (40, 3), (T, T)),
    Case((8, 4, 3, 3), {"merge_dims": True}, (96, 3), (T, T)),
    Case((64, 4, 3, 3), {"merge_dims": True}, (64, 36), (T, T)),
    Case((200, 4, 3, 3), {"merge_dims": True}, (200, 36), (F, T)),
    Case((2, 40, 4, 3), {"merge_dims": True, "batch_dims": 1}, (40, 12), (T, T), 2),
]

TO_ADAMW: list[tuple[Shape, dict[str, Any]]] = [
    ((), {}),
    ((1,), {}),
    ((7,), {}),
    ((200,), {}),
    ((1, 1), {}),
    ((1, 1, 1), {}),
    ((0,), {}),
    ((0, 4), {}),
    ((4, 0), {"batch_dims": 1}),
    ((200, 101), {}),
    ((5, 7), {"batch_dims": 1}),
]

TO_ADAMW_SOAP = [
    ((200,), {"precondition_1d": True}),
    ((), {"precondition_1d": True}),
    ((1,), {"precondition_1d": True}),
    ((0,), {"precondition_1d": True}),
]


def assert_case(case: Case, rule: Algorithm) -> None:
    way = routed(case.shape, case.options, rule)
    tile = only_tile(way)
    assert way.rule is rule
    assert (tile.shape.dims, tile.shape.factored) == (case.dims, case.factored)
    assert tile.blocks == case.blocks
    assert tile.slices == (), "one tile is the whole parameter"
    assert tile.permutation is None
    assert way.keeps_layout


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("case", EVERY_RULE, ids=lambda case: f"{case.shape}{case.options}")
def test_blocks_of_every_rule(case: Case, rule: Algorithm) -> None:
    assert_case(case, rule)


@pytest.mark.parametrize("case", SOAP_ONLY, ids=lambda case: f"{case.shape}{case.options}")
def test_blocks_of_soap(case: Case) -> None:
    assert_case(case, SOAP())


def assert_adamw(way: Route, elements: int) -> None:
    tile = only_tile(way)
    assert way.rule.name == "adamw"
    assert (tile.shape.dims, tile.shape.factored, tile.blocks) == ((), (), elements)
    assert tile.slices == ()
    assert way.keeps_layout


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize(("shape", "options"), TO_ADAMW)
def test_what_takes_the_adamw_rule(shape: Shape, options: dict[str, Any], rule: Algorithm) -> None:
    assert_adamw(routed(shape, options, rule), math.prod(shape))


@pytest.mark.parametrize(("shape", "options"), TO_ADAMW_SOAP)
def test_vectors_that_take_the_adamw_rule_all_the_same(
    shape: Shape, options: dict[str, Any]
) -> None:
    assert_adamw(routed(shape, options), math.prod(shape))


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.name)
@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (1, 7, 1)])
def test_kl_rules_take_columns_and_rows_for_vectors(shape: Shape, rule: Algorithm) -> None:
    assert_adamw(routed(shape, {}, rule), 7)


def test_there_is_one_adamw_rule() -> None:
    assert routed((3,), {}).rule is routed((4,), {}, KLSOAP()).rule


def slices(tile: TilePlan) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in tile.slices]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_large_dims_are_cut_into_tiles(rule: Algorithm) -> None:
    way = routed((20, 14), {"large_dims": "blocks", "max_precond_dim": 10}, rule)
    assert way.rule is rule
    assert not way.keeps_layout
    assert [(tile.shape.dims, slices(tile), tile.ordinal) for tile in way.tiles] == [
        ((10, 7), [(0, 10), (0, 7)], 0),
        ((10, 7), [(0, 10), (7, 14)], 1),
        ((10, 7), [(10, 20), (0, 7)], 2),
        ((10, 7), [(10, 20), (7, 14)], 3),
    ]
    assert all(tile.shape.factored == (T, T) and tile.blocks == 1 for tile in way.tiles)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_remainder_of_a_cut_is_too_thin_for_the_rule(rule: Algorithm) -> None:
    """A dim of k * limit + 1 with many parts: a tile of one row would have no factor."""
    way = routed((101, 64), {"large_dims": "blocks", "max_precond_dim": 10}, rule)
    assert way.rule is rule
    assert {tile.shape.dims[0] for tile in way.tiles} == {9, 10}
    assert {tile.shape.dims[1] for tile in way.tiles} == {9, 10}


def test_tiles_of_a_stack_hold_all_its_matrices() -> None:
    way = routed((3, 20, 32), {"large_dims": "blocks", "max_precond_dim": 16, "batch_dims": 1})
    assert [(tile.blocks, tile.shape.dims, slices(tile)) for tile in way.tiles] == [
        (3, (10, 16), [(0, 3), (0, 10), (0, 16)]),
        (3, (10, 16), [(0, 3), (0, 10), (16, 32)]),
        (3, (10, 16), [(0, 3), (10, 20), (0, 16)]),
        (3, (10, 16), [(0, 3), (10, 20), (16, 32)]),
    ]


def test_blocks_of_small_dims_are_the_whole_parameter() -> None:
    way = routed((20, 14), {"large_dims": "blocks", "max_precond_dim": 20})
    assert only_tile(way).slices == ()
    assert way.keeps_layout


def test_a_long_vector_is_cut_when_vectors_are_preconditioned() -> None:
    options = {"precondition_1d": True, "large_dims": "blocks", "max_precond_dim": 10}
    assert [slices(tile) for tile in routed((20,), options).tiles] == [[(0, 10)], [(10, 20)]]


def test_channels_last_convolutions_are_merged_as_channels_first() -> None:
    way = routed((64, 3, 3, 4), {"merge_dims": True, "data_format": "channels_last"})
    tile = only_tile(way)
    assert tile.permutation == (0, 3, 1, 2)
    assert tile.shape.dims == (64, 36)
    assert not way.keeps_layout
    region = tile.region(torch.zeros(64, 3, 3, 4))
    assert region.shape == (64, 4, 3, 3)


def test_which_dims_of_channels_last_are_merged_is_decided_as_channels_first() -> None:
    options = {"merge_dims": True, "data_format": "channels_last"}
    assert only_tile(routed((64, 3, 3, 40), options)).shape.dims == (64, 40, 9)
    assert only_tile(routed((64, 3, 3, 40), {"merge_dims": True})).shape.dims == (64, 9, 40)


def test_channels_last_in_a_stack() -> None:
    options = {"merge_dims": True, "data_format": "channels_last", "batch_dims": 1}
    tile = only_tile(routed((2, 64, 3, 3, 4), options))
    assert tile.permutation == (0, 1, 4, 2, 3)
    assert tile.region(torch.zeros(2, 64, 3, 3, 4)).shape == (2, 64, 4, 3, 3)


@pytest.mark.parametrize("shape", [(64, 3, 3, 4), (64, 9, 4), (64, 30)])
def test_data_format_matters_only_when_convolutions_are_merged(shape: Shape) -> None:
    merged = len(shape) != 4
    way = routed(shape, {"merge_dims": merged, "data_format": "channels_last"})
    assert only_tile(way).permutation is None
    assert way.keeps_layout


def test_a_large_stack_is_cut_along_its_first_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "CHUNK_BYTES", 3 * 8 * 32 * 32)
    way = routed((10, 32, 32), {})
    assert [(tile.blocks, slices(tile)[0], tile.ordinal) for tile in way.tiles] == [
        (3, (0, 3), 0),
        (3, (3, 6), 1),
        (3, (6, 9), 2),
        (1, (9, 10), 3),
    ]
    assert way.keeps_layout


def test_a_stack_of_stacks_is_cut_along_its_first_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "CHUNK_BYTES", 2 * 8 * 3 * 20)
    way = routed((5, 3, 4, 5), {"batch_dims": 2})
    assert [(tile.blocks, slices(tile)) for tile in way.tiles] == [
        (6, [(0, 2), (0, 3), (0, 4), (0, 5)]),
        (6, [(2, 4), (0, 3), (0, 4), (0, 5)]),
        (3, [(4, 5), (0, 3), (0, 4), (0, 5)]),
    ]


def test_a_matrix_above_the_chunk_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "CHUNK_BYTES", 1)
    assert [tile.blocks for tile in routed((3, 32, 32), {}).tiles] == [1, 1, 1]


def test_a_large_parameter_under_the_adamw_rule_is_cut_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "CHUNK_BYTES", 8 * 250)
    options = {"max_precond_dim": 1}
    way = routed((5, 100), options)
    assert way.rule.name == "adamw"
    assert [(tile.blocks, slices(tile), tile.ordinal) for tile in way.tiles] == [
        (200, [(0, 2)], 0),
        (200, [(2, 4)], 1),
        (100, [(4, 5)], 2),
    ]
    assert way.keeps_layout
    assert_adamw(routed((10, 25), options), 250)
    assert_adamw(routed((5, 100), options | {"normalize_grads": True}), 500)


@pytest.mark.parametrize(("shape", "batch_dims"), [((), 1), ((7,), 1), ((4, 3), 2), ((4, 3), 5)])
def test_batch_dims_must_leave_one_dim(shape: Shape, batch_dims: int) -> None:
    with pytest.raises(ConfigError) as raised:
        routed(shape, {"batch_dims": batch_dims})
    message = str(raised.value)
    assert message.startswith(f"layer.weight: batch_dims={batch_dims} was asked for, found shape ")
    assert str(shape) in message
