"""Short training runs with gradients that are the same whoever asks for them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tests.support.tolerances import TOLERANCES

Shape = tuple[int, ...]
Bits = dict[str, Tensor]

COUNTERS = frozenset({"step", "born", "version", "shadow_version", "shadow_lands"})
"""Entries of a state that count steps, in float32."""

SMALL: list[Shape] = [(4, 4), (5,), (4, 4)]
"""Both rules and two equal matrices. First factors of squares are regular: no basis is the
eigensolver's choice, so runs that stack their blocks differently stay near each other."""
MIXED: list[Shape] = [(6, 4), (), (5,), (6, 4), (1, 5), (3, 2, 4)]
"""Every kind of factors: regular, singular, of an inner mode, none."""


def parameters(
    shapes: Sequence[Shape] = SMALL, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """One parameter for each shape, the same for the same seed and position."""
    return [
        nn.Parameter(_draw(shape, dtype, 7919 * seed + index)) for index, shape in enumerate(shapes)
    ]


def clones(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters of the same values and strides, without gradients."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradient(shape: Shape, dtype: torch.dtype, step: int, index: int) -> Tensor:
    """The gradient of parameter ``index`` at ``step``."""
    return _draw(shape, dtype, 104_729 * (step + 1) + index)


def _draw(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def set_gradients(
    params: Sequence[Tensor], step: int, *, scale: float = 1.0, first_index: int = 0
) -> None:
    """Give every parameter its gradient of this step."""
    for index, p in enumerate(params, start=first_index):
        p.grad = gradient(tuple(p.shape), p.dtype, step, index) * scale


def train(
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    scale: float = 1.0,
    first_index: int = 0,
) -> None:
    """One step of all parameters for each of ``steps``."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step, scale=scale, first_index=first_index)
        optimizer.step()


def weights(params: Iterable[Tensor]) -> Bits:
    """Copies of the weights."""
    return {f"{index}": p.detach().clone() for index, p in enumerate(params)}


def everything(optimizer: torch.optim.Optimizer) -> Bits:
    """Copies of all weights and of all of their state but what is in flight.

    To look at that would wait for the workers.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    bits = weights(params)
    for index, p in enumerate(params):
        entries = optimizer.state.get(p, {})
        for key in entries:
            if not key.startswith("shadow"):
                bits[f"{index}.{key}"] = torch.as_tensor(entries[key]).clone()
    return bits


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw_a, raw_b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(raw_a, raw_b)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor is there and equal, bit by bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not same_bits(actual[name], expected[name])]
    assert not different, f"not the same bits: {different}"


def assert_near(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Every tensor differs by at most the tolerance times its largest movement from ``start``.

    Without ``start``, times its largest value.
    """
    tolerance = TOLERANCES[what, dtype]
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        if not wanted.numel():
            continue
        origin = 0.0 if start is None else start[name].double()
        size = (wanted.double() - origin).abs().max().item()
        difference = (actual[name].double() - wanted.double()).abs().max().item()
        assert difference <= tolerance * size, (
            f"{name}: {difference:.3g} apart, {tolerance:g} x {size:.3g} allowed ({what})"
        )
