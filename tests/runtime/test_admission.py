"""Making, restacking and dropping the state of parameters."""

import pytest
import torch
from torch import Tensor

from asteria.errors import CheckpointError
from asteria.runtime.admission import Extents, admit, check_saved, discard
from asteria.runtime.extents import Extent, ExtentKey
from asteria.runtime.records import ParameterRecord
from tests.runtime.layouts import (
    ADAMW,
    RESIDENCE,
    RULE,
    admitted,
    block,
    fields,
    record,
    two_tiles,
)

FIELDS = {"exp_avg", "exp_avg_sq", "factor_0", "factor_1", "basis_0", "basis_1"}


def only(extents: Extents) -> Extent:
    ((extent,),) = extents.values()
    return extent


def order(extent: Extent) -> list[tuple[int, int, int]]:
    """(index of the parameter, first block, one past the last) of the tiles as they stand."""
    return [(tile.record.index, tile.start, tile.stop) for tile in extent.tiles]


def mark(one: ParameterRecord) -> None:
    """Fill every entry with a value of its own."""
    for number, name in enumerate(sorted(one.entries)):
        one.entries[name].fill_(100 * one.index + number + 1)


def assert_marked(one: ParameterRecord) -> None:
    for number, name in enumerate(sorted(one.entries)):
        wanted = torch.full_like(one.entries[name], 100 * one.index + number + 1)
        assert torch.equal(one.entries[name], wanted), (one.name, name)


def assert_views(one: ParameterRecord, extent: Extent) -> None:
    """The entries are the record's blocks of the stack, not copies."""
    (tile,) = (tile for tile in extent.tiles if tile.record is one)
    for name, field in fields(extent).items():
        shown = one.entries[name]
        assert shown.data_ptr() == field[tile.start].data_ptr(), name
        assert shown.numel() == field[tile.start : tile.stop].numel(), name


