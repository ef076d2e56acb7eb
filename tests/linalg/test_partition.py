"""Merging and cutting of shapes."""

import math
import random

import pytest

from asteria.linalg.partition import cut, merge


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((), 10, (1,)),
        ((1,), 10, (1,)),
        ((1, 1, 1), 10, (1,)),
        ((7,), 10, (7,)),
        ((7,), 5, (7,)),
        ((12, 3, 2, 2), 12, (12, 12)),
        ((12, 3, 2, 2), 11, (12, 6, 2)),
        ((12, 3, 2, 2), 144, (144,)),
        ((12, 3, 2, 2), 143, (72, 2)),
        ((3, 4, 5), 60, (60,)),
        ((3, 4, 5), 59, (12, 5)),
        ((3, 4, 5), 20, (12, 5)),
        ((3, 4, 5), 1, (3, 4, 5)),
        ((2, 100, 2, 2), 10, (2, 100, 4)),
        ((100, 2, 2), 10, (100, 4)),
        ((1, 100, 1), 10, (100,)),
        ((64, 3, 3, 3), 64, (64, 27)),
    ],
)
def test_merge_by_hand(shape: tuple[int, ...], limit: int, merged: tuple[int, ...]) -> None:
    assert merge(shape, limit) == merged


def random_shapes() -> list[tuple[tuple[int, ...], int]]:
    numbers = random.Random(0)
    return [
        (
            tuple(numbers.choice([1, 1, 2, 3, 5, 8, 40]) for _ in range(numbers.randint(0, 6))),
            numbers.choice([1, 2, 6, 10, 30, 100, 10000]),
        )
        for _ in range(500)
    ]


def test_merge_keeps_the_elements_in_order() -> None:
    for shape, limit in random_shapes():
        merged = merge(shape, limit)
        assert math.prod(merged) == math.prod(shape), (shape, limit)
        bounds = {math.prod(shape[:end]) for end in range(len(shape) + 1)}
        inner = {math.prod(merged[:end]) for end in range(len(merged) + 1)}
        assert inner <= bounds, f"{shape} with limit {limit} was cut inside of a dim: {merged}"


def test_merge_keeps_the_limit_but_for_dims_that_were_above_it() -> None:
    for shape, limit in random_shapes():
        merged = merge(shape, limit)
        assert all(size <= limit or size in shape for size in merged), (shape, limit, merged)
        assert 1 not in merged or merged == (1,), "no dim of one is left over"


def test_merge_goes_as_far_as_it_may() -> None:
    for shape, limit in random_shapes():
        if math.prod(shape) <= limit:
            assert merge(shape, limit) == (math.prod(shape),), (shape, limit)


def sizes(parts: list[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


@pytest.mark.parametrize(
    ("size", "limit", "parts"),
    [
        (1, 1, [1]),
        (10, 10, [10]),
        (10, 11, [10]),
        (11, 10, [6, 5]),
        (20, 10, [10, 10]),
        (21, 10, [7, 7, 7]),
        (10, 4, [4, 3, 3]),
        (9, 2, [2, 2, 2, 2, 1]),
        (5, 1, [1, 1, 1, 1, 1]),
        (101, 10, [10, 10] + [9] * 9),
    ],
)
def test_cut_by_hand(size: int, limit: int, parts: list[int]) -> None:
    assert sizes(cut(size, limit)) == parts


def cases() -> list[tuple[int, int]]:
    numbers = random.Random(1)
    return [(numbers.randint(1, 3000), numbers.randint(1, 300)) for _ in range(500)]


def test_cut_covers_the_dim_once_and_in_order() -> None:
    for size, limit in cases():
        covered = [index for part in cut(size, limit) for index in range(size)[part]]
        assert covered == list(range(size)), (size, limit)


def test_cut_gives_the_fewest_parts_within_the_limit() -> None:
    for size, limit in cases():
        parts = sizes(cut(size, limit))
        assert max(parts) <= limit, (size, limit)
        assert len(parts) == math.ceil(size / limit), (size, limit)


def test_cut_gives_nearly_equal_parts_larger_ones_first() -> None:
    for size, limit in cases():
        parts = sizes(cut(size, limit))
        assert parts == sorted(parts, reverse=True), (size, limit)
        assert max(parts) - min(parts) <= 1, f"{size} cut by {limit}: {parts[0]} ... {parts[-1]}"
