"""Cutting a step into chunks."""

import pytest
import torch

from asteria.runtime import extents as extents_module
from asteria.runtime.chunks import Chunk, Update, chunks
from asteria.runtime.extents import CHUNK_BYTES, EXTENT_BYTES, Extent
from asteria.runtime.records import ParameterRecord
from tests.runtime.layouts import (
    ADAMW,
    chunk_of,
    extent_of,
    extents_of,
    fields,
    record,
    update,
)

Layout = list[tuple[int, int, list[int]]]


def layout(extent: Extent, updates: dict[ParameterRecord, Update]) -> Layout:
    """(start, stop, indices of the parameters) of each chunk."""
    return [
        (chunk.start, chunk.stop, [tile.record.index for tile in chunk.tiles])
        for chunk in chunks(extent, updates)
    ]


def spread(records: list[ParameterRecord], updates: dict[ParameterRecord, Update]) -> Layout:
    """The same over all extents of the records, blocks counted from the first one's."""
    found, first = [], 0
    for extent in extents_of(*records):
        found += [(a + first, b + first, indices) for a, b, indices in layout(extent, updates)]
        first += extent.blocks
    return found


def matrices(count: int) -> list[ParameterRecord]:
    return [record(index, 2, 3) for index in range(count)]


def limit_blocks(monkeypatch: pytest.MonkeyPatch, blocks: int, elements: int = 6) -> None:
    """Let a chunk hold so many float32 blocks."""
    monkeypatch.setattr(extents_module, "CHUNK_BYTES", 4 * elements * blocks)


def test_equal_neighbours_go_together() -> None:
    records = matrices(5)
    asked = {one: update() for one in records}
    assert layout(extent_of(*records), asked) == [(0, 5, [0, 1, 2, 3, 4])]


def test_a_chunk_knows_what_its_blocks_share() -> None:
    records = [record(index, 2, 3, steps=9, begun=False) for index in range(2)]
    chunk = chunk_of(*records, eps=0.5)
    assert isinstance(chunk, Chunk)
    assert (chunk.start, chunk.stop, chunk.steps, chunk.begun) == (0, 2, 9, False)
    assert chunk.hyper == update(eps=0.5).hyper
    assert [tile.record for tile in chunk.tiles] == records


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        (7, [(0, 7)]),
        (6, [(0, 6), (6, 7)]),
        (3, [(0, 3), (3, 6), (6, 7)]),
        (1, [(block, block + 1) for block in range(7)]),
    ],
)
def test_a_chunk_stays_within_its_bytes(
    monkeypatch: pytest.MonkeyPatch, blocks: int, wanted: list[tuple[int, int]]
) -> None:
    limit_blocks(monkeypatch, blocks)
    records = matrices(7)
    found = spread(records, {one: update() for one in records})
    assert [(start, stop) for start, stop, _ in found] == wanted


def test_the_size_of_a_chunk_is_pinned() -> None:
    """Which blocks share a product, and with it the last bits of a run, depends on it."""
    assert CHUNK_BYTES == 32 * 1024**2
    assert EXTENT_BYTES == 64 * 1024**2


