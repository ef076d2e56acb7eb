"""This process among those that train the same parameters: who keeps which factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from asteria.config.runtime import RuntimeConfig
from asteria.distributed.agreement import Agreement
from asteria.distributed.coherence import Coherence
from asteria.distributed.enquiries import Enquiries, Serve
from asteria.distributed.groups import Assembly, assemble, peer_group
from asteria.distributed.links import LinkCounters
from asteria.distributed.ownership import Load, assign, totals
from asteria.distributed.post import Post
from asteria.distributed.roll_call import RollCall, patience_s
from asteria.distributed.topology import Topology
from asteria.distributed.wire import GlooWire, Wire
from asteria.runtime.records import Fetch, ParameterRecord, Route, TilePlan, state_dtype
from asteria.runtime.units import Unit
from asteria.telemetry.counters import Network

__all__ = ["Meeting", "Member", "Membership", "Peers", "meet"]

_LOCAL = ("workers", "device_budget", "host_budget", "nvme_budget", "nvme_path", "trace")
"""Settings that each rank may have its own of: they change no result."""


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of the optimizer, whether it has state or not."""

    index: int
    route: Route
    dtype: torch.dtype
    """Of the state."""
    card: str
    """What all ranks must know the same of it."""


@dataclass(frozen=True, slots=True)
class Membership:
    """What a rank has in common with the others, once they have met."""

    rank: int
    topology: Topology
    post: Post
    """Not open yet."""
    global_ranks: tuple[int, ...] = ()
    """Of all ranks, in the default group; none where that is this one."""


Meeting = Callable[[RuntimeConfig, Mapping[str, str]], Membership | None]
"""Meets the other ranks, which have the same credentials; None where there are none."""


def meet(config: RuntimeConfig, credentials: Mapping[str, str]) -> Membership | None:
    """Meet the other processes of ``config.process_group``; see `assemble`."""
    group = peer_group(config.process_group)
    if group is None:
        return None
    assembly = assemble(group, credentials, node_size=config.node_size)
    return _membership(assembly, GlooWire(assembly))


def _membership(assembly: Assembly, wire: Wire) -> Membership:
    rank, topology = assembly.rank, assembly.topology
    names = {own: f"rank {known}" for own, known in enumerate(assembly.global_ranks)}
    counters = LinkCounters(rank, topology)
    post = Post(rank, wire, counters, timeout_s=patience_s(assembly.timeout_s), names=names)
    return Membership(rank, topology, post, assembly.global_ranks)


