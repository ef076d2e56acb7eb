"""Stacks of blocks with random contents, and the mode products that rules are checked with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockShape, Pair
from asteria.config.hyperparameters import Hyperparameters
from asteria.store.layout import Layout

BLOCKS = 3

SHAPES = [
    BlockShape((5,), (True,)),
    BlockShape((4, 3), (True, True)),
    BlockShape((4, 3), (False, True)),
    BlockShape((4, 3), (True, False)),
    BlockShape((3, 2, 4), (True, True, True)),
    BlockShape((3, 2, 4), (False, True, True)),
    BlockShape((3, 2, 4), (True, False, True)),
    BlockShape((3, 2, 4), (True, True, False)),
    BlockShape((2, 3, 2, 3), (True, True, True, True)),
    BlockShape((2, 3, 2, 3), (True, False, False, True)),
]


def hyper(**changes: Any) -> Hyperparameters:
    values: dict[str, Any] = {
        "beta1": 0.9,
        "beta2": 0.8,
        "shampoo_beta": 0.7,
        "eps": 1e-3,
        "precondition_frequency": 10,
        "normalize_grads": False,
    }
    return Hyperparameters(**values | changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient_of(shape: BlockShape, seed: int = 0) -> Tensor:
    return normal(BLOCKS, *shape.dims, seed=seed)


def scratch_of(gradient: Tensor) -> Pair:
    nan = float("nan")
    return torch.full_like(gradient, nan), torch.full_like(gradient, nan)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(BLOCKS, size, size, seed=seed)).Q


def zero_state(rule: Algorithm, shape: BlockShape) -> dict[str, Tensor]:
    layout = Layout(rule.fields(shape), BLOCKS, torch.float64)
    return layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))


def random_state(rule: Algorithm, shape: BlockShape) -> dict[str, Tensor]:
    """Orthogonal bases, symmetric positive factors, positive second moments and inverse roots."""
    state = zero_state(rule, shape)
    for seed, (name, tensor) in enumerate(state.items(), start=100):
        values = normal(*tensor.shape, seed=seed)
        if name.startswith("basis"):
            values = rotation(tensor.shape[-1], seed)
        elif name.startswith("factor"):
            values = values @ values.mT
        elif name != "exp_avg":
            values = values.abs() + 0.1
        tensor.copy_(values)
    return state


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the fields in which any bit differs."""
    assert before.keys() == after.keys()
    bits = {
        name: (before[name].view(torch.int64), after[name].view(torch.int64)) for name in before
    }
    return {name for name, (old, new) in bits.items() if not torch.equal(old, new)}


def times_mode(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Mode ``mode`` of x (b, d_0, ...) multiplied by matrix (b, d, d)."""
    moved = torch.einsum("bij,b...j->b...i", matrix, x.movedim(mode + 1, -1))
    return moved.movedim(-1, mode + 1)


def into_basis(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    for mode, basis in enumerate(bases):
        if basis is not None:
            x = times_mode(x, basis.mT, mode)
    return x


def out_of_basis(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    for mode, basis in enumerate(bases):
        if basis is not None:
            x = times_mode(x, basis, mode)
    return x


def bases_of(state: Mapping[str, Tensor], rank: int) -> list[Tensor | None]:
    return [state.get(f"basis_{mode}") for mode in range(rank)]


def other_bases(state: Mapping[str, Tensor], shape: BlockShape) -> list[Tensor | None]:
    """New bases for the modes that have one."""
    return [
        rotation(size, seed=50 + mode) if f"basis_{mode}" in state else None
        for mode, size in enumerate(shape.dims)
    ]


def gram(x: Tensor, mode: int) -> Tensor:
    """X_(k) X_(k)^T of x (b, d_0, ...)."""
    rows = x.movedim(mode + 1, 1).reshape(x.shape[0], x.shape[mode + 1], -1)
    return torch.einsum("bik,bjk->bij", rows, rows)


def ids(shapes: Iterable[BlockShape]) -> list[str]:
    """Such as 4x3f for a matrix whose second dim has no factor: a letter per mode."""
    return [
        "x".join(f"{n}{'' if f else 'f'}" for n, f in zip(s.dims, s.factored, strict=True))
        for s in shapes
    ]
