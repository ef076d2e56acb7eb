"""Applying directions to weights of any dtype and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from asteria.linalg.deferred import do
from asteria.linalg.rounding import stochastic_round
from asteria.linalg.scratch import Scratch
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.records import ParameterRecord, Tile

__all__ = ["apply_", "apply_shards_", "descend_", "gather", "gradients_of", "normalize_"]


def gradients_of(chunk: Chunk) -> list[Tensor]:
    """Those of the chunk's tiles, views of what the user has."""
    return [_region(tile, tile.record.gradient) for tile in chunk.tiles]


def gather(chunk: Chunk, scratch: Scratch, gate: Tensor | None) -> Tensor:
    """The gradients of the chunk's tiles, (blocks, *dims) in the dtype of the state; read-only.

    They are copied together, unless there is but one and it fits as it is. A closed gate leaves
    zeros, so that nothing non-finite is in the arithmetic.
    """
    extent = chunk.extent
    shape = (chunk.stop - chunk.start, *chunk.shape.dims)
    regions = gradients_of(chunk)
    only = regions[0]
    as_is = only.dtype == extent.dtype and only.is_contiguous()
    if len(regions) == 1 and as_is and gate is None and not chunk.hyper.maximize:
        return only.view(shape)
    out = scratch.take("gradient", shape, extent.dtype, extent.device)
    do(torch._foreach_copy_, scratch.cut(out, [region.shape for region in regions]), regions)
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
    scratch: Scratch,
    *,
    scale: float,
    gate: Tensor | None,
) -> None:
    """w <- (w - lr scale direction) (1 - lr weight_decay), for every tile of the chunk.

    The weight decay comes after the update, as published. Narrow weights (bf16, fp16) are updated
    in float32 and rounded once. ``direction`` is overwritten. Where the weights are shards of other
    ranks, the direction is kept for them (`apply_shards_`).
    """
    if gate is not None:
        direction.mul_(gate)
    first = chunk.tiles[0].record.sharding
    if first is not None and first.exact:
        wholes = [tile.plan.region(_change(tile.record)) for tile in chunk.tiles]
        do(torch._foreach_copy_, wholes, scratch.cut(direction, [w.shape for w in wholes]))
        return
    regions = [tile.plan.region(tile.record.weight) for tile in chunk.tiles]
    changes = scratch.cut(direction, [region.shape for region in regions])
    asked = [updates[tile.record] for tile in chunk.tiles]
    noises = None
    if chunk.hyper.stochastic_rounding:
        noises = [_noise(chunk, tile) for tile in chunk.tiles]
    _apply_all_(_Targets(regions, changes, asked, noises), scale=scale, gate=gate)


def apply_shards_(
    parts: Sequence[tuple[ParameterRecord, Tensor, float]],
    updates: Mapping[ParameterRecord, Update],
    gate: Tensor | None,
) -> None:
    """The same for shards of this rank, given (record, part of the direction, scale) of each.

    After the step of the record has been counted.
    """
    kinds: dict[tuple[float, torch.dtype], _Targets] = {}
    for record, part, scale in parts:
        noise: _Noise = ()
        if updates[record].hyper.stochastic_rounding and record.sharding is not None:
            layout = record.sharding.layout
            # Not of the rank: replicas round alike.
            noise = (record.index, *(s.start for s in layout.boxes[layout.here]), record.steps)
        targets = kinds.setdefault((scale, part.dtype), _Targets([], [], [], []))
        targets.add(record.weight, part, updates[record], noise)
    for (scale, dtype), targets in kinds.items():
        near = None if gate is None else gate.to(targets.changes[0].device, dtype)
        _apply_all_(targets, scale=scale, gate=near)


_Noise: TypeAlias = tuple[int, ...]
"""What the noise of stochastic rounding depends on; empty rounds to the nearest."""


class _Targets(NamedTuple):
    """What is updated together, place by place."""

    weights: list[Tensor]
    changes: list[Tensor]
    """Of the weight's shape, in the dtype of the state; overwritten."""
    updates: list[Update]
    noises: list[_Noise] | None
    """None rounds all of them to the nearest."""

    def add(self, weight: Tensor, change: Tensor, update: Update, noise: _Noise) -> None:
        self.weights.append(weight)
        self.changes.append(change)
        self.updates.append(update)
        if self.noises is not None:
            self.noises.append(noise)


def _apply_all_(targets: _Targets, *, scale: float, gate: Tensor | None) -> None:
    kinds: dict[tuple[float, float, bool], list[int]] = {}
    on_host, dtype = targets.changes[0].is_cpu, targets.changes[0].dtype
    for place, (weight, update) in enumerate(zip(targets.weights, targets.updates, strict=True)):
        exact = weight.dtype == dtype and (not on_host or weight.is_contiguous())
        kinds.setdefault((update.lr, update.weight_decay, exact), []).append(place)
    for (lr, weight_decay, exact), places in kinds.items():
        given = [targets.weights[place] for place in places]
        changes = [targets.changes[place] for place in places]
        asked = lr * scale, lr * weight_decay, gate
        if exact:
            descend_(given, changes, *asked)
        else:
            noises = [targets.noises[place] if targets.noises else () for place in places]
            do(_descend_rounded_, given, changes, noises, asked)


def _descend_rounded_(
    targets: list[Tensor],
    changes: list[Tensor],
    noises: list[_Noise],
    asked: tuple[float, float, Tensor | None],
) -> None:
    """`descend_` of copies in the dtype of the changes, from which the weights are rounded."""
    weights = [target.to(changes[0].dtype).contiguous() for target in targets]
    descend_(weights, changes, *asked)
    for target, weight, noise in zip(targets, weights, noises, strict=True):
        _round_into_(target, weight, noise)


def _change(record: ParameterRecord) -> Tensor:
    if record.sharding is None or record.sharding.change is None:
        raise RuntimeError(f"there is nowhere to keep the update of {record.name}")
    return record.sharding.change


def descend_(
    weights: list[Tensor], changes: list[Tensor], rate: float, decay: float, gate: Tensor | None
) -> None:
    """w <- (w - rate change) (1 - decay); a closed gate keeps the decay away. Dense on the host."""
    kept = 1 - decay
    if gate is not None or weights[0].device.type != "cpu" or rate * kept == 0:
        do(torch._foreach_add_, weights, changes, alpha=-rate)
        if decay != 0:
            do(torch._foreach_mul_, weights, kept if gate is None else 1 - gate * decay)
        return
    # w - rate' (change + decay' w) is the same, and one pass by PyTorch's fused SGD kernel, which
    # takes memory as it comes and does not tell autograd.
    do(
        torch._fused_sgd_,
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


def _noise(chunk: Chunk, tile: Tile) -> tuple[int, ...]:
    """What is rounded and when, and nothing that a resumed run or another chunking changes."""
    rows = tile.plan.slices[0].start if len(tile.plan.slices) == 1 else 0
    return tile.record.index, tile.plan.ordinal, chunk.steps, chunk.begun, rows


def _round_into_(target: Tensor, weight: Tensor, noise: Sequence[int]) -> None:
    if noise and target.dtype == torch.bfloat16:
        seed = 0
        for part in noise:
            seed = (seed * 1_000_003 + part) % 2**63
        generator = torch.Generator(target.device).manual_seed(seed)
        weight = stochastic_round(weight, generator)
    target.copy_(weight)
