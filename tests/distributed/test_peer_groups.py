"""Ranks that train the same find each other, and those that do not are told apart."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from asteria.distributed.groups import assemble, peer_group
from asteria.distributed.topology import Topology
from asteria.errors import ConfigError
from tests.support.processes import gather

SAME = {"parameters": "two matrices"}


def meetings(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"alone": peer_group("alone")}
    world = peer_group(None)
    assert world is dist.group.WORLD
    first = assemble(world, SAME)
    second = assemble(world, SAME, node_size=2)
    found["topologies"] = first.topology, second.topology
    found["channels"] = first.channel, second.channel
    found["shared"] = first.group is second.group
    found["timeout_s"] = first.timeout_s
    found["place"] = first.rank, first.global_ranks
    try:
        assemble(world, SAME | {"options": "odd" if rank == 2 else "even"})
    except ConfigError as error:
        found["error"] = str(error)
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pair = assemble(peer_group(pairs[rank % 2]), {"parameters": f"of pair {rank % 2}"})  # type: ignore[arg-type]
    found["pair"] = pair.rank, pair.global_ranks, pair.channel
    try:
        peer_group(pairs[1 - rank % 2])
    except ConfigError as error:
        found["not a member"] = str(error)
    return found


def test_ranks_meet(tmp_path: Path) -> None:
    for rank, found in enumerate(gather(4, tmp_path / "store", meetings)):
        assert found["alone"] is None
        assert found["topologies"] == (Topology.even(4, 4), Topology.even(4, 2))
        assert found["channels"] == (0, 1)
        assert found["shared"], "one mesh of sockets is enough"
        assert found["timeout_s"] == 60.0, "as in init_process_group"
        assert found["place"] == (rank, (0, 1, 2, 3))
        others = "rank 0, 1, 3 than on rank 2" if rank == 2 else f"rank 2 than on rank {rank}"
        assert f"the same options, found others on {others}" in found["error"]
        assert found["pair"] == (rank // 2, (rank % 2, rank % 2 + 2), 0)
        assert f"found rank {rank}, which is no member" in found["not a member"]


def test_without_other_processes_nobody_is_met() -> None:
    assert peer_group(None) is None
