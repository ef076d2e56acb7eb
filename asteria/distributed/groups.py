"""The processes that train the same parameters, and a group of our own among them.

What travels between ranks for us has a group of its own, so that it neither waits for nor delays
what the training sends. The group is gloo's: what travels has been computed on the host, and a
thread that waits for it there occupies no accelerator.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asteria.distributed.attendance import attend
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError, ConfigError

__all__ = ["Assembly", "assemble", "node_labels", "peer_group", "timeout_of"]

_DIGEST_BYTES = 16


@dataclass(slots=True)
class _Own:
    """Our group among the ranks of one group of the user's, for all optimizers."""

    group: dist.ProcessGroup
    channels: int = 0
    """Optimizers that have used it."""


_OWN: weakref.WeakKeyDictionary[dist.ProcessGroup, _Own] = weakref.WeakKeyDictionary()
"""By the user's group. Connections belong to the process: a group for each optimizer would be a
mesh of sockets each, and groups of the same ranks must not be made and destroyed in turns, because
the store still has the addresses of the last one."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """A group of our own whose members have been found to train the same."""

    group: dist.ProcessGroup
    topology: Topology
    channel: int
    """Tells optimizers that share the group apart; the same on all ranks."""
    timeout_s: float
    """That of the user's group."""
    rank: int
    """Of this process in the group, from 0."""
    global_ranks: tuple[int, ...]
    """Of all ranks of the group, in the default group: as the user knows them."""


def peer_group(asked: object) -> dist.ProcessGroup | None:
    """The group of processes that train the same parameters; None if this one is alone.

    ``asked`` is `RuntimeConfig.process_group`. Raises ConfigError for a group without this process.
    """
    if asked == "alone" or not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = dist.group.WORLD if asked is None else asked
    if dist.get_rank(group) < 0:
        raise ConfigError(
            f"RuntimeConfig.process_group was asked for, found rank {dist.get_rank()}, which is no "
            'member of it; give this rank its own group, or "alone"'
        )
    return group if dist.get_world_size(group) > 1 else None


def assemble(
    group: dist.ProcessGroup, credentials: Mapping[str, str], *, node_size: int | None = None
) -> Assembly:
    """Meet the other ranks of ``group``; all of them call it, in the same order of optimizers.

    ``credentials`` says, by name, what all of them must have in common. Raises ConfigError where
    they have not, and CoherenceError if a rank does not come within the group's timeout.
    """
    timeout_s, begin_s = timeout_of(group), time.monotonic()
    absent = attend(dist.get_process_group_ranks(group), "optimizers")
    try:
        own = _own_group(group, timeout_s)
        channel, own.channels = own.channels, own.channels + 1
        common = {**credentials, "number of optimizers before this one": str(channel)}
        cards = _exchange(own.group, [_node_label(), *common.values()])
    except RuntimeError as error:
        names = ", ".join(map(str, dist.get_process_group_ranks(group)))
        missing = ", ".join(map(str, absent()))
        raise CoherenceError(
            f"the optimizers of ranks {names} were to meet at their first step, and "
            f"{f'rank {missing}' if missing else 'one'} was missing after "
            f"{time.monotonic() - begin_s:.1f} s: {error}. All ranks of a group step, load and "
            "save together; for a model of this rank alone give "
            'RuntimeConfig(process_group="alone")'
        ) from error
    ranks = tuple(dist.get_process_group_ranks(own.group))
    rank = dist.get_rank(own.group)
    for place, what in enumerate(common, start=1):
        others = [ranks[r] for r, card in enumerate(cards) if card[place] != cards[rank][place]]
        if others:
            raise ConfigError(
                f"the ranks of a group must have the same {what}, found others on rank "
                f"{', '.join(map(str, others))} than on rank {ranks[rank]}. Give each model a "
                'group of its own: RuntimeConfig(process_group=...), or "alone"'
            )
    if node_size is None:
        topology = Topology.of([card[0] for card in cards])
    else:
        topology = Topology.even(len(cards), node_size)
    return Assembly(own.group, topology, channel, timeout_s, rank, ranks)


def _own_group(group: dist.ProcessGroup, timeout_s: float) -> _Own:
    own = _OWN.get(group)
    if own is None:
        # Named by its ranks and not by a count, for other ranks may have made other groups.
        made: Any = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=timedelta(seconds=timeout_s),
            backend="gloo",
            use_local_synchronization=True,
        )
        own = _OWN[group] = _Own(made)
    return own


def timeout_of(group: Any) -> float:
    """The timeout that the user gave to the group."""
    found = []
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            found.append(timeout)
    return max(found, default=dist.constants.default_pg_timeout).total_seconds()


def node_labels(group: Any) -> list[bytes]:
    """For each rank of ``group``, which all ask together, a label of its node."""
    return [label for (label,) in _exchange(group, [_node_label()])]


def _node_label() -> str:
    """The same for all processes of a node, as far as the launcher or the machine tells."""
    return os.environ.get("GROUP_RANK") or socket.gethostname()


def _exchange(group: dist.ProcessGroup, texts: list[str]) -> list[list[bytes]]:
    """Digests of these texts of every rank, in order of the ranks."""
    digests = [hashlib.blake2b(t.encode(), digest_size=_DIGEST_BYTES).digest() for t in texts]
    mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
    cards = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(cards, mine, group=group)
    step = range(0, len(mine), _DIGEST_BYTES)
    return [[bytes(card[at : at + _DIGEST_BYTES].tolist()) for at in step] for card in cards]
