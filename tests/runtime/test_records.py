"""What the runtime knows of a parameter."""

import pytest
import torch

from asteria.errors import ParameterChangedError
from asteria.runtime.admission import admit
from asteria.runtime.records import TilePlan, state_dtype
from tests.runtime.layouts import (
    ADAMW,
    RESIDENCE,
    ParameterRecord,
    admitted,
    block,
    record,
    two_tiles,
)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_state_is_float32_but_for_float64(dtype: torch.dtype, state: torch.dtype) -> None:
    assert state_dtype(torch.zeros(1, dtype=dtype)) == state


def test_a_region_is_a_view_in_the_order_of_the_block() -> None:
    whole = torch.arange(24.0).view(4, 2, 3)
    assert TilePlan(block(4, 2, 3), 1).region(whole) is whole
    part = TilePlan(block(2, 3), 2, (slice(1, 3),)).region(whole)
    assert torch.equal(part, whole[1:3])
    turned = TilePlan(block(3, 2), 2, (slice(1, 3),), (0, 2, 1)).region(whole)
    assert torch.equal(turned, whole[1:3].permute(0, 2, 1))
    turned.zero_()
    assert not whole[1:3].any()
    assert whole[3].all()


def test_entries_of_one_block_shape() -> None:
    one = record(0, 5, 2, 3, batch=1)
    assert one.route.entry_shapes(one.shape) == {
        "step": (),
        "born": (),
        "version": (1,),
        "exp_avg": (5, 2, 3),
        "exp_avg_sq": (5, 2, 3),
        "factor_0": (5, 2, 2),
        "factor_1": (5, 3, 3),
        "basis_0": (5, 2, 2),
        "basis_1": (5, 3, 3),
    }
    single = record(0, 2, 3).route.entry_shapes(torch.Size((2, 3)))
    assert single["factor_0"] == (2, 2)
    assert single["exp_avg"] == (2, 3)


def test_entries_of_the_adamw_rule_look_like_the_parameter() -> None:
    one = record(0, 4, rule=ADAMW)
    assert one.route.entry_shapes(one.shape) == {
        "step": (),
        "exp_avg": (4,),
        "exp_avg_sq": (4,),
    }
    scalar = record(0, rule=ADAMW)
    assert scalar.route.entry_shapes(scalar.shape) == {
        "step": (),
        "exp_avg": (),
        "exp_avg_sq": (),
    }


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (record(0, 4, 3, rule=ADAMW), (4, 3)),
        (record(0, 2, 3, 4, 5, batch=2), (2, 3, 4, 5)),
        (record(0, 4, 1, 3, tiles=[TilePlan(block(4, 3), 1)], keeps_layout=True), (4, 1, 3)),
        (record(0, 4, 3, tiles=[TilePlan(block(12), 1)], keeps_layout=True), (4, 3)),
        (record(0, 4, 1, 3, tiles=[TilePlan(block(4, 3), 1)]), (4, 3)),
    ],
)
def test_moments_look_like_the_parameter_where_they_can(
    one: ParameterRecord, shape: tuple[int, ...]
) -> None:
    assert one.route.entry_shapes(one.shape)["exp_avg"] == shape


def test_entries_of_blocks_that_are_not_in_the_parameters_order() -> None:
    tiles = [TilePlan(block(2, 3), 1, (slice(0, 2), slice(3 * n, 3 * n + 3))) for n in range(2)]
    one = record(0, 2, 6, tiles=tiles)
    assert one.route.entry_shapes(one.shape)["exp_avg"] == (2, 2, 3)
    assert list(one.route.extents()) == [("", block(2, 3), 2)]


def test_extents_of_several_block_shapes_are_numbered() -> None:
    assert two_tiles(0).route.entry_shapes(torch.Size((6, 3)))["version"] == (2,)
    assert list(two_tiles(0).route.extents()) == [(".0", block(4, 3), 1), (".1", block(2, 3), 1)]


@pytest.mark.parametrize(
    ("one", "numbers"),
    [
        (record(0, 2, 3), 2 * 6 + 2 * 4 + 2 * 9),
        (record(0, 5, 2, 3, batch=1), 5 * 38),
        (record(0, 7, rule=ADAMW), 14),
        (two_tiles(0), 2 * 18 + 2 * (16 + 9) + 2 * (4 + 9)),
    ],
)
def test_state_bytes(one: ParameterRecord, numbers: int) -> None:
    assert one.route.state_bytes(torch.float32) == 4 * numbers
    assert one.route.state_bytes(torch.float64) == 8 * numbers


def test_a_new_record_has_seen_nothing() -> None:
    parameter = torch.zeros(2, 3)
    new = ParameterRecord(
        parameter=parameter,
        name="p",
        index=0,
        route=record(0, 2, 3).route,
        shape=parameter.shape,
        dtype=parameter.dtype,
        device=parameter.device,
    )
    assert (new.steps, new.begun, new.entries, new.shown) == (0, False, {}, ())
    assert TilePlan(block(2, 3), 1).ordinal == 0


@pytest.mark.parametrize("one", [record(0, 2, 3), two_tiles(0), record(0, 4, rule=ADAMW)])
def test_a_record_knows_whether_its_state_was_replaced(one: ParameterRecord) -> None:
    admitted(record(1, 2, 3), one)
    assert one.shows(one.entries)
    assert not one.shows(dict(one.entries)), "a copy is not what was put there"
    assert not one.shows(None)
    name = next(iter(one.entries.keys() - {"step"}))
    value = one.entries[name]
    one.entries[name] = value.clone()
    assert not one.shows(one.entries)
    one.entries[name] = value
    assert one.shows(one.entries)
    one.entries["somebody else's"] = value
    assert one.shows(one.entries)
    one.entries["step"] = one.entries["step"].clone()
    assert not one.shows(one.entries)


def test_restacking_is_no_replacement() -> None:
    one = record(1, 2, 3)
    extents = admitted(one)
    admit([record(0, 2, 3)], {}, extents, RESIDENCE)
    assert one.shows(one.entries)


def test_an_unchanged_parameter_passes() -> None:
    one = record(0, 2, 3)
    one.check_unchanged()
    one.parameter.data = torch.ones(2, 3)
    one.check_unchanged()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (torch.zeros(3, 2), "now it has shape (3, 2), torch.float32 on cpu"),
        (torch.zeros(6), "now it has shape (6,), torch.float32 on cpu"),
        (torch.zeros(2, 3, dtype=torch.float64), "now it has shape (2, 3), torch.float64 on cpu"),
    ],
)
def test_a_changed_parameter_is_named_with_what_was_and_what_is(
    data: torch.Tensor, found: str
) -> None:
    one = record(7, 2, 3)
    one.parameter.data = data
    with pytest.raises(ParameterChangedError) as raised:
        one.check_unchanged()
    message = str(raised.value)
    assert message.startswith("p7: its state was made for shape (2, 3), torch.float32 on cpu, ")
    assert found in message


def test_a_parameter_that_moved_is_refused() -> None:
    one = record(0, 2, 3)
    one.device = torch.device("meta")
    with pytest.raises(ParameterChangedError, match="torch.float32 on meta, now it has shape"):
        one.check_unchanged()
