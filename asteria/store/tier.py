"""What a tier is: a place that keeps bytes and gives them back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asteria.errors import ConfigError

__all__ = ["Bytes", "Lease", "Slot", "Tier", "Transfer", "as_bytes"]

Bytes = NDArray[np.uint8]


class Transfer(Protocol):
    """A copy under way. Any thread."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""

    def wait(self) -> None:
        """Return when it is complete.

        Raises:
            StoreError: it failed; raised again at every call.
        """


class Slot(Protocol):
    """Bytes that a tier keeps, by the tier that made it. Any thread."""

    nbytes: int
    """What was put, without what the tier adds."""

    @property
    def done(self) -> bool:
        """Whether the write has ended, well or not."""

    def wait(self) -> None:
        """Return when the bytes are written; their source may change from then on.

        Raises:
            StoreError: the write failed; raised again at every call.
        """


class Tier(Protocol):
    """A place that keeps bytes. Any thread, any number at a time.

    A slot is never overwritten: it stays readable, and its content the same, until it is dropped.
    """

    name: str
    """As messages call it."""

    @property
    def used_bytes(self) -> int:
        """What the slots really take here, written or about to be."""

    @property
    def budget_bytes(self) -> int | None:
        """The most they may take; None if only the place itself is a limit."""

    def reserve(self, nbytes: int) -> None:
        """Make sure that slots of so many bytes in all can be put later. Waits for the disk.

        Raises:
            StoreFullError: budget or disk do not have them; nothing has changed.
        """

    def put(self, source: Tensor) -> Slot:
        """Start to write ``source``, (n,) uint8, contiguous, on the host; never waits for a disk.

        ``source`` must not change until the slot's ``wait`` has returned.

        Raises:
            StoreFullError: budget or free space do not suffice; nothing has changed.
            StoreError: the tier is closed, or belongs to another process.
            ConfigError: ``source`` is of another kind.
        """

    def get(self, slot: Slot, target: Tensor) -> Transfer:
        """Start to read a slot into ``target``, (slot.nbytes,) uint8, contiguous, on the host.

        If the slot is still being written, it is read after that. What arrives is verified; what
        is in ``target`` after a failure is undefined.

        Raises:
            StoreError: the tier is closed, or the slot dropped or of another tier.
            ConfigError: ``target`` is of another kind or size.
        """

    def drop(self, slot: Slot) -> None:
        """Forget a slot; what is under way with it ends well. Doing it twice changes nothing."""

    def give_up(self, slot: Slot) -> None:
        """Drop a slot with the next call; for where no lock may be taken, as in ``__del__``."""

    def close(self) -> None:
        """Wait for what is under way, then forget everything. Closing twice changes nothing."""


class Lease:
    """A slot that is kept as long as anybody holds this. Any thread."""

    def __init__(self, tier: Tier, slot: Slot) -> None:
        self.tier = tier
        self.slot = slot

    def __del__(self) -> None:
        # The garbage collector may call this in the middle of anything.
        self.tier.give_up(self.slot)


def as_bytes(tensor: Tensor, nbytes: int | None = None) -> Bytes:
    """The memory of ``tensor`` as an array, without a copy.

    Raises:
        ConfigError: it is not (n,) uint8, contiguous and on the host, or n is not ``nbytes``.
    """
    fits = nbytes is None or tensor.numel() == nbytes
    plain = tensor.dtype == torch.uint8 and tensor.device.type == "cpu"
    if not (fits and plain and tensor.dim() == 1 and tensor.is_contiguous()):
        size = "any number of" if nbytes is None else nbytes
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ConfigError(
            f"a tier moves {size} bytes in one contiguous dimension, torch.uint8 on the host; "
            f"found {found}, strides {tensor.stride()}: pass tensor.view(-1).view(torch.uint8)"
        )
    array: Bytes = tensor.detach().numpy()
    return array
