"""Which part of a tensor each rank of a mesh has, and who owns the whole."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from asteria.algorithms.soap import SOAP
from asteria.distributed.sharded_layout import Cut, ShardLayout, boxes, is_sharded
from asteria.runtime.owners import places
from asteria.runtime.records import ParameterRecord, state_dtype
from asteria.runtime.routing import route
from asteria.runtime.sharding import Sharding

RULE = SOAP()
GROUP: dict[str, Any] = {
    "max_precond_dim": 64,
    "large_dims": "one_sided",
    "normalize_grads": False,
    "data_format": "channels_first",
    "batch_dims": None,
}


def pieces(
    tensor: torch.Tensor, mesh_shape: Sequence[int], dims: Sequence[int | None]
) -> list[Any]:
    """What `torch.chunk` cuts, by row-major position."""
    found = [tensor]
    for size, dim in zip(mesh_shape, dims, strict=True):
        cut = []
        for piece in found:
            parts = [piece] * size if dim is None else list(piece.chunk(size, dim))
            empty = piece.narrow(dim or 0, 0, 0)
            cut += parts + [empty] * (size - len(parts))
        found = cut
    return found


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (3, 9), (1, 1), (0, 4)])
@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2), (2, 3)])
def test_boxes_are_the_pieces_of_chunk(shape: tuple[int, ...], mesh_shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for dims in itertools.product((None, 0, 1), repeat=len(mesh_shape)):
        found = boxes(shape, mesh_shape, tuple(Cut(dim) for dim in dims))
        wanted = pieces(whole, mesh_shape, dims)
        assert len(found) == len(wanted) == math.prod(mesh_shape)
        for box, piece in zip(found, wanted, strict=True):
            assert whole[box].flatten().tolist() == piece.flatten().tolist()


def test_a_late_cut_is_made_within_the_others() -> None:
    # Tensor parallelism, the last dim of the mesh, cuts 8 rows in halves, and these are sharded.
    found = boxes((8,), (2, 2), (Cut(0, late=True), Cut(0)))
    assert [(s.start, s.stop) for (s,) in found] == [(0, 2), (4, 6), (2, 4), (6, 8)]


def test_plain_tensors_are_not_sharded() -> None:
    assert not is_sharded(nn.Parameter(torch.ones(2)))


def layout(ranks: int, shape: tuple[int, ...], *, first: int = 0) -> ShardLayout:
    cut = boxes(shape, (ranks,), (Cut(0),))
    numbers = tuple(range(first, first + ranks))
    alone = (0,) * ranks
    return ShardLayout(None, (), torch.Size(shape), numbers, 0, (Cut(0),), cut, alone)


def records(shapes: Sequence[tuple[int, ...]], ranks: int, **group: Any) -> list[ParameterRecord]:
    found = []
    for index, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.empty(shape, device="meta"))
        way = route(parameter.shape, {**GROUP, **group}, RULE, "p")
        sharding = Sharding(layout(ranks, shape), exact=True)
        found.append(ParameterRecord.of(parameter, "p", index, route=way, sharding=sharding))
    return found


def test_work_and_bytes_are_balanced() -> None:
    """Over 32 ranks, for the matrices of a model of 32 layers."""
    layer = [(4096, 4096)] * 4 + [(4096, 11008)] * 3
    ranks, known = 32, records(layer * 32, 32, max_precond_dim=11008)
    found = places(known)
    work: Counter[int] = Counter()
    held: Counter[int] = Counter()
    for record in known:
        owner = found[record].owner
        work[owner] += sum(int(plan.refresh_cost) for plan in record.route.tiles)
        held[owner] += record.route.state_bytes(state_dtype(record.parameter))
    for table in (work, held):
        assert max(table.values()) <= 1.1 * table.total() / ranks


def test_what_shares_an_extent_has_one_owner_at_every_world_size() -> None:
    shapes = [(48, 32), (16,), (32, 48), (48, 32), (48, 32), (16,), (100, 30)] * 3
    cuts = []
    for ranks in (1, 2, 4, 64):
        found = places(known := records(shapes, ranks))
        cuts.append([found[record].cuts for record in known])
        owners: dict[object, set[int]] = {}
        for record in known:
            for cut in found[record].cuts:
                owners.setdefault(cut, set()).add(found[record].owner)
        assert all(len(those) == 1 for those in owners.values())
        assert len({place.owner for place in found.values()}) == min(ranks, 4), "kinds of blocks"
    assert all(cut == cuts[0] for cut in cuts), "what is multiplied together is always the same"


def test_tiles_that_chain_parameters_bind_them() -> None:
    """Of one parameter all tiles go to its owner, hence those that share extents with them."""
    known = records([(96, 40), (96, 40), (40, 40)], 4, large_dims="blocks", max_precond_dim=48)
    found = places(known)
    assert found[known[0]].owner == found[known[1]].owner != found[known[2]].owner


def test_meshes_are_balanced_on_their_own() -> None:
    known = records([(48, 32)] * 4, 2)
    for record in known[2:]:
        record.sharding = Sharding(layout(2, (48, 32), first=2), exact=True)
    found = places(known)
    assert [found[record].cuts for record in known] == [((0, 0),)] * 2 + [((2, 0),)] * 2