def saved_of(one: ParameterRecord, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = one.route.entry_shapes(one.shape)
    entries = {
        name: torch.full(shape, float(number), dtype=dtype)
        for number, (name, shape) in enumerate(shapes.items(), start=1)
    }
    return entries | {"step": torch.tensor(12.0)}


def test_new_state_is_zero_and_shown_as_views() -> None:
    records = [record(index, 2, 3) for index in range(3)]
    extent = only(admitted(*records))
    assert order(extent) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert fields(extent).keys() == FIELDS
    for one in records:
        assert one.entries.keys() == FIELDS | {"step", "born", "version"}
        assert not any(one.entries[key].any() for key in one.entries if key != "born")
        assert one.entries["born"] == 1, "the first gradient is still to come"
        assert one.entries["step"].dtype == torch.float32
        assert one.entries["step"].shape == ()
        assert one.entries["version"].dtype == torch.float32
        assert one.entries["version"].shape == (1,)
        assert one.versions == [0]
        assert_views(one, extent)


@pytest.mark.parametrize(
    "arrivals", [[[0, 1, 2, 3]], [[3, 2, 1, 0]], [[2], [0, 3], [1]], [[3], [2], [1], [0]]]
)
def test_blocks_stand_in_order_of_the_parameters_whenever_they_came(
    arrivals: list[list[int]],
) -> None:
    records = [record(index, 2, 3) for index in range(4)]
    records[1] = record(1, 3, 2, 3, batch=1)
    extents: Extents = {}
    for group in arrivals:
        before = [records[index] for done in arrivals for index in done if records[index].entries]
        admit([records[index] for index in group], {}, extents, RESIDENCE)
        for one in before:
            assert_marked(one)
        for index in group:
            mark(records[index])
    extent = only(extents)
    assert order(extent) == [(0, 0, 1), (1, 1, 4), (2, 4, 5), (3, 5, 6)]
    for one in records:
        assert_marked(one)
        assert_views(one, extent)


def test_what_had_state_keeps_its_entries_as_one_dictionary() -> None:
    first, extents = record(1, 2, 3), admitted(record(5, 4, 4))
    admit([first], {}, extents, RESIDENCE)
    entries, step = first.entries, first.entries["step"]
    mark(first)
    admit([record(0, 2, 3)], {}, extents, RESIDENCE)
    assert first.entries is entries
    assert first.entries["step"] is step
    assert first.steps == 4


def test_kinds_of_blocks_have_extents_of_their_own() -> None:
    extents = admitted(
        record(0, 2, 3),
        record(1, 3, 2),
        record(2, 2, 3, dtype=torch.float64),
        record(3, 2, 3, dtype=torch.bfloat16),
        record(4, 6, rule=ADAMW),
        record(5, rule=ADAMW),
    )
    cpu = torch.device("cpu")
    found = {
        key: [tile.record.index for tile in extent.tiles] for key, (extent,) in extents.items()
    }
    assert found == {
        ExtentKey(RULE, block(2, 3), torch.float32, cpu): [0, 3],
        ExtentKey(RULE, block(3, 2), torch.float32, cpu): [1],
        ExtentKey(RULE, block(2, 3), torch.float64, cpu): [2],
        ExtentKey(ADAMW, block(), torch.float32, cpu): [4, 5],
    }
    for key, (extent,) in extents.items():
        assert extent.rule is key.rule
        assert extent.shape == key.shape
        assert {field.dtype for field in fields(extent).values()} == {key.dtype}


def test_moments_look_like_their_parameter_where_its_blocks_are_in_order() -> None:
    stacked, vector = record(0, 4, 2, 3, batch=1), record(1, 5, rule=ADAMW)
    admitted(stacked, vector)
    assert stacked.entries["exp_avg"].shape == (4, 2, 3)
    assert stacked.entries["factor_1"].shape == (4, 3, 3)
    assert vector.entries["exp_avg"].shape == (5,)


def test_a_parameter_of_several_block_shapes_numbers_its_entries() -> None:
    one, other = two_tiles(0), record(1, 4, 3)
    extents = admitted(other, one)
    assert one.entries.keys() == {f"{name}.{n}" for name in FIELDS for n in (0, 1)} | {
        "step",
        "born",
        "version",
    }
    assert one.entries["exp_avg.0"].shape == (4, 3)
    assert one.entries["exp_avg.1"].shape == (2, 3)
    assert [order(extent) for (extent,) in extents.values()] == [
        [(0, 0, 1), (1, 1, 2)],
        [(0, 0, 1)],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_state_is_copied_into_the_stack(dtype: torch.dtype) -> None:
    one, other, extents = record(0, 2, 3, steps=0, begun=False), record(1, 2, 3, steps=0), {}
    saved = saved_of(one, dtype)
    admit([one, other], {one: saved}, extents, RESIDENCE)
    for name, value in saved.items():
        assert one.entries[name].dtype == torch.float32
        assert torch.equal(one.entries[name], value.float()), name
        value.fill_(-1)
        assert not (one.entries[name] == -1).any(), "memory of its own"
    assert (one.steps, one.begun) == (12, True)
    assert other.steps == 0
    assert not any(other.entries[key].any() for key in other.entries if key != "born")
    assert_views(one, only(extents))


def spoil(saved: dict[str, Tensor]) -> None:
    del saved["basis_0"]
    saved["momentum"] = torch.zeros(2)
    saved["exp_avg"] = torch.zeros(3, 2)


COMPLAINTS = [
    "p1: basis_0 is missing",
    "p1: exp_avg has shape (3, 2), needs (2, 3)",
    "p1: momentum is not part of soap's state",
]


def complaints(saved: dict[ParameterRecord, dict[str, Tensor]], *others: str) -> list[str]:
    with pytest.raises(CheckpointError) as raised:
        check_saved(saved, others)
    head, *found = str(raised.value).split("\n")
    assert "nothing was loaded" in head
    return [line.strip() for line in found]


def test_every_misfit_is_named() -> None:
    one, fine = record(1, 2, 3), record(0, 2, 3)
    saved = {fine: saved_of(fine), one: saved_of(one)}
    check_saved(saved)
    spoil(saved[one])
    assert complaints(saved) == COMPLAINTS
    assert complaints(saved, "another") == ["another", *COMPLAINTS]


def test_what_is_no_tensor_has_no_shape() -> None:
    one = record(1, 2, 3)
    check_saved({one: saved_of(one) | {"step": 12.0}})
    wrong = saved_of(one) | {"exp_avg": 3.0}
    assert complaints({one: wrong}) == ["p1: exp_avg has shape (), needs (2, 3)"]


def test_other_problems_alone_are_refused_too() -> None:
    assert complaints({}, "one", "two") == ["one", "two"]
    check_saved({}, [])


def test_a_misfit_is_refused_before_anything_is_changed() -> None:
    old = record(0, 2, 3)
    extents = admitted(old)
    mark(old)
    extent, new, worse = only(extents), record(1, 2, 3), record(2, 2, 3)
    saved = {new: saved_of(new), worse: saved_of(worse)}
    spoil(saved[new])
    del saved[worse]["step"]
    with pytest.raises(CheckpointError) as raised:
        admit([new, worse], saved, extents, RESIDENCE)
    message = str(raised.value)
    for line in (*COMPLAINTS, "p2: step is missing", "nothing was loaded"):
        assert line in message
    assert only(extents) is extent
    assert order(only(extents)) == [(0, 0, 1)]
    assert new.entries == {}
    assert_marked(old)


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 2], [1, 2]])
def test_discarding_moves_the_others_together(gone: list[int]) -> None:
    records = [record(0, 2, 3), record(1, 3, 2, 3, batch=1), record(2, 2, 3)]
    extents = admitted(*records)
    for one in records:
        mark(one)
    discard([records[index] for index in gone], extents, RESIDENCE)
    extent = only(extents)
    kept = [one for one in records if one.index not in gone]
    assert [tile.record for tile in extent.tiles] == kept
    assert [tile.start for tile in extent.tiles] == [
        sum(tile.stop - tile.start for tile in extent.tiles[:place]) for place in range(len(kept))
    ]
    assert fields(extent)["exp_avg"].shape[0] == extent.tiles[-1].stop
    for one in kept:
        assert_marked(one)
        assert_views(one, extent)


def test_discarding_everything_leaves_no_extent() -> None:
    records = [record(0, 2, 3), record(1, 6, rule=ADAMW), two_tiles(2)]
    extents = admitted(*records)
    discard(records, extents, RESIDENCE)
    assert extents == {}


def test_discarding_leaves_other_extents_alone() -> None:
    one, other = record(0, 2, 3), record(1, 3, 3)
    extents = admitted(one, other)
    kept = [extent for cut in extents.values() for extent in cut]
    discard([one], extents, RESIDENCE)
    assert only(extents) is kept[1]
    discard([], extents, RESIDENCE)
    assert only(extents) is kept[1]


def test_what_was_discarded_may_come_again() -> None:
    records = [record(index, 2, 3) for index in range(3)]
    extents = admitted(*records)
    for one in records:
        mark(one)
    discard([records[1]], extents, RESIDENCE)
    again = record(1, 2, 3)
    admit([again], {}, extents, RESIDENCE)
    assert order(only(extents)) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert not any(again.entries[key].any() for key in again.entries if key != "born")
    assert_marked(records[0])
    assert_marked(records[2])
