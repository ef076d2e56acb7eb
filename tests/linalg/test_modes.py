"""Products along modes, against einsum."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from asteria.linalg.modes import (
    change_basis_,
    decay_gram_,
    replace_,
    scale_modes_,
    transform,
)
from tests.linalg.matrices import generator, rotations

DIMS = [(5,), (4, 3), (3, 4), (1, 6), (3, 2, 4), (2, 3, 2, 4), (2, 3, 1, 2, 3)]
BLOCKS = 3
ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def times_mode(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    moved = torch.einsum("bij,b...j->b...i", matrix, x.movedim(mode + 1, -1))
    return moved.movedim(-1, mode + 1)


def expected(x: Tensor, matrices: Sequence[Tensor | None], transpose: bool) -> Tensor:
    for mode, matrix in enumerate(matrices):
        if matrix is not None:
            x = times_mode(x, matrix.mT if transpose else matrix, mode)
    return x


def gram(x: Tensor, mode: int) -> Tensor:
    rows = x.movedim(mode + 1, 1).reshape(x.shape[0], x.shape[mode + 1], -1)
    return torch.einsum("bik,bjk->bij", rows, rows)


def subsets(dims: tuple[int, ...]) -> list[list[Tensor | None]]:
    """Matrices for every subset of the modes."""
    matrices = [normal(BLOCKS, size, size, seed=1 + mode) for mode, size in enumerate(dims)]
    return [
        [matrix if taken else None for matrix, taken in zip(matrices, chosen, strict=True)]
        for chosen in itertools.product([False, True], repeat=len(dims))
    ]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_transform_multiplies_every_mode_that_has_a_matrix(
    dims: tuple[int, ...], transpose: bool
) -> None:
    x = normal(BLOCKS, *dims)
    for matrices in subsets(dims):
        scratch = torch.empty_like(x), torch.empty_like(x)
        before = x.clone()
        result = transform(x, matrices, scratch, transpose=transpose)
        torch.testing.assert_close(result, expected(before, matrices, transpose))
        assert torch.equal(x, before), "the input is left alone"
        if all(matrix is None for matrix in matrices):
            assert result is x
        else:
            assert result is scratch[0] or result is scratch[1]


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("dims", DIMS)
def test_transform_may_read_from_its_scratch(dims: tuple[int, ...], own: int) -> None:
    for matrices in subsets(dims):
        scratch = normal(BLOCKS, *dims), torch.empty(BLOCKS, *dims, dtype=torch.float64)
        if own == 1:
            scratch = scratch[1], scratch[0]
        before = scratch[own].clone()
        result = transform(scratch[own], matrices, scratch, transpose=True)
        torch.testing.assert_close(result, expected(before, matrices, True))


@pytest.mark.parametrize("dims", DIMS)
def test_projecting_back_undoes_projecting(dims: tuple[int, ...]) -> None:
    x = normal(BLOCKS, *dims)
    bases = [rotations(BLOCKS, size, seed=mode) for mode, size in enumerate(dims)]
    scratch = torch.empty_like(x), torch.empty_like(x)
    there = transform(x, bases, scratch, transpose=True)
    torch.testing.assert_close(transform(there, bases, scratch, transpose=False), x)


@pytest.mark.parametrize("gate", [None, ONE])
@pytest.mark.parametrize("dims", DIMS)
def test_changing_the_bases_keeps_what_is_meant(dims: tuple[int, ...], gate: Tensor | None) -> None:
    both = [
        [rotations(BLOCKS, size, seed=seed + mode) for mode, size in enumerate(dims)]
        for seed in (0, 20)
    ]
    for chosen in itertools.product([False, True], repeat=len(dims)):
        old, new = (
            [basis if taken else None for basis, taken in zip(bases, chosen, strict=True)]
            for bases in both
        )
        x = normal(BLOCKS, *dims)
        meant = expected(x, old, False)
        change_basis_(x, old, new, (torch.empty_like(x), torch.empty_like(x)), gate)
        torch.testing.assert_close(expected(x, new, False), meant)


@pytest.mark.parametrize("dims", DIMS)
def test_behind_a_closed_gate_the_bases_do_not_change(dims: tuple[int, ...]) -> None:
    x = normal(BLOCKS, *dims)
    before = x.clone()
    old, new = (
        [rotations(BLOCKS, size, seed=seed + mode) for mode, size in enumerate(dims)]
        for seed in (0, 20)
    )
    change_basis_(x, old, new, (torch.empty_like(x), torch.empty_like(x)), ZERO)
    assert torch.equal(x, before)


@pytest.mark.parametrize("gate", [None, ONE, ZERO])
def test_replacing_copies_all_or_nothing(gate: Tensor | None) -> None:
    target, value = normal(2, 3), normal(2, 3, seed=1)
    wanted = target.clone() if gate is ZERO else value.clone()
    replace_(target, value, gate)
    assert torch.equal(target, wanted)
    assert target.data_ptr() != value.data_ptr()
    assert torch.equal(value, normal(2, 3, seed=1))


def test_a_closed_gate_keeps_out_what_is_not_finite() -> None:
    target = normal(3)
    replace_(target, torch.full((3,), float("nan"), dtype=torch.float64), ZERO)
    assert torch.equal(target, normal(3))


def test_transform_of_one_block_and_of_float32() -> None:
    x = normal(1, 3, 2, 4).float()
    matrices = [normal(1, size, size, seed=size).float() for size in (3, 2, 4)]
    result = transform(x, matrices, (torch.empty_like(x), torch.empty_like(x)), transpose=False)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected(x, matrices, False))


def modes() -> list[tuple[tuple[int, ...], int]]:
    return [(dims, mode) for dims in DIMS for mode in range(len(dims))]


@pytest.mark.parametrize("gate", [None, ONE])
@pytest.mark.parametrize(("dims", "mode"), modes())
def test_decay_gram_folds_the_product_of_the_unfolding(
    dims: tuple[int, ...], mode: int, gate: Tensor | None
) -> None:
    x, size = normal(BLOCKS, *dims), dims[mode]
    factor = normal(BLOCKS, size, size, seed=5)
    wanted = 0.75 * factor + 0.5 * gram(x, mode)
    before = x.clone()
    decay_gram_(factor, x, mode, beta=0.75, weight=0.5, gate=gate)
    torch.testing.assert_close(factor, wanted)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dims", "mode"), modes())
def test_a_closed_gate_leaves_every_bit_of_the_factor(dims: tuple[int, ...], mode: int) -> None:
    factor = normal(BLOCKS, dims[mode], dims[mode], seed=5)
    before = factor.clone()
    decay_gram_(factor, normal(BLOCKS, *dims), mode, beta=0.75, weight=0.5, gate=ZERO)
    assert torch.equal(factor, before)


def test_decay_gram_without_decay_begins_at_the_gradient() -> None:
    x, factor = normal(2, 3, 4), torch.zeros(2, 3, 3, dtype=torch.float64)
    decay_gram_(factor, x, 0, beta=0.9, weight=0.1, gate=None)
    torch.testing.assert_close(factor, 0.1 * x @ x.mT)


@pytest.mark.parametrize("dims", DIMS)
def test_scale_modes_scales_in_place_along_every_mode_that_has_scales(
    dims: tuple[int, ...],
) -> None:
    all_scales = [normal(BLOCKS, size, seed=8 + mode) for mode, size in enumerate(dims)]
    for chosen in itertools.product([False, True], repeat=len(dims)):
        x = normal(BLOCKS, *dims)
        wanted = x.clone()
        for mode, taken in enumerate(chosen):
            if taken:
                wanted = times_mode(wanted, torch.diag_embed(all_scales[mode]), mode)
        scales = [s if taken else None for s, taken in zip(all_scales, chosen, strict=True)]
        assert scale_modes_(x, scales) is x
        torch.testing.assert_close(x, wanted)


def test_one_scale_for_a_whole_block_is_spread_over_it() -> None:
    x = normal(2, 3, 4)
    wanted = x * torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    torch.testing.assert_close(scale_modes_(x, [torch.tensor([[2.0], [3.0]])]), wanted)
