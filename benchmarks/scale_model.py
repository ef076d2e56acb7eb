"""What a training step is made of on so many ranks: seconds and bytes, from shapes and rates.

All ranks have equal shares of one global batch, so more ranks have less to compute each, and the
same to communicate. Weights and the optimizer's state are in float32, gradients and weights travel
in bfloat16. Pure functions; nothing here allocates a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

import asteria
from asteria.distributed.ownership import Load, assign
from asteria.distributed.spread import Speed
from asteria.distributed.topology import Link, Topology
from asteria.planner.extents import routed
from asteria.planner.machine import Machine
from asteria.planner.weights import weights_of
from asteria.refresh.pool import jobs_and_threads
from asteria.refresh.schedule import phases

WEIGHT_BYTES, TRAVEL_BYTES, UPDATE_BYTES = 4, 2, 4  # of an element; what travels is bfloat16
ADAMW_BYTES = 28  # read weight, gradient and two moments, write weight and moments
TOKEN_FLOP = 6  # of a weight and token, forward and backward; attention scores are left out
DDP_PASSES = 2  # gradients: scattered sums, gathered
FSDP_PASSES = 3  # weights gathered for forward and backward, gradients' sums scattered
HOST = Machine(cores=14, training_threads=2)  # of a rank: two processors of 56 cores, 8 ranks


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model, how SOAP divides it, and the batch that all ranks share."""

    model: str
    batch_tokens: int
    sharded: bool = False
    """Whether AdamW's run shards weights and state (FSDP2); else each rank has all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the optimizer."""