class Peers:
    """The ranks of one optimizer, met when it first makes state. For the training thread.

    A process that is alone owns everything, and nothing travels.
    """

    def __init__(self, config: RuntimeConfig, meeting: Meeting = meet) -> None:
        self._config = config
        self._meeting = meeting
        self._met = False
        self._membership: Membership | None = None
        self._owners: dict[tuple[int, int], int] = {}
        """By index of the parameter and ordinal of the tile; those of this process are missing if
        it is alone."""
        self._carried: list[Load] = []
        self._enquiries: Enquiries | None = None
        self._roll_call: RollCall | None = None
        self.coherence: Coherence | None = None
        """What carries results, if there is anybody else."""
        self.agreement: Agreement | None = None

    @property
    def expected(self) -> bool:
        """Whether there are others, be it that they have not met yet."""
        if self._met:
            return self._membership is not None
        return self._meeting is not meet or peer_group(self._config.process_group) is not None

    @property
    def neighbours(self) -> int:
        """Processes of this node that share its memory, this one included."""
        member = self._membership
        return 1 if member is None else member.topology.neighbours(member.rank)

    def join(self, members: Callable[[], Iterable[Member]], serve: Serve) -> None:
        """Meet the others, if that has not happened, and share out the units of new ``members``.

        ``members()`` are all parameters of the optimizer, in order; ``serve`` answers questions of
        others. Raises ConfigError where they train something else, and CoherenceError where they do
        not come.
        """
        if self._met and self._membership is None:
            return
        everyone = list(members()) if self.expected else []
        if not self._met:
            self._membership = self._meeting(self._config, self._credentials(everyone))
            self._met = True
            if self._membership is None:
                return
            post, topology = self._membership.post, self._membership.topology
            self.coherence, self.agreement = Coherence(post, topology), Agreement(post, topology)
            self._enquiries = Enquiries(post, serve)
            self._roll_call = RollCall(post, self._names)
            post.open()
            self._carried = [Load(0.0, 0.0)] * topology.size
        self._share_out(everyone)

    @property
    def _names(self) -> Sequence[int]:
        """Of all ranks, as the user knows them: in the default group."""
        member = self._membership
        if member is None:
            return ()
        return member.global_ranks or range(member.topology.size)

    def failed_ranks(self, *, failed: bool) -> list[int]:
        """Which ranks have failed in what all do, as every one of them tells; in the default group.

        Raises CoherenceError where a rank does not tell. After `join`.
        """
        member = self._membership
        if member is None or self.agreement is None:
            return []
        # Of negative numbers all bits are set but few.
        mine = ~(1 << member.rank) if failed else -1
        common = self.agreement.common(mine, "the other ranks to say whether they could load")
        return [name for rank, name in enumerate(self._names) if not common >> rank & 1]

    def _credentials(self, everyone: Iterable[Member]) -> dict[str, str]:
        settings = {f.name: getattr(self._config, f.name) for f in fields(self._config)}
        common = {name: repr(v) for name, v in settings.items() if name not in _LOCAL}
        del common["process_group"]
        return {
            "parameters and options of their groups": "\n".join(m.card for m in everyone),
            "RuntimeConfig": repr(common),
            "release of PyTorch": torch.__version__,
        }

    def _share_out(self, everyone: Iterable[Member]) -> None:
        """Owners of all units that have none; those that are known stay where they are."""
        member = self._membership
        if member is None:
            return
        units: list[tuple[int, int]] = []
        loads: list[Load] = []
        for one in everyone:
            for plan in one.route.tiles if one.route.rule.has_bases else ():
                if (one.index, plan.ordinal) not in self._owners:
                    sizes = plan.shape.factor_sizes()
                    nbytes = one.dtype.itemsize * plan.blocks * sum(size**2 for size in sizes)
                    units.append((one.index, plan.ordinal))
                    loads.append(Load(plan.refresh_cost, nbytes))
        if not units:
            return
        turns, ranks = member.topology.in_turns(), member.topology.size
        places = assign(loads, ranks, self._carried)
        self._owners |= {unit: turns[place] for unit, place in zip(units, places, strict=True)}
        added = totals(loads, places, ranks)
        self._carried = [
            Load(old.cost + new.cost, old.nbytes + new.nbytes)
            for old, new in zip(self._carried, added, strict=True)
        ]

    def owner(self, unit: Unit) -> int | None:
        """The other rank that keeps the unit's factors; None if it is this one.

        Sharded parameters are not among what is shared here.
        """
        member = self._membership
        if member is None or unit.record.sharding is not None:
            return None
        owner = self._owners[unit.record.index, unit.ordinal]
        return None if owner == member.rank else owner

    def elsewhere(self, record: ParameterRecord, plan: TilePlan) -> Fetch | None:
        """How to get at the factors of a tile that another rank keeps; None if it is this one."""
        alone = self._membership is None or record.sharding is not None
        if alone or not record.route.rule.has_bases:
            return None
        if (record.index, plan.ordinal) not in self._owners:  # it was frozen, or is so still
            dtype = state_dtype(record.parameter)
            self._share_out([Member(record.index, record.route, dtype, "")])
        if self.owner(Unit(record, plan.ordinal)) is None:
            return None
        peers, whose, ordinal = weakref.ref(self), weakref.ref(record), plan.ordinal

        def fetch(name: str) -> Tensor:
            own, record = peers(), whose()
            if own is None or record is None:
                raise RuntimeError(f"{name} was asked for, and its optimizer is gone")
            return own._fetch(record, ordinal, name)

        return fetch

    def _fetch(self, record: ParameterRecord, ordinal: int, name: str) -> Tensor:
        """One factor of a tile, from its owner."""
        owner, enquiries = self.owner(Unit(record, ordinal)), self._enquiries
        if owner is None or enquiries is None:
            raise RuntimeError(f"{name} of {record.name} is kept here")
        note = {"index": record.index, "ordinal": ordinal, "name": name, "steps": record.steps}
        (tensor,) = enquiries.ask(owner, note, f"{name} of {record.name}")
        if tensor is None:
            raise RuntimeError(f"{name} of {record.name} was answered by nothing")
        return tensor

    def network(self) -> Network:
        """What this rank has had to do with the others."""
        member = self._membership
        if member is None:
            return Network()
        owned = sum(owner == member.rank for owner in self._owners.values())
        counted = member.post.counters.summary()
        return Network(
            rank=member.rank,
            ranks=member.topology.size,
            owned_units=owned,
            links=counted.links,
            waits=counted.waits,
        )
