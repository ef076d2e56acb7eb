"""Sharded parameters travel in pieces of bounded size, the same on all ranks."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from asteria import SOAP, RuntimeConfig
from asteria.distributed.sharded_layout import Cut, ShardLayout, boxes
from asteria.runtime.claims import budgets
from asteria.runtime.pieces import by_mesh, gathered_bytes, pieces
from asteria.runtime.records import ParameterRecord
from asteria.runtime.residence import Residence
from asteria.runtime.routing import route
from asteria.runtime.sharding import Sharding

GROUP = SOAP([torch.zeros(2, 2)]).param_groups[0]
MESH = {1: (4,), 2: (2, 2)}
"""By number of replicas, four ranks."""


def record(
    index: int, shape: tuple[int, ...], owner: int, *, here: int = 0, replicas: int = 1
) -> ParameterRecord:
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    way = route(parameter.shape, GROUP, SOAP.rule, f"p{index}")
    cuts = (Cut(0),) if replicas == 1 else (Cut(None), Cut(0))
    copies = tuple(position // (4 // replicas) for position in range(4))
    layout = ShardLayout(
        None,
        (),
        parameter.shape,
        (0, 1, 2, 3),
        here,
        cuts,
        boxes(shape, MESH[replicas], cuts),
        copies,
    )
    sharding = Sharding(layout, exact=True, owner=owner)
    return ParameterRecord.of(parameter, f"p{index}", index, route=way, sharding=sharding)


def indices(cut: list[list[ParameterRecord]]) -> list[list[int]]:
    return [[one.index for one in piece] for piece in cut]


def test_each_owner_has_room_for_a_message() -> None:
    """Matrices of 4096 bytes: two of one owner fill it, those of others come along."""
    owners = [0, 0, 1, 0, 1, 1, 2]
    members = [record(index, (32, 32), owner) for index, owner in enumerate(owners)]
    assert indices(pieces(members, 8192)) == [[0, 1, 2], [3, 4, 5, 6]]
    assert indices(pieces(members, 1 << 20)) == [[0, 1, 2, 3, 4, 5, 6]]


def test_an_owner_sends_an_update_to_every_replica() -> None:
    members = [record(index, (32, 32), 0, replicas=2) for index in range(3)]
    assert indices(pieces(members, 8192)) == [[0], [1], [2]]


def test_a_rank_sends_its_shards_to_every_owner() -> None:
    """One row: the first rank has all of it."""
    members = [record(index, (1, 512), owner) for index, owner in enumerate([0, 1, 2, 3])]
    assert indices(pieces(members, 4096)) == [[0, 1], [2, 3]]


def test_what_is_larger_than_the_bound_travels_alone() -> None:
    members = [record(0, (4, 4), 0), record(1, (64, 64), 1), record(2, (4, 4), 0)]
    assert indices(pieces(members, 1024)) == [[0], [1], [2]]
    assert pieces([], 1024) == []


@pytest.mark.parametrize("here", range(4))
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_cut_does_not_depend_on_the_rank(here: int, replicas: int) -> None:
    shapes = [(32, 32), (7, 8), (1, 100), (32, 32), (), (64, 2)]
    owners = [0, 1, 2, 3, 0, 1]

    def cut(rank: int) -> list[list[int]]:
        members = [
            record(index, shape, owner, here=rank, replicas=replicas)
            for index, (shape, owner) in enumerate(zip(shapes, owners, strict=True))
            if shape
        ]
        return indices(pieces(by_mesh(members)[0], 6000))

    assert cut(here) == cut(0)


def test_gathered_bytes_are_those_that_are_owned_and_those_that_travel() -> None:
    members = [record(0, (32, 32), 0), record(1, (16, 32), 1), record(2, (32, 32), 0)]
    whole = 2 * 2 * 4 * 1024
    assert gathered_bytes(members, 4096) == whole + 4096 + 1024 + 512
    assert gathered_bytes(members, 1 << 20) == whole + 8192 + (2 * 1024 + 512)
    elsewhere = [record(0, (32, 32), 1)]
    assert gathered_bytes(elsewhere, 4096) == math.prod((8, 32)) * 4


def test_they_are_taken_from_the_budget_of_the_device() -> None:
    free = {"device_bytes": 900, "host_bytes": 500, "nvme_bytes": 70, "working": 11}
    asked = RuntimeConfig(device_budget=1000, nvme_path="x")
    apart = budgets(asked, **free, shares_memory=False, gathered=100)
    assert (apart.device_bytes, apart.pinned_bytes) == (900, 500)
    assert budgets(asked, **free, shares_memory=False, gathered=2000).device_bytes == 0
    assert budgets(RuntimeConfig(), **free, shares_memory=False, gathered=100).device_bytes == 800
    shared = budgets(asked, **free, shares_memory=True, gathered=100)
    assert shared.working_bytes == 111


def test_the_residence_of_a_run_leaves_room_for_them(tmp_path: Path) -> None:
    residence = Residence(RuntimeConfig(nvme_path=tmp_path, host_budget="1GiB"))
    residence.gathered_bytes = 12345
    try:
        assert residence._budgets(torch.device("cpu")).working_bytes == 12345
    finally:
        residence.close()