def test_float64_blocks_count_double(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_blocks(monkeypatch, 4)
    records = [record(index, 2, 3, dtype=torch.float64) for index in range(4)]
    found = spread(records, {one: update() for one in records})
    assert found == [(0, 2, [0, 1]), (2, 4, [2, 3])]


def test_narrow_parameters_count_as_their_float32_state(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_blocks(monkeypatch, 2)
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]
    records = [record(index, 2, 3, dtype=dtype) for index, dtype in enumerate(dtypes)]
    found = spread(records, {one: update() for one in records})
    assert found == [(0, 2, [0, 1]), (2, 4, [2, 3])]


def test_a_tile_above_the_limit_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_blocks(monkeypatch, 3)
    records = [record(0, 2, 3), record(1, 5, 2, 3, batch=1), record(2, 2, 3), record(3, 2, 3)]
    found = spread(records, {one: update() for one in records})
    assert found == [(0, 1, [0]), (1, 6, [1]), (6, 8, [2, 3])]


def test_a_tile_of_many_blocks_fills_a_chunk_accordingly(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_blocks(monkeypatch, 4)
    records = [record(0, 3, 2, 3, batch=1), record(1, 2, 3), record(2, 2, 3)]
    found = spread(records, {one: update() for one in records})
    assert found == [(0, 4, [0, 1]), (4, 5, [2])]


def test_single_elements_are_counted_by_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_blocks(monkeypatch, 10, elements=1)
    records = [record(index, 4, rule=ADAMW) for index in range(5)]
    found = spread(records, {one: update() for one in records})
    assert found == [(0, 8, [0, 1]), (8, 16, [2, 3]), (16, 20, [4])]


def test_a_parameter_without_a_gradient_separates_its_neighbours() -> None:
    records = matrices(5)
    asked = {one: update() for one in records if one.index != 2}
    assert layout(extent_of(*records), asked) == [(0, 2, [0, 1]), (3, 5, [3, 4])]


@pytest.mark.parametrize("active", [[], [0], [4], [0, 4], [1, 3], [1, 2]])
def test_only_parameters_with_a_gradient_take_part(active: list[int]) -> None:
    records = matrices(5)
    found = layout(extent_of(*records), {records[index]: update() for index in active})
    assert [index for _, _, indices in found for index in indices] == active
    assert all(stop - start == len(indices) for start, stop, indices in found)


def test_step_counters_separate() -> None:
    records = matrices(4)
    records[2].steps = records[3].steps = 7
    asked = {one: update() for one in records}
    assert layout(extent_of(*records), asked) == [(0, 2, [0, 1]), (2, 4, [2, 3])]


def test_having_begun_separates() -> None:
    records = [record(0, 2, 3, steps=0, begun=False), record(1, 2, 3, steps=0, begun=True)]
    asked = {one: update() for one in records}
    assert layout(extent_of(*records), asked) == [(0, 1, [0]), (1, 2, [1])]


def test_hyperparameters_separate() -> None:
    records = matrices(4)
    asked = {one: update(eps=0.1 if one.index == 1 else 0.2) for one in records}
    found = layout(extent_of(*records), asked)
    assert found == [(0, 1, [0]), (1, 2, [1]), (2, 4, [2, 3])]


def test_learning_rate_and_weight_decay_do_not_separate() -> None:
    records = matrices(3)
    asked = {one: update(lr=0.1 * one.index, weight_decay=0.2 * one.index) for one in records}
    assert layout(extent_of(*records), asked) == [(0, 3, [0, 1, 2])]


def test_each_chunk_has_the_hyperparameters_of_its_own_blocks() -> None:
    records = matrices(3)
    asked = {one: update(eps=0.1 * (1 + one.index)) for one in records}
    found = [chunk.hyper.eps for chunk in chunks(extent_of(*records), asked)]
    assert found == pytest.approx([0.1, 0.2, 0.3])


def test_the_cut_does_not_depend_on_other_extents_updates() -> None:
    records, stranger = matrices(3), record(9, 5, 5)
    asked = {one: update() for one in (*records, stranger)}
    assert layout(extent_of(*records), asked) == [(0, 3, [0, 1, 2])]


def test_the_state_of_a_chunk_is_viewed_once() -> None:
    records = matrices(3)
    extent, asked = extent_of(*records), {one: update() for one in records}
    first, again = next(chunks(extent, asked)), next(chunks(extent, asked))
    assert first.state()["exp_avg"] is again.state()["exp_avg"]
    for name, tensor in fields(extent).items():
        assert first.state()[name].data_ptr() == tensor.data_ptr()
        assert first.state()[name].shape == tensor.shape


def test_notes_are_as_old_as_the_views_that_they_are_on() -> None:
    records = matrices(5)
    extent = extent_of(*records)
    (chunk,) = chunks(extent, {one: update() for one in records})
    chunk.state()
    extent.notes[0, 5] = "a note"
    chunk.state()
    assert extent.notes
    extent.moved_in()
    assert not extent.notes
    for stop in range(1, 6):
        extent.notes[0, stop] = "a note"
        next(chunks(extent, {one: update() for one in records[:stop]})).state()
    extent.notes[1, 2] = "a note"
    for start in range(1, 4):
        next(chunks(extent, {one: update() for one in records[start:]})).state()
    assert (1, 2) not in extent.notes


def test_views_of_ever_new_chunks_do_not_pile_up() -> None:
    records = matrices(5)
    extent = extent_of(*records)
    for start in range(5):
        for stop in range(start + 1, 6):
            (chunk,) = chunks(extent, {one: update() for one in records[start:stop]})
            assert len(chunk.state()["exp_avg"]) == stop - start
            assert (
                chunk.state()["exp_avg"].data_ptr() == fields(extent)["exp_avg"][start].data_ptr()
            )
    assert all(len(cell._windows) <= 6 for cell in extent.cells.values())
