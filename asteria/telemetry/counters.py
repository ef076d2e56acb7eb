"""Counters of one optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Counters", "LinkTraffic", "Network", "Stats", "Traffic", "Waited"]


@dataclass(slots=True)
class Traffic:
    """What was moved between tiers for steps. For the training thread."""

    read_bytes: int = 0
    """From NVMe."""
    written_bytes: int = 0
    """To NVMe."""
    uploaded_bytes: int = 0
    """From pinned memory to the device."""
    downloaded_bytes: int = 0
    """From the device to pinned memory."""
    waits: int = 0
    """Times that a step needed state that is not at home on the device."""
    wait_s: float = 0.0
    """Seconds that it took to have it, and room for it."""
    failed_writes: int = 0
    """Writes after which the state stayed in memory."""
    demoted_bytes: int = 0
    """Moved one tier down because free memory was short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTraffic:
    """What one rank has sent and received over one class of links."""

    sent_bytes: int = 0
    sent_messages: int = 0
    received_bytes: int = 0
    received_messages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """Waits of one rank's training thread for another rank."""

    rank: int
    """Of the other one, in the process group; -1 for what all ranks of a mesh do together."""
    link: str
    """To it; to all ranks of a mesh the slowest."""
    cause: str
    """``"basis"``, ``"delivery"``, ``"agreement"`` or ``"state"``; of sharded parameters
    ``"gradients"``, ``"updates"``, ``"decision"`` or ``"state"``."""
    count: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What one rank has to do with the others."""

    rank: int = 0
    """In the process group; 0 also for a process that is alone."""
    ranks: int = 1
    """That share the factors and refreshes."""
    owned_units: int = 0
    """Units (tiles of parameters) whose factors this rank keeps and refreshes."""
    links: Mapping[str, LinkTraffic] = field(default_factory=dict)
    """``"intra"`` (within a node) and ``"inter"`` (between nodes) -> what has crossed them."""
    shard_links: Mapping[str, LinkTraffic] = field(default_factory=dict)
    """The same for sharded parameters: gradients, updates and state of those that are stepped as a
    whole. What ranks only decide together (some bytes for each parameter) is not in it."""
    gathered_peak_bytes: int = 0
    """The most memory that whole gradients and updates of sharded parameters took here during a
    step, messages included."""
    waits: tuple[Waited, ...] = ()
    """The longest first."""


@dataclass(slots=True)
class Counters:
    """What is counted while an optimizer works. For the training thread."""

    steps: int = 0
    skipped_steps: int = 0
    refreshes: int = 0
    installs: int = 0
    retried_refreshes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    staleness: dict[str, Counter[int]] = field(default_factory=dict)
    refresh_cost: float = 0.0
    young_steps: set[int] = field(default_factory=set)
    """Calls of step() that refreshed at once because factors were young."""
    update_s: float = 0.0
    refresh_s: float = 0.0
    install_s: float = 0.0
    worker_s: float = 0.0
    device_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What an optimizer has done since it was made; `optimizer.stats()` returns one."""

    steps: int
    """Calls of step(), skipped ones included."""
    skipped_steps: int
    """Steps that changed nothing because a gradient was not finite."""
    refreshes: int
    """Eigenbases computed by this process, the first ones included."""
    refresh_cost: float
    """Of these: sizes cubed, summed up. A QR refresh takes about 4.7 times as many flop, an exact
    one 9 times."""
    factor_bytes: int
    """Of the Kronecker factors that this process keeps."""
    installs: int
    """Eigenbases that came into use."""
    failed_refreshes: int
    """Eigenbases that could not be computed or were not orthogonal; the one in use was kept."""
    failures: Mapping[str, int]
    """The same by reason."""
    retried_refreshes: int
    """Eigenbases that failed in float32 and succeeded in float64."""
    worker_deaths: int
    """Worker threads that ended in the middle of a refresh, which another one then repeats."""
    in_flight: int
    """Refreshes that are launched and not installed."""
    staleness: Mapping[str, Mapping[int, int]]
    """For each block shape: age of the basis in use in steps -> updates that used it so.

    A basis computed after update t is of age 1 in update t + 1."""
    waits: int
    """Times that step() waited for a result at the staleness bound."""
    wait_s: float
    """Seconds of these waits."""
    update_s: float
    """Seconds of step() spent on moments, weights and factors."""
    refresh_s: float
    """Seconds of step() spent on refreshes that cannot wait: first, young and synchronous ones."""
    install_s: float
    """Seconds of step() spent on making new bases live."""
    worker_s: float
    """Seconds that worker threads spent on refreshes that were installed."""
    device_s: float
    """Seconds that devices spent, beside the training, on refreshes that were installed."""
    host_utilization: float
    """The same as a share of the workers' time since the first launch."""
    sustainable_period: int
    """Smallest precondition_frequency that the host could sustain, by what refreshes have cost so
    far; 0 as long as too little is known. The one in use stands in the parameter groups."""
    young_rounds: int
    """Steps whose refreshes were computed at once because the factors were young."""
    tier_bytes: Mapping[str, int]
    """Tier (``"device"``, ``"pinned"``, ``"nvme"``) -> bytes that state takes there now. Where the
    device computes in host memory, that is ``"device"``."""
    tier_peak_bytes: Mapping[str, int]
    """The most that it took so far, what flows through a step included."""
    traffic: Traffic
    """What steps have moved between the tiers."""
    network: Network
    """What other ranks and this one had to do with each other."""

    @property
    def visible_s(self) -> float:
        """Seconds that step() took in all; `update_s` includes waits for state to come."""
        return self.update_s + self.refresh_s + self.install_s + self.wait_s
