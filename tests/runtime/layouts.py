"""Parameters, records and chunks for the runtime's tests."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asteria.algorithms.adam import AdamW
from asteria.algorithms.algorithm import Algorithm, BlockShape
from asteria.algorithms.soap import SOAP
from asteria.config.runtime import RuntimeConfig
from asteria.runtime.admission import Extents, admit
from asteria.runtime.chunks import Chunk, Update, chunks
from asteria.runtime.extents import Extent
from asteria.runtime.records import ParameterRecord, Route, TilePlan
from asteria.runtime.residence import Residence
from asteria.store.layout import Life
from tests.algorithms.blocks import hyper

RULE = SOAP()
ADAMW = AdamW()

RESIDENCE = Residence(RuntimeConfig())


def block(*dims: int) -> BlockShape:
    return BlockShape(dims, (True,) * len(dims))


def record(
    index: int,
    *shape: int,
    rule: Algorithm = RULE,
    batch: int = 0,
    tiles: Sequence[TilePlan] | None = None,
    keeps_layout: bool = False,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
    begun: bool = True,
) -> ParameterRecord:
    """One parameter that is a stack of ``shape[:batch]`` blocks, or consists of ``tiles``."""
    parameter = torch.zeros(shape, dtype=dtype, requires_grad=True)
    if tiles is not None:
        route = Route(rule, tuple(tiles), keeps_layout)
    elif rule is ADAMW:
        route = Route(rule, (TilePlan(block(), math.prod(shape)),), keeps_layout=True)
    else:
        plan = TilePlan(block(*shape[batch:]), math.prod(shape[:batch]))
        route = Route(rule, (plan,), keeps_layout=True)
    return ParameterRecord(
        parameter=parameter,
        name=f"p{index}",
        index=index,
        route=route,
        shape=parameter.shape,
        dtype=dtype,
        device=parameter.device,
        steps=steps,
        begun=begun,
    )


def two_tiles(index: int) -> ParameterRecord:
    """A 6x3 parameter, cut into blocks of 4x3 and 2x3."""
    tiles = [
        TilePlan(block(4, 3), 1, (slice(0, 4), slice(0, 3)), ordinal=0),
        TilePlan(block(2, 3), 1, (slice(4, 6), slice(0, 3)), ordinal=1),
    ]
    return record(index, 6, 3, tiles=tiles)


def admitted(*records: ParameterRecord) -> Extents:
    extents: Extents = {}
    admit(records, {}, extents, RESIDENCE)
    return extents


def extent_of(*records: ParameterRecord) -> Extent:
    """The one extent of records whose blocks all have one shape."""
    (extent,) = extents_of(*records)
    return extent


def extents_of(*records: ParameterRecord) -> list[Extent]:
    """The extents of records whose blocks all have one shape."""
    (extents,) = admitted(*records).values()
    return extents


def update(lr: float = 0.1, weight_decay: float = 0.0, **changes: Any) -> Update:
    return Update(hyper(**changes), lr, weight_decay)


def chunk_of(*records: ParameterRecord, **changes: Any) -> Chunk:
    """The one chunk of records that go together."""
    asked = {one: update(**changes) for one in records}
    (chunk,) = chunks(extent_of(*records), asked)
    return chunk


def values(one: ParameterRecord, seed: int = 0) -> Tensor:
    """Random float32 numbers of a parameter's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(one.shape, generator=generator)


def fill(one: ParameterRecord, seed: int = 0) -> Tensor:
    """Give the parameter random values; returns a copy of them."""
    with torch.no_grad():
        one.parameter.copy_(values(one, seed))
    return one.parameter.detach().clone()


def fields(extent: Extent) -> dict[str, Tensor]:
    """All fields of an extent that lives on the device."""
    return dict(extent.window(0, extent.blocks, Life))
