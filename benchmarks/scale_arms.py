"""Ways to train the same model on many ranks, and what a step takes with each."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from asteria.distributed.spread import round_bytes, spread_s
from asteria.distributed.topology import Link
from benchmarks.scale_model import (
    ADAMW_BYTES,
    DDP_PASSES,
    FSDP_PASSES,
    TOKEN_FLOP,
    TRAVEL_BYTES,
    UPDATE_BYTES,
    WEIGHT_BYTES,
    Cluster,
    Network,
    TileWork,
    Workload,
)
from benchmarks.scale_simulation import Refresh, StepParts, simulate

__all__ = ["Arm", "Ranks", "Where", "arms", "run"]

DEVICE_STALENESS = (1, 2)


class Where(enum.Enum):
    """Who refreshes bases."""

    NOBODY = "nobody"
    INSIDE = "device, in the step"
    HOST = "host, beside the step"
    DEVICE = "device, beside the step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    where: Where
    owned: bool = True
    """Whether factors and refreshes have one owner; else every rank does all of them."""
    update_owned: bool = False
    """Whether the owner alone turns gradient and moments; else every rank does."""
    sharded: bool = False
    """FSDP2; else every rank has all weights."""
    staleness: int = 0


def arms(sharded: bool, staleness: Iterable[int]) -> list[Arm]:
    """All ways, AdamW first; ``sharded`` tells how AdamW trains.

    On the device a refresh ends within the next step, so two values of S are enough.
    """
    found = [
        Arm(name="AdamW", where=Where.NOBODY, sharded=sharded),
        Arm(name="SOAP, every rank refreshes all", where=Where.INSIDE, owned=False),
        Arm(name="SOAP, owners, updates gathered", where=Where.INSIDE, update_owned=True),
    ]
    ways = (("replicas", False), ("exact shards", True))
    places = ((Where.HOST, ""), (Where.DEVICE, ", on the device"))
    for kind, exact in ways:
        for place, suffix in places:
            found += [
                Arm(
                    name=f"Asteria, {kind}{suffix}" if s else f"Asteria, {kind}",
                    where=place if s else Where.INSIDE,
                    update_owned=exact,
                    sharded=exact,
                    staleness=s,
                )
                for s in staleness
                if place is Where.HOST or s in DEVICE_STALENESS
            ]
    return found


class Ranks:
    """A model on so many ranks: who owns what, and what the parts of a step take."""

    def __init__(
        self,
        work: Workload,
        ranks: int,
        cluster: Cluster,
        network: Network,
        *,
        phases_by_owner: bool = False,
    ) -> None:
        """``phases_by_owner``: each owner spreads its refreshes over the period for itself."""
        self.work, self.count, self.cluster, self.network = work, ranks, cluster, network
        self.topology = cluster.topology(ranks)
        self._owners = {whole: work.owners(self.topology, whole=whole) for whole in (False, True)}
        self._phases_by_owner = phases_by_owner
        self._travel: dict[int, float] = {}

    def owners(self, arm: Arm) -> list[int]:
        """The rank of each tile; shards of a parameter come together at one rank."""
        return self._owners[arm.sharded]

    def most(self, arm: Arm, amount: Callable[[TileWork], float]) -> float:
        """Of what tiles take, summed by owner, the largest sum."""
        sums: dict[int, float] = {}
        for tile, owner in zip(self.work.tiles, self.owners(arm), strict=True):
            sums[owner] = sums.get(owner, 0.0) + amount(tile)
        return max(sums.values(), default=0.0)

    def part(self, arm: Arm, amount: Callable[[TileWork], float], *, owned: bool) -> float:
        """Of what tiles take, on the busiest rank."""
        return self.most(arm, amount) if owned else sum(map(amount, self.work.tiles))

    def pass_s(self, nbytes: float) -> float:
        """One pass of ``nbytes`` over all ranks, as sums are scattered or parts gathered.

        Within the node first, then equal parts of it between nodes on a card of each rank.
        """
        nodes = len(self.topology.nodes)
        near = self.count // nodes
        intra, inter = self.network.intra, self.network.inter
        near_s = intra.seconds(nbytes / near, near - 1)
        return near_s + inter.seconds(nbytes / near / nodes, nodes - 1)

    def compute_s(self, arm: Arm, results_s: float = 0.0) -> float:
        """Forward and backward, and what of the communication they cannot hide.

        ``results_s``: that results of refreshes keep the links between nodes busy in a step.
        """
        tokens = self.work.training.batch_tokens / self.count
        model_s = TOKEN_FLOP * self.work.in_products * tokens / self.cluster.compute_flop_per_s
        passes = FSDP_PASSES if arm.sharded else DDP_PASSES
        traffic_s = passes * self.pass_s(TRAVEL_BYTES * self.work.parameters)
        # Gradients travel during backward, weights during forward, too.
        hidden_s = self.cluster.overlap * model_s * passes / 3
        return model_s + max(0.0, traffic_s + results_s - hidden_s)

    def update_s(self, arm: Arm) -> float:
        """The optimizer's part of a step, its refreshes aside."""
        plain = self.work.plain if arm.where is not Where.NOBODY else self.work.parameters
        shares = self.count if arm.sharded or arm.update_owned else 1
        moved = ADAMW_BYTES * plain / shares
        seconds = moved / self.cluster.memory_bytes_per_s
        if arm.where is Where.NOBODY:
            return seconds
        seconds += self.part(arm, lambda tile: tile.turn_s(self.cluster), owned=arm.update_owned)
        seconds += self.part(arm, lambda tile: tile.fold_s(self.cluster), owned=arm.owned)
        return seconds + (self.exchange_s(arm) if arm.update_owned else 0.0)

    def exchange_s(self, arm: Arm) -> float:
        """Updates from their owners to every rank, or gradients to owners and updates back."""
        elements = self.work.parameters - self.work.plain
        if not arm.sharded:
            return self.pass_s(UPDATE_BYTES * elements)
        # Each rank sends every owner its shards of the owner's tiles; owners of the largest tiles
        # take in the most.
        most = self.most(arm, lambda tile: (TRAVEL_BYTES + UPDATE_BYTES) * tile.elements)
        nodes = len(self.topology.nodes)
        speed = self.network.inter if nodes > 1 else self.network.intra
        return speed.seconds(most / self.count, self.count - 1)

    def inside_s(self, arm: Arm) -> float:
        """A round of refreshes in the step, on the device, and its results on every rank."""
        if arm.where is not Where.INSIDE:
            return 0.0
        seconds = self.part(arm, lambda tile: tile.refresh_s(self.cluster.device), owned=arm.owned)
        if not arm.owned or arm.update_owned or self.count == 1:
            return seconds
        sending_s = self.most(arm, self._travel_s)
        return seconds + max(sending_s, self._passing_s(self.round_bytes))

    @property
    def round_bytes(self) -> int:
        """Of all bases."""
        return sum(tile.basis_bytes for tile in self.work.tiles)

    def sent_bytes(self) -> dict[Link, int]:
        """Between all ranks by one round of results to replicas."""
        sizes = [tile.basis_bytes for tile in self.work.tiles]
        sent = round_bytes(sizes, self._owners[False], self.topology)
        return {link: sum(rank[link] for rank in sent) for link in Link}

    def refreshes(self, arm: Arm) -> list[Refresh]:
        """One for each tile, beside the training; where every rank does all, those of one."""
        _, threads = self.cluster.workers
        device, owners = arm.where is Where.DEVICE, self.owners(arm)
        phases = self.work.phases(owners if self._phases_by_owner else None)
        travels = arm.owned and not arm.update_owned and self.count > 1
        per_node = self.count // len(self.topology.nodes)
        link = self.cluster.link_bytes_per_s
        return [
            Refresh(
                owner=owner if arm.owned else 0,
                phase=phase,
                job_s=tile.refresh_s(self.cluster.device)
                if device
                else tile.refresh_s(self.cluster.host, threads),
                takes_device=device,
                # Factors and bases to the host; bases back, at the end.
                copy_s=0.0 if device else 2 * tile.basis_bytes / link,
                sending_s=self._travel_s(tile) if travels else 0.0,
                passing_s=self._passing_s(tile.basis_bytes * per_node) if travels else 0.0,
                travel_s=(self._travel_s(tile) if travels else 0.0)
                + (tile.basis_bytes / link if travels or not device else 0.0),
                place=owner % per_node,
            )
            for tile, owner, phase in zip(self.work.tiles, owners, phases, strict=True)
        ]

    def _travel_s(self, tile: TileWork) -> float:
        """Seconds on empty links; the same from every rank, since nodes are equal."""
        nbytes = tile.basis_bytes
        if nbytes not in self._travel:
            self._travel[nbytes] = spread_s(nbytes, self.topology, 0, self.network.results())
        return self._travel[nbytes]

    def _passing_s(self, nbytes: float) -> float:
        """Results of all places together arrive at a node, and are passed on by their places."""
        per_node = self.count // len(self.topology.nodes)
        near_s = self.network.results_intra.seconds(nbytes / per_node, per_node - 1)
        if len(self.topology.nodes) == 1:
            return near_s
        return max(near_s, self.network.results_inter.seconds(nbytes / per_node))

    def state_bytes(self, arm: Arm) -> float:
        """Weights, gradients, moments, factors and bases on the fullest device."""
        elements = self.work.parameters
        held = 2 * WEIGHT_BYTES * elements / (self.count if arm.sharded else 1)
        moments = 2 * WEIGHT_BYTES
        if arm.where is Where.NOBODY:
            return held + moments * elements / (self.count if arm.sharded else 1)
        held += moments * self.work.plain / (self.count if arm.update_owned else 1)
        held += self.part(arm, lambda tile: moments * tile.elements, owned=arm.update_owned)
        held += self.part(arm, lambda tile: tile.basis_bytes, owned=arm.owned)
        return held + self.part(arm, lambda tile: tile.basis_bytes, owned=arm.update_owned)


