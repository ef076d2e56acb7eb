"""State that was shown and not read yet, and what becomes of it when the state changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asteria.errors import StoreFullError
from asteria.runtime.halves import UnpackedSource
from asteria.store.distant import Distant, Source, Values
from asteria.store.layout import Layout
from asteria.store.sources import FieldSource, SlotReads
from asteria.store.tier import Lease

__all__ = ["Promises", "Tenancy"]


class Tenancy:
    """Of the tiers; with the last reference to it they can be closed."""


class Promises:
    """Makes the distant tensors of one optimizer, and knows those that somebody still has.

    Each has the values of the moment it was made, whatever the optimizer does later. What is in a
    slot stays there, because slots are not overwritten; what is elsewhere is read from the live
    state, and brought to memory before that changes. For the training thread, but for reading.
    """

    def __init__(self) -> None:
        self._tenancy: weakref.ref[Tenancy] | None = None
        self._reads = SlotReads()
        self._known: weakref.WeakSet[Values] = weakref.WeakSet()
        self._lock = threading.Lock()
        """Guards what is known: other threads make copies."""

    def tenancy(self) -> Tenancy:
        """What is alive as long as its owner, or anybody who may still read from a tier."""
        tenancy = Tenancy()
        self._tenancy = weakref.ref(tenancy)
        return tenancy

    def field(self, lease: Lease, layout: Layout, name: str, start: int, stop: int) -> Source:
        """The blocks ``start`` to ``stop`` of a field, from a slot."""
        return FieldSource(self._reads, lease, layout, name, start, stop)

    def stored(self, source: Source, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in host memory of what lasts by itself."""
        tenancy = None if self._tenancy is None else self._tenancy()
        return Distant(Values(source, shape, dtype, tell=self._tell, keeps=tenancy))

    def borrowed(
        self,
        read: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        halves: bool = False,
    ) -> Tensor:
        """A tensor of what ``read`` makes of the live state, which may be ``halves`` of it."""
        live = _Live(read)
        source = UnpackedSource(live, shape) if halves else live
        return Distant(Values(source, shape, dtype, device, tell=self._tell))

    def keep(self) -> None:
        """The live state is about to change; raises StoreError if it cannot be read."""
        self._reads.forget()
        for values in self._all() if self._known else ():
            source = values.source
            if source is None or source.lasts:
                continue
            if isinstance(source, UnpackedSource):
                values.exchange(source, source.kept())
            else:
                values.hold()

    def give_way(self) -> bool:
        """Bring what is in slots to memory, so that tiers have room; whether there was anything."""
        found = [values for values in self._all() if _is_elsewhere(values.source)]
        for values in found:
            values.hold()
        self._reads.forget()
        return bool(found)

    def with_room(self, work: Callable[[], None]) -> None:
        """Do ``work``, a second time if state dicts that somebody has took the room for it."""
        try:
            work()
        except StoreFullError:
            if not self.give_way():
                raise
            work()

    def _tell(self, values: Values) -> None:
        with self._lock:
            self._known.add(values)

    def _all(self) -> list[Values]:
        with self._lock:
            return list(self._known)


def _is_elsewhere(source: Source | None) -> bool:
    in_memory = isinstance(source, UnpackedSource) and source.is_in_memory
    return source is not None and not in_memory


class _Live:
    """What an optimizer has now; one thread at a time."""

    lasts = False
    _lock = threading.Lock()

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def read(self) -> Tensor:
        """See `Source`."""
        with self._lock:
            return self._read()

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`."""
        return None
