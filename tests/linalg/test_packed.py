"""Half of a symmetric matrix: nothing is lost, and nothing is more than half."""

import pytest
import torch
from torch import Tensor

from asteria.linalg import packed
from asteria.linalg.modes import decay_gram_
from asteria.linalg.packed import fold_bytes, pack, packed_shape, size_of, unpack, unpacked
from tests.support.training import same_bits

SIZES = [1, 2, 3, 4, 5, 8, 9, 17]
over_sizes = pytest.mark.parametrize("size", SIZES)


def symmetric(size: int, *blocks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random, with zeros of both signs, inf and nan."""
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(*blocks, size, size, generator=generator, dtype=torch.float64).to(dtype)
    matrix[..., 0, 0] = -0.0
    matrix[..., -1, 0] = -0.0
    matrix[..., -1, -1] = torch.inf
    matrix[..., size // 2, 0] = torch.nan
    lower = matrix.tril()
    return torch.where(torch.ones(size, size).tril() > 0, lower, lower.mT)


@over_sizes
def test_half_of_a_matrix_is_exactly_half(size: int) -> None:
    rows, columns = packed_shape(size)
    assert rows * columns == size * (size + 1) // 2
    assert size_of((7, rows, columns)) == size_of((7, size, size)) == size
    assert (rows == columns) == (size == 1), "a shape tells which of the two it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("blocks", [(), (1,), (3,), (2, 3)])
@over_sizes
def test_a_symmetric_matrix_comes_back_bit_by_bit(
    size: int, blocks: tuple[int, ...], dtype: torch.dtype
) -> None:
    matrix = symmetric(size, *blocks, dtype=dtype)
    half = pack(matrix)
    assert half.shape == (*blocks, *packed_shape(size))
    assert half.is_contiguous()
    assert same_bits(unpack(half), matrix)
    assert same_bits(pack(unpack(half)), half)


@over_sizes
def test_what_is_below_the_diagonal_wins(size: int) -> None:
    matrix = torch.randn(2, size, size)
    found = unpack(pack(matrix))
    assert same_bits(found.tril(), matrix.tril())
    assert same_bits(found, found.mT)


def test_it_is_unpacked_into_memory_of_any_strides() -> None:
    matrix = symmetric(5, 3)
    target = torch.full((3, 7, 7), 9.0)
    assert unpack(pack(matrix.mT), out=target[:, 1:6, 1:6]) is not None
    assert same_bits(target[:, 1:6, 1:6], matrix)
    assert bool((target[:, 0] == 9).all())


def test_shapes_are_known_without_values() -> None:
    half = pack(torch.empty(2, 6, 6, device="meta"))
    assert (half.shape, half.device.type) == ((2, 3, 7), "meta")
    assert unpack(half).shape == (2, 6, 6)


def test_full_matrices_are_left_as_they_are() -> None:
    matrix = symmetric(4, 2)
    assert unpacked(matrix) is matrix
    assert same_bits(unpacked(pack(matrix)), matrix)


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("dims", [(4, 3, 2), (5, 1, 3), (1, 2, 7)])
def test_a_fold_is_that_of_the_full_matrix(
    dims: tuple[int, ...], mode: int, gate: float | None
) -> None:
    x = torch.randn(3, *dims, dtype=torch.float64)
    start = torch.randn(3, dims[mode], 9, dtype=torch.float64)
    factor = start @ start.mT
    half = pack(factor)
    before = half.clone()
    allowed = None if gate is None else torch.tensor(gate, dtype=torch.float64)
    for each in (factor, half):
        decay_gram_(each, x, mode, beta=0.9, weight=0.3, gate=allowed)
    torch.testing.assert_close(unpack(half), factor, rtol=1e-13, atol=1e-13)
    assert torch.equal(half, before) == (gate == 0)


def test_few_matrices_are_folded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, what is computed in is small; and it depends on shapes alone."""
    sizes: list[int] = []
    product = torch.bmm

    def listening(first: Tensor, second: Tensor) -> Tensor:
        result = product(first, second)
        sizes.append(result.nbytes)
        return result

    monkeypatch.setattr(packed, "_SCRATCH_BYTES", 2 * 4 * 3 * 5)
    monkeypatch.setattr(torch, "bmm", listening)
    x, half = torch.randn(7, 5, 4), torch.zeros(7, *packed_shape(5))
    decay_gram_(half, x, 0, beta=0.5, weight=1.0, gate=None)
    assert max(sizes) == fold_bytes(5, 7, 4) == 2 * 4 * 3 * 5
    torch.testing.assert_close(unpack(half), x @ x.mT)
