"""Applying directions to weights of any dtype and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from asteria.linalg.rounding import stochastic_round
from asteria.linalg.scratch import Scratch
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.records import ParameterRecord, Tile

__all__ = ["apply_", "gather", "normalize_"]


def _slots(chunk: Chunk, stacked: Tensor, regions: Sequence[Tensor]) -> list[Tensor]:
    """The part of a chunk-shaped tensor that belongs to each tile, viewed as its region."""
    blocks, *dims = stacked.shape
    shape = torch.Size(dims)
    if len(regions) == blocks and all(region.shape == shape for region in regions):
        return list(stacked.unbind())
    parts = torch.split_with_sizes(stacked, [tile.stop - tile.start for tile in chunk.tiles])
    return [part.view(region.shape) for part, region in zip(parts, regions, strict=True)]


def gather(chunk: Chunk, scratch: Scratch, gate: Tensor | None) -> Tensor:
    """The gradients of the chunk's tiles, (blocks, *dims) in the dtype of the state; read-only.

    They are copied together, unless there is but one and it fits as it is. A closed gate leaves
    zeros, so that nothing non-finite is in the arithmetic.
    """
    extent = chunk.extent
    shape = (chunk.stop - chunk.start, *chunk.shape.dims)
    regions = [_region(tile, tile.record.parameter.grad) for tile in chunk.tiles]
    only = regions[0]
    as_is = only.dtype == extent.dtype and only.is_contiguous()
    if len(regions) == 1 and as_is and gate is None and not chunk.hyper.maximize:
        return only.view(shape)
    out = scratch.take("gradient", shape, extent.dtype, extent.device)
    torch._foreach_copy_(_slots(chunk, out, regions), regions)
    if gate is not None:
        out.masked_fill_(gate == 0, 0)
    if chunk.hyper.maximize:
        out.neg_()
    return out


def _region(tile: Tile, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a gradient vanished during the step")
    return tile.plan.region(tensor)


def normalize_(direction: Tensor, chunk: Chunk) -> None:
    """Scale each block (each parameter, under the AdamW rule) to a root mean square of 1."""
    if chunk.shape.dims:
        parts = [direction]
    else:
        parts = [
            direction[tile.start - chunk.start : tile.stop - chunk.start].unsqueeze(0)
            for tile in chunk.tiles
        ]
    for part in parts:
        dims = list(range(1, part.dim()))
        part.div_(part.square().mean(dims, keepdim=True).sqrt_().add_(1e-30))


def apply_(
    direction: Tensor,
    chunk: Chunk,
    updates: Mapping[ParameterRecord, Update],
    *,
    scale: float,
    gate: Tensor | None,
) -> None:
    """w <- (w - lr scale direction) (1 - lr weight_decay), for every tile of the chunk.

    The weight decay comes after the update, as published. Narrow weights (bf16, fp16) are updated
    in float32 and rounded once. ``direction`` is overwritten.
    """
    if gate is not None:
        direction.mul_(gate)
    regions = [tile.plan.region(tile.record.parameter) for tile in chunk.tiles]
    changes = _slots(chunk, direction, regions)
    groups: dict[tuple[float, float, bool], list[int]] = {}
    for index, tile in enumerate(chunk.tiles):
        update = updates[tile.record]
        dense = regions[index].is_contiguous() or not direction.is_cpu
        exact = dense and tile.record.dtype == direction.dtype
        groups.setdefault((update.lr, update.weight_decay, exact), []).append(index)
    for (lr, weight_decay, exact), members in groups.items():
        targets = [regions[index] for index in members]
        weights = targets if exact else [t.to(direction.dtype).contiguous() for t in targets]
        _descend_(
            weights, [changes[index] for index in members], lr * scale, lr * weight_decay, gate
        )
        if not exact:
            for index, target, weight in zip(members, targets, weights, strict=True):
                _round_into_(target, weight, chunk, chunk.tiles[index])


def _descend_(
    weights: list[Tensor], changes: list[Tensor], rate: float, decay: float, gate: Tensor | None
) -> None:
    """w <- (w - rate change) (1 - decay); a closed gate keeps the decay away. Dense on the host."""
    kept = 1 - decay
    if gate is not None or weights[0].device.type != "cpu" or rate * kept == 0:
        torch._foreach_add_(weights, changes, alpha=-rate)
        if decay != 0:
            torch._foreach_mul_(weights, kept if gate is None else 1 - gate * decay)
        return
    # w - rate' (change + decay' w) is the same, and one pass by PyTorch's fused SGD kernel, which
    # takes memory as it comes and does not tell autograd.
    torch._fused_sgd_(
        weights,
        changes,
        [],
        weight_decay=decay / (rate * kept),
        momentum=0.0,
        lr=rate * kept,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    torch.autograd.graph.increment_version(weights)


def _round_into_(target: Tensor, weight: Tensor, chunk: Chunk, tile: Tile) -> None:
    if chunk.hyper.stochastic_rounding and target.dtype == torch.bfloat16:
        # The noise depends on what is rounded and when, and on nothing that a resumed run, another
        # rank or another chunking could do differently.
        seed = 0
        rows = tile.plan.slices[0].start if len(tile.plan.slices) == 1 else 0
        for part in (tile.record.index, tile.plan.ordinal, chunk.steps, chunk.begun, rows):
            seed = (seed * 1_000_003 + part) % 2**63
        generator = torch.Generator(target.device).manual_seed(seed)
        weight = stochastic_round(weight, generator)
    target.copy_(weight)
