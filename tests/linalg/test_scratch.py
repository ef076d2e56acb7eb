"""Scratch memory: made once, reused, never shared between names."""

import pytest
import torch

from asteria.linalg.scratch import Scratch

CPU = torch.device("cpu")


def test_the_same_name_gives_the_same_memory() -> None:
    scratch = Scratch()
    first = scratch.take("a", (4, 5), torch.float32, CPU)
    first.fill_(3)
    again = scratch.take("a", (4, 5), torch.float32, CPU)
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (4, 5)
    smaller = scratch.take("a", (2, 3), torch.float32, CPU)
    assert smaller.data_ptr() == first.data_ptr()
    assert smaller.tolist() == [[3.0] * 3] * 2


def test_it_grows_to_the_largest_use_and_stays_there() -> None:
    scratch = Scratch()
    small = scratch.take("a", (2,), torch.float32, CPU)
    large = scratch.take("a", (3, 100), torch.float32, CPU)
    assert large.shape == (3, 100)
    assert large.data_ptr() != small.data_ptr()
    for shape in ((2,), (300,), (150, 2), (1, 1, 1)):
        assert scratch.take("a", shape, torch.float32, CPU).data_ptr() == large.data_ptr()


def test_a_shape_is_viewed_once_and_anew_after_growth() -> None:
    scratch = Scratch()
    view = scratch.take("a", (2, 3), torch.float32, CPU)
    assert scratch.take("a", (2, 3), torch.float32, CPU) is view
    larger = scratch.take("a", (4, 3), torch.float32, CPU)
    assert scratch.take("a", (2, 3), torch.float32, CPU).data_ptr() == larger.data_ptr()


def test_names_and_dtypes_have_memory_of_their_own() -> None:
    scratch = Scratch()
    taken = [
        scratch.take(name, (4,), dtype, CPU)
        for name in ("a", "b")
        for dtype in (torch.float32, torch.float64)
    ]
    for value, tensor in enumerate(taken):
        tensor.fill_(value)
    assert [tensor.tolist() for tensor in taken] == [[float(value)] * 4 for value in range(4)]
    assert [tensor.dtype for tensor in taken] == [torch.float32, torch.float64] * 2


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7,), (2, 3, 4)])
def test_any_shape_comes_contiguous(shape: tuple[int, ...]) -> None:
    taken = Scratch().take("a", shape, torch.float32, CPU)
    assert taken.shape == shape
    assert taken.is_contiguous()


def test_two_scratches_share_nothing() -> None:
    first = Scratch().take("a", (4,), torch.float32, CPU)
    second = Scratch().take("a", (4,), torch.float32, CPU)
    assert first.data_ptr() != second.data_ptr()


def shapes_of(parts: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in parts]


def test_it_is_cut_along_its_blocks_into_views() -> None:
    scratch = Scratch()
    stacked = scratch.take("a", (4, 2, 3), torch.float32, CPU)
    single = scratch.cut(stacked, [torch.Size((2, 3))] * 4)
    assert shapes_of(single) == [(2, 3)] * 4
    mixed = scratch.cut(stacked, [torch.Size((3, 2, 3)), torch.Size((6,))])
    assert shapes_of(mixed) == [(3, 2, 3), (6,)]
    mixed[1].fill_(5)
    assert torch.equal(stacked[3], torch.full((2, 3), 5.0))
    flat = scratch.take("b", (5,), torch.float32, CPU)
    assert shapes_of(scratch.cut(flat, [torch.Size(()), torch.Size((2, 2))])) == [(), (2, 2)]


def test_what_was_cut_is_remembered_until_its_memory_is_another() -> None:
    scratch, shapes = Scratch(), [torch.Size((2,))] * 3
    stacked = scratch.take("a", (3, 2), torch.float32, CPU)
    parts = scratch.cut(stacked, shapes)
    assert scratch.cut(stacked, list(shapes)) is parts
    scratch.take("a", (30, 2), torch.float32, CPU)
    anew = scratch.take("a", (3, 2), torch.float32, CPU)
    assert scratch.cut(anew, shapes)[0].data_ptr() == anew.data_ptr() != parts[0].data_ptr()


def test_only_so_much_is_remembered_and_nothing_of_others() -> None:
    scratch = Scratch()
    stacked = scratch.take("a", (40,), torch.float32, CPU)
    for first in range(39):
        scratch.cut(stacked, [torch.Size((first,)), torch.Size((40 - first,))])
    assert len(scratch._parts[id(stacked)]) <= 16
    foreign = torch.zeros(2, 3)
    assert scratch.cut(foreign, [torch.Size((3,))] * 2) is not scratch.cut(
        foreign, [torch.Size((3,))] * 2
    )
    assert list(scratch._parts) == [id(stacked)]
