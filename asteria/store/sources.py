"""Where the values of distant tensors are: in slots of a tier, together, or nowhere as zeros."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from asteria.store.buffers import host_memory
from asteria.store.distant import Source
from asteria.store.layout import Layout
from asteria.store.tier import Lease

__all__ = ["FieldSource", "JoinedSource", "SlotReads", "SlotSource", "ZeroSource"]

_RECENT_BYTES = 64 * 1024**2
"""About what the neighbours of a field have in all, whose turn comes next."""
_LEAST_SLOT_BYTES = 1024**2
"""What is smaller is not worth a file."""


class SlotReads:
    """Reads whole slots, as their checksums are, and keeps the latest for the next field.

    Any thread.
    """

    def __init__(self) -> None:
        self._recent: dict[Lease, Tensor] = {}
        """Oldest first."""
        self._lock = threading.Lock()

    def read(self, lease: Lease) -> Tensor:
        """What the slot holds, (nbytes,) uint8 in host memory, to look at; waits for the disk.

        Raises StoreCorruptError if it is not what was written, or StoreError.
        """
        with self._lock:
            memory = self._recent.pop(lease, None)
            if memory is None:
                nbytes = lease.slot.nbytes
                while self._recent and nbytes + self._kept_bytes() > _RECENT_BYTES:
                    del self._recent[next(iter(self._recent))]
                memory = host_memory(nbytes)
                lease.tier.get(lease.slot, memory).wait()
            self._recent[lease] = memory
            return memory

    def forget(self) -> None:
        """Give up the memory of the latest slots."""
        with self._lock:
            self._recent.clear()

    def _kept_bytes(self) -> int:
        return sum(memory.numel() for memory in self._recent.values())


class FieldSource:
    """The blocks ``start`` to ``stop`` of a field of a cell that was written to a slot."""

    lasts = True

    def __init__(
        self, reads: SlotReads, lease: Lease, layout: Layout, name: str, start: int, stop: int
    ) -> None:
        self._reads = reads
        self._lease = lease
        self._layout = layout
        self._name = name
        self._blocks = slice(start, stop)

    def read(self) -> Tensor:
        """See `Source`."""
        field = self._layout.views(self._reads.read(self._lease))[self._name][self._blocks]
        # In memory of its own: who saves a view saves all that it is a view of.
        memory = host_memory(field.nbytes).view(field.dtype)
        if not field.is_contiguous():  # column after column
            return memory.view(field.mT.shape).copy_(field.mT).mT
        return memory.view(field.shape).copy_(field)

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`: a slot of its own, on the same tier."""
        return SlotSource.of(value, self._lease)


class SlotSource:
    """A tensor that has a slot for itself."""

    lasts = True

    def __init__(self, lease: Lease, shape: Sequence[int], dtype: torch.dtype) -> None:
        """The slot holds it row-major."""
        self._lease = lease
        self._shape, self._dtype = shape, dtype

    @classmethod
    def of(cls, value: Tensor, beside: Lease) -> SlotSource | None:
        """``value`` on the tier of ``beside``, written; None if it is too small for that.

        Raises StoreError if it cannot be written.
        """
        if value.nbytes < _LEAST_SLOT_BYTES:
            return None
        memory = host_memory(value.nbytes)
        memory.view(value.dtype).view(value.shape).copy_(value)
        lease = Lease(beside.tier, beside.tier.put(memory))
        lease.slot.wait()
        return cls(lease, value.shape, value.dtype)

    def read(self) -> Tensor:
        """See `Source`."""
        memory = host_memory(self._lease.slot.nbytes)
        self._lease.tier.get(self._lease.slot, memory).wait()
        return memory.view(self._dtype).view(self._shape)

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`."""
        return SlotSource.of(value, self._lease)


class JoinedSource:
    """Parts one after the other, as another shape."""

    lasts = True

    def __init__(self, parts: Sequence[Source], shape: Sequence[int]) -> None:
        self._parts = tuple(parts)
        self._shape = tuple(shape)

    def read(self) -> Tensor:
        """See `Source`."""
        if len(self._parts) == 1:
            return self._parts[0].read().reshape(self._shape)
        return torch.cat([part.read() for part in self._parts]).reshape(self._shape)

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`: where the first part is that is not in memory."""
        found = (part.replaced(value) for part in self._parts)
        return next((source for source in found if source is not None), None)


class ZeroSource:
    """Zeros, which take no room, in files neither."""

    lasts = True

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._shape = tuple(shape)
        self._dtype = dtype

    def read(self) -> Tensor:
        """See `Source`."""
        if math.prod(self._shape) <= 1:  # where strides of 0 would only confuse
            return torch.zeros(self._shape, dtype=self._dtype, device="cpu")
        return torch.zeros((), dtype=self._dtype, device="cpu").expand(self._shape)

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`."""
        return None
