"""The checksum finds what goes wrong with disks."""

import numpy as np
import pytest

from asteria.store.checksum import checksum
from tests.store.places import SIZES, noise


def content(nbytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return noise(nbytes).numpy().copy()


@pytest.mark.parametrize("nbytes", SIZES)
def test_it_depends_on_the_content_and_nothing_else(nbytes: int) -> None:
    data = content(nbytes)
    shifted = np.empty(nbytes + 1, np.uint8)[1:]
    shifted[:] = data
    assert checksum(data) == checksum(shifted)
    assert len(checksum(data)) == 16


@pytest.mark.parametrize("nbytes", [1, 511, 512, 1500])
def test_every_flipped_bit_is_found(nbytes: int) -> None:
    data = content(nbytes)
    right = checksum(data)
    for place in range(nbytes):
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert checksum(data) != right
            data[place] ^= 1 << bit
    assert checksum(data) == right


def test_lost_moved_and_repeated_sectors_are_found() -> None:
    data = content(8 * 512)
    sectors = data.reshape(8, 512)
    lost, swapped, repeated = data.copy(), sectors.copy(), sectors.copy()
    lost[1024:1536] = 0
    swapped[[2, 5]] = swapped[[5, 2]]
    repeated[3] = repeated[4]
    arrays = [data, lost, swapped.reshape(-1), repeated.reshape(-1), data[:-512]]
    assert len({checksum(array) for array in arrays}) == len(arrays)


def test_the_length_counts() -> None:
    assert len({checksum(np.zeros(n, np.uint8)) for n in (0, 1, 511, 512, 513, 1024)}) == 6