TRAININGS = {
    # arXiv 2501.00656 and the model cards: batches of 512 and 1024 sequences of 4096 tokens.
    "olmo-2-1b": Training(model="olmo-2-1b", batch_tokens=512 * 4096),
    "olmo-2-1b, blocks of 2048": Training(
        model="olmo-2-1b",
        batch_tokens=512 * 4096,
        options={"max_precond_dim": 2048, "large_dims": "blocks"},
    ),
    "olmo-2-7b": Training(model="olmo-2-7b", batch_tokens=1024 * 4096, sharded=True),
    # arXiv 2307.09288, section 2.2: a global batch of 4M tokens, sequences of 4096.
    "llama-2-70b": Training(model="llama-2-70b", batch_tokens=1024 * 4096, sharded=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Links of a rank, one way, as far as software gets: 80 % of the wire."""

    name: str
    intra: Speed
    inter: Speed
    results_intra: Speed
    """What refreshes on hosts send has a gloo group of its own: TCP, whatever the wire."""
    results_inter: Speed

    def results(self) -> dict[Link, Speed]:
        """Speeds of the group that results travel on."""
        return {Link.INTRA: self.results_intra, Link.INTER: self.results_inter}


_NVLINK = Speed(0.8 * 450e9, 5e-6)  # H100 SXM: NVLink 4, 900 GB/s both ways together
_LOOPBACK = Speed(3e9, 1e-4)  # measured: gloo between two processes of a server, 64 MiB and 64 B
NETWORKS = {
    # A 400 Gb/s card (ConnectX-7) for each accelerator, as in a DGX H100; arXiv 2407.21783 likewise
    # for Llama 3. TCP over InfiniBand is taken to reach 3 GB/s on one connection.
    "infiniband": Network(
        name="infiniband",
        intra=_NVLINK,
        inter=Speed(0.8 * 50e9, 1e-5),
        results_intra=_LOOPBACK,
        results_inter=Speed(3e9, 5e-5),
    ),
    # One 100 Gb/s card for a node of eight ranks.
    "ethernet": Network(
        name="ethernet",
        intra=_NVLINK,
        inter=Speed(0.8 * 12.5e9 / 8, 5e-5),
        results_intra=_LOOPBACK,
        results_inter=Speed(0.8 * 12.5e9 / 8, 5e-5),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a rank computes with. The defaults are those of an H100 SXM, not measured here."""

    node_size: int = 8
    compute_flop_per_s: float = 4e14
    """Forward and backward: 40 % of 989 TFLOP/s in bfloat16; arXiv 2407.21783 reports 38-43 %."""
    product_flop_per_s: float = 5e13
    """The optimizer's products, in float32: three quarters of 67 TFLOP/s."""
    memory_bytes_per_s: float = 2.7e12
    """80 % of 3.35 TB/s."""
    device_bytes: float = 80e9
    link_bytes_per_s: float = 50e9
    """Between host and device, one way: PCIe 5.0 with 16 lanes, 80 %."""
    overlap: float = 1.0
    """Of forward and backward, how much of it hides communication."""
    host: Machine = field(default_factory=lambda: HOST)
    """Cores of one rank, and how long a refresh takes on them."""
    device: Machine = field(
        # One QR step in float32: 6.3 ms at 2000 on an A100 and 31.6 ms at 4096 were reported by
        # others (mlx issue 975, FlagGems pull request 5586), the rest is estimated from these.
        default_factory=lambda: Machine(
            refresh_s=((1024, 0.003), (2048, 0.007), (4096, 0.034), (8192, 0.2)),
            source="reported by others, partly estimated",
        )
    )
    """Only its seconds of a refresh count."""

    def topology(self, ranks: int) -> Topology:
        """Whole nodes, or a part of one."""
        return Topology.even(ranks, min(ranks, self.node_size))

    @property
    def workers(self) -> tuple[int, int]:
        """(refreshes at a time, threads of each) on the host of a rank."""
        return jobs_and_threads(self.host.free_cores)


@dataclass(frozen=True, slots=True)
class TileWork:
    """What is owned and refreshed as a whole."""

    sizes: tuple[int, ...]
    """Of the factors of a block."""
    blocks: int
    elements: int
    parameter: int = 0
    """Position of the parameter that it is a part of."""

    @property
    def basis_bytes(self) -> int:
        """Of its bases, which is what a refresh sends; its factors take as much."""
        return WEIGHT_BYTES * self.blocks * sum(size**2 for size in self.sizes)

    @property
    def load(self) -> Load:
        """As ownership sees it."""
        return Load(float(self.blocks * sum(size**3 for size in self.sizes)), self.basis_bytes)

    def refresh_s(self, machine: Machine, threads: int = 1) -> float:
        """Of one refresh of all its bases."""
        return self.blocks * sum(machine.seconds(n, threads, method="qr") for n in self.sizes)

    def turn_s(self, cluster: Cluster) -> float:
        """Project the gradient, update the moments, project back."""
        flop = 4 * self.elements * sum(self.sizes)
        moved = ADAMW_BYTES * self.elements + 2 * self.basis_bytes
        return flop / cluster.product_flop_per_s + moved / cluster.memory_bytes_per_s

    def fold_s(self, cluster: Cluster) -> float:
        """Add the gradient's products to the factors."""
        flop = 2 * self.elements * sum(self.sizes)
        moved = 2 * self.basis_bytes
        return flop / cluster.product_flop_per_s + moved / cluster.memory_bytes_per_s


@dataclass(frozen=True)
class Workload:
    """A model as SOAP divides it."""

    training: Training
    parameters: int
    in_products: int
    """Parameters that each token is multiplied with: all but the input embedding."""
    tiles: tuple[TileWork, ...]
    """Those with factors."""

    @cached_property
    def plain(self) -> int:
        """Parameters under AdamW's rule."""
        return self.parameters - sum(tile.elements for tile in self.tiles)

    def phases(self, owners: Sequence[int] | None = None) -> list[float]:
        """Where in the period each tile is refreshed: spread over it as the runtime does.

        With ``owners`` those of each owner are, for themselves.
        """
        groups = [0] * len(self.tiles) if owners is None else owners
        places: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(group, []).append(place)
        found = [0.0] * len(self.tiles)
        for together in places.values():
            spread = phases([self.tiles[place].load.cost for place in together])
            for place, phase in zip(together, spread, strict=True):
                found[place] = phase
        return found

    def owners(self, topology: Topology, *, whole: bool = False) -> list[int]:
        """The rank of each tile, as the runtime assigns them; ``whole`` parameters for shards."""
        turns = topology.in_turns()
        keys = [tile.parameter if whole else place for place, tile in enumerate(self.tiles)]
        loads: dict[int, Load] = {}
        for key, tile in zip(keys, self.tiles, strict=True):
            cost, nbytes = loads.get(key, Load(0.0, 0.0))
            loads[key] = Load(cost + tile.load.cost, nbytes + tile.load.nbytes)
        assigned = assign(list(loads.values()), len(turns))
        owners = {key: turns[place] for key, place in zip(loads, assigned, strict=True)}
        return [owners[key] for key in keys]


def workload(training: Training) -> Workload:
    """Route every parameter of the model as SOAP does."""
    _, weights = weights_of(training.model)
    with asteria.SOAP([torch.zeros(1)], **training.options) as optimizer:
        ways = routed(weights, optimizer.param_groups[0], optimizer.rule)
    tiles = [
        TileWork(
            tile.shape.factor_sizes(),
            tile.blocks,
            tile.blocks * torch.Size(tile.shape.dims).numel(),
            parameter,
        )
        for parameter, (_, way) in enumerate(ways)
        if way.rule.has_bases
        for tile in way.tiles
    ]
    parameters = sum(weight.shape.numel() for weight in weights)
    return Workload(training, parameters, parameters - weights[0].shape.numel(), tuple(tiles))