def run(ranks: Ranks, arm: Arm, *, period: int) -> dict[str, Any]:
    """Simulate steps of ``arm``; what is found, for the report."""
    beside = arm.where in (Where.HOST, Where.DEVICE)
    travels = beside and arm.owned and not arm.update_owned and len(ranks.topology.nodes) > 1
    lane_bytes = ranks.round_bytes / (ranks.count // len(ranks.topology.nodes))
    results_s = ranks.network.inter.seconds(lane_bytes) / period if travels else 0.0
    parts = StepParts(
        compute_s=ranks.compute_s(arm, results_s),
        update_s=ranks.update_s(arm),
        inside_s=ranks.inside_s(arm),
    )
    found = simulate(
        parts,
        ranks.refreshes(arm) if beside else (),
        period=period,
        staleness=arm.staleness,
        jobs=ranks.cluster.workers[0] if arm.where is Where.HOST else 1,
    )
    state_bytes = ranks.state_bytes(arm)
    numbers = {
        "step_s": found.step_s,
        "longest_step_s": found.longest_step_s,
        "wait_s": found.wait_s,
        "busy": found.busy,
        **dataclasses.asdict(parts),
        "state_bytes": state_bytes,
    }
    return {
        "arm": arm.name,
        "staleness": arm.staleness,
        "ranks": ranks.count,
        **{name: float(f"{number:.5g}") for name, number in numbers.items()},
        "fits": state_bytes <= ranks.cluster.device_bytes,
    }
