"""Process groups of our own for the ranks of a mesh, and what these decide together."""

from __future__ import annotations

import datetime
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asteria.distributed.attendance import attend
from asteria.distributed.groups import node_labels, timeout_of
from asteria.distributed.roll_call import call, patience_s
from asteria.distributed.sharded_exchange import Exchange
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError

__all__ = ["ShardGroup", "group_of"]

_HOST = "gloo"


_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], ShardGroup]]
_KNOWN = weakref.WeakKeyDictionary()
"""By the default group that they are in."""


class ShardGroup:
    """The ranks of one mesh. For the training thread; all its ranks call the same in one order.

    ``ranks`` are those of the default group, ``here`` is this one's position among them, and
    ``topology`` has their positions by node.

    On groups of its own, so that nothing comes between the messages of a model. Decisions go
    through the memory of the host, where they are read without waiting for a device.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        """``ranks`` of the default group, ascending, whose timeout bounds every wait.

        Raises CoherenceError if they do not all come. See `group_of`.
        """
        self.ranks = tuple(ranks)
        self._told = functools.partial(_together, self.ranks)
        timeout = datetime.timedelta(seconds=patience_s(timeout_of(dist.group.WORLD)))
        given: dict[str, Any] = {"timeout": timeout, "use_local_synchronization": True}
        absent = attend(self.ranks, "shards")
        with _together(self.ranks, "meeting for the first time", absent):
            self._data: Any = dist.new_group(list(ranks), **given)
            self._host = self._data
            if _HOST not in str(dist.get_backend_config(self._data)):
                self._host = dist.new_group(list(ranks), backend=_HOST, **given)
            self.topology = Topology.of(node_labels(self._host))
        self.here = self.ranks.index(dist.get_rank())
        self.exchange = Exchange(
            self._data, self._host, self._told, size=len(self.ranks), here=self.here
        )

    def agree_on_gradients(
        self, present: Mapping[int, str], bad: Collection[int], parameters: int
    ) -> list[int]:
        """Numbers of the parameters whose gradient is bad on any rank, ascending.

        All numbers are below ``parameters``, and ``present`` has those with a gradient, and what
        they are called. Raises CoherenceError if these are not the same on all ranks, for they step
        them together.
        """
        table = torch.zeros((3, parameters), dtype=torch.uint8, device="cpu")
        table[0, list(present)] = 1
        table[1] = 1 - table[0]
        table[2, list(bad)] = 1
        with self._told("a decision on this step's gradients"):
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._host)
        torn = (table[0] & table[1]).nonzero().flatten().tolist()
        if torn:
            names = [present.get(number, f"parameter {number}") for number in torn[:5]]
            raise CoherenceError(
                f"{', '.join(names)}: has a gradient on some of the ranks {_shown(self.ranks)} and "
                "none on others, but sharded parameters are stepped by all ranks together. Let "
                "every rank's loss reach the same parameters; nothing was changed"
            )
        return [int(number) for number in table[2].nonzero().flatten()]

    def reduce_flags_(self, flags: Tensor) -> None:
        """Make ``flags`` (bool), of the same gradients on every rank, false where any is.

        On the device; the host does not wait.
        """
        counts = flags.to(torch.int32)
        with self._told("a decision on this step's gradients"):
            dist.all_reduce(counts, dist.ReduceOp.MIN, group=self._data)
        flags.copy_(counts)

    def failed_ranks(self, *, failed: bool) -> list[int]:
        """Which ranks have failed in their part of the step, as every one of them tells."""
        table = torch.zeros(len(self.ranks), dtype=torch.uint8, device="cpu")
        table[self.here] = failed
        with self._told("the end of the step"):
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._host)
        return [self.ranks[int(position)] for position in table.nonzero().flatten()]

    def tell(self, numbers: Sequence[int], source: int, *, most: int) -> list[int]:
        """What the rank at position ``source`` gives, at most so many numbers."""
        table = torch.zeros(most + 1, dtype=torch.int64, device="cpu")
        if self.here == source:
            table[: len(numbers) + 1] = torch.tensor([len(numbers), *numbers])
        with self._told("the size of a state tensor"):
            dist.broadcast(table, self.ranks[source], group=self._host)
        count, *values = map(int, table.tolist())
        return values[:count]


def group_of(ranks: tuple[int, ...]) -> ShardGroup:
    """The group of these ranks of the default group, ascending; all of them ask together.

    One for all optimizers, and as long as the default group: connections belong to the process.
    Raises as `ShardGroup`.
    """
    if not dist.is_initialized():
        raise CoherenceError(
            f"ranks {_shown(ranks)} share parameters and were to do something together, but the "
            "default process group is gone; step, save and load before "
            "torch.distributed.destroy_process_group()"
        )
    known = _KNOWN.setdefault(dist.group.WORLD, {})
    if ranks not in known:
        known[ranks] = ShardGroup(ranks)
    return known[ranks]


@contextmanager
def _together(
    ranks: Sequence[int], what: str, absent: Callable[[], list[int]] = list
) -> Iterator[None]:
    """Turn what torch.distributed raises into an error that says ``what`` was under way.

    And which of ``ranks`` are not there, if anybody can be asked, or knows who is ``absent``.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        missing = dict.fromkeys(absent(), "has not come") or call(ranks)
        who = "; ".join(f"rank {rank} {why}" for rank, why in (missing or {}).items())
        if missing is None:
            who = "which of them is missing could not be found out"
        elif not missing:
            who = "all of them answer, so one is late, or does something else"
        raise CoherenceError(
            f"{what} could not be done together by ranks {_shown(ranks)}, which share parameters: "
            f"{who}. Find out why, and restart all of them from a checkpoint (torch.distributed: "
            f"{error})"
        ) from error


def _shown(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
