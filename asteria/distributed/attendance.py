"""Who has come to a meeting of ranks, told through the store of the default group.

What torch.distributed says when a rank does not come to make a group names nobody.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["attend"]

_MEETINGS: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()
"""How many this process has come to, by the default group they were in, and then by their name."""


def attend(ranks: Sequence[int], what: str) -> Callable[[], list[int]]:
    """Say that this rank comes to the next meeting of ``ranks`` for ``what``.

    They are those of the default group. Returns who tells which of them have not come so far; none
    where nobody can tell, because the store has gone with its process. All ranks come to the same
    meetings in the same order. For the training thread.
    """
    counts = _MEETINGS.setdefault(dist.group.WORLD, Counter())
    name = f"asteria/{what}/{'-'.join(map(str, ranks))}"
    counts[name] += 1
    name = f"{name}/{counts[name]}"
    store: Any = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{dist.get_rank()}", "here")

    def absent() -> list[int]:
        try:
            return [rank for rank in ranks if not store.check([f"{name}/{rank}"])]
        except (RuntimeError, ValueError):
            return []

    return absent
