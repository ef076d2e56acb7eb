"""Memory of exact size, counted to the byte, handed out and taken back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from asteria.errors import StoreFullError

__all__ = ["Buffers", "device_memory", "host_memory", "pinned_memory", "trim_heap"]

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_LEAST_MAPPING_BYTES = 1024**2
"""What is smaller comes from the allocator of torch, which packs it."""
_HUGE_PAGE_BYTES = 2 * 1024**2
"""On x86; where pages are larger, none is inside of what is advised, and nothing happens."""


def host_memory(nbytes: int) -> Tensor:
    """Host memory, (nbytes,) uint8, that goes back to the system as soon as it is dropped.

    The C library keeps blocks of up to 32 MB that a program frees, so that a process with a small
    budget would grow far beyond it; a mapping of its own is gone at once. It begins with huge pages
    where the system has them: products and updates then wait less for addresses.
    """
    if nbytes < _LEAST_MAPPING_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    try:
        mapping = _mapping(nbytes + _HUGE_PAGE_BYTES)  # what nobody writes to takes no memory
    except OSError as error:
        raise StoreFullError(
            f"{nbytes} bytes of host memory were asked for, the system has none left ({error}): "
            "set RuntimeConfig.host_budget below what is free, and nvme_path for the rest"
        ) from error
    begin = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE_PAGE_BYTES
    huge_bytes = nbytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if huge_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them is as good as it was
            mapping.madvise(mmap.MADV_HUGEPAGE, begin, huge_bytes)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=begin)


def _mapping(nbytes: int) -> mmap.mmap:
    """Anonymous memory that a forked child does not write to."""
    private = getattr(mmap, "MAP_PRIVATE", None)
    if private is None:  # Windows, where nothing is forked
        return mmap.mmap(-1, nbytes)
    return mmap.mmap(-1, nbytes, flags=private | mmap.MAP_ANONYMOUS)


def pinned_memory(nbytes: int) -> Tensor:
    """Page-locked host memory of exactly that size, (nbytes,) uint8.

    torch's own allocator of pinned memory rounds every block up to a power of two; the driver can
    lock any mapping, which costs what it holds. Raises StoreFullError if the system refuses.
    """
    if not torch.accelerator.is_available() or nbytes == 0:
        return host_memory(nbytes)  # there is nothing to pin it for
    if not torch.cuda.is_available():
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    mapping = _mapping(nbytes)
    if hasattr(mmap, "MADV_DONTFORK"):
        # A forked child that shares the pages would make the host's next write go to other ones
        # than those that the device knows.
        mapping.madvise(mmap.MADV_DONTFORK)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = tensor.data_ptr()
    status = int(driver.cudaHostRegister(address, nbytes, 0))
    if status != 0:
        _forget_error()
        raise StoreFullError(
            f"{nbytes} bytes of page-locked host memory were asked for, the driver refused (error "
            f"{status}): raise the limit of locked memory (ulimit -l), or set "
            "RuntimeConfig.host_budget below it"
        )
    # The mapping must outlive the registration, so the finalizer holds it until then.
    storage = tensor.untyped_storage()
    weakref.finalize(storage, _unlock, driver, address, mapping)
    return tensor


def _forget_error() -> None:
    """Let no later operation be taken for the one that has failed: CUDA keeps its latest error.

    The next launch of a kernel finds it, and it is gone.
    """
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unlock(driver: object, address: int, mapping: mmap.mmap) -> None:
    driver.cudaHostUnregister(address)  # type: ignore[attr-defined]
    del mapping


def device_memory(device: torch.device) -> Callable[[int], Tensor]:
    """Where to get memory of an accelerator from."""

    def allocate(nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise StoreFullError(
                f"{nbytes} bytes of optimizer state were to be kept on {device}, which has no room "
                "left: set RuntimeConfig.device_budget below what is free; the rest goes to the "
                "host"
            ) from error

    return allocate


def trim_heap() -> None:
    """Give memory that the process has freed back to the system, where its C library can do that.

    glibc keeps freed blocks of up to 32 MB, and splits them when it aligns new ones, so that
    temporary tensors of a few megabytes let a process grow by hundreds. A few milliseconds. Any
    thread.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


class Buffers:
    """Memory of one tier under a budget. For the training thread.

    What is given back is kept for the next request of the same size, and freed when another size
    needs the room: streaming takes the same few sizes over and over.
    """

    def __init__(self, allocate: Callable[[int], Tensor], budget_bytes: int | None = None) -> None:
        """``allocate(nbytes)`` makes (nbytes,) uint8; ``budget_bytes`` None is no limit."""
        self._allocate = allocate
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        """Handed out, and kept for the next request."""
        self.peak_bytes = 0
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 of any content, whatever the budget says: ask `has_room` before."""
        for place, buffer in enumerate(self._free):
            if buffer.numel() == nbytes:
                return self._free.pop(place)
        self._shrink(nbytes)
        buffer = self._allocate(nbytes)
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return buffer

    def has_room(self, nbytes: int) -> bool:
        """Whether so much can be taken within the budget."""
        if self.budget_bytes is None:
            return True
        kept = sum(buffer.numel() for buffer in self._free)
        return self.used_bytes - kept + nbytes <= self.budget_bytes

    def give(self, buffer: Tensor) -> None:
        """Take back what `take` has handed out; nobody uses it any more."""
        self._free.append(buffer)
        self._shrink(0)

    def drop(self, nbytes: int) -> None:
        """Memory of this size was handed out and is dropped by its user; it is nobody's now."""
        self.used_bytes -= nbytes

    def trim(self) -> None:
        """Free what is kept for later requests."""
        for buffer in self._free:
            self.used_bytes -= buffer.numel()
        self._free.clear()

    def _shrink(self, nbytes: int) -> None:
        """Free kept memory, oldest first, until so much more fits into the budget."""
        while (
            self._free
            and self.budget_bytes is not None
            and self.used_bytes + nbytes > self.budget_bytes
        ):
            self.used_bytes -= self._free.pop(0).numel()
