"""Who has come to a meeting of ranks, told through the store of the default group.

What torch.distributed says when a rank does not come to make a group names nobody.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    digest = hashlib.blake2s(repr(tuple(ranks)).encode(), digest_size=8).hexdigest()
    name = f"asteria/{what}/{digest}"
    counts[name] += 1
    name = f"{name}/{counts[name]}"
    store: Any = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):  # whoever makes the group finds out, too
        store.set(f"{name}/{dist.get_rank()}", "here")

    def absent() -> list[int]:
        """Of ``ranks``, so far."""
        try:
            return [rank for rank in ranks if not store.check([f"{name}/{rank}"])]
        except RuntimeError:
            return []

    return absent
