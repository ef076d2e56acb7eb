"""Who has not come to a meeting is known by name."""

from pathlib import Path

import torch.distributed as dist

from asteria.distributed.attendance import attend
from tests.support.processes import gather

RANKS = [0, 1, 2]


def meet(rank: int) -> list[list[int]]:
    """Rank 1 comes late to the first meeting, and nobody but rank 0 to the second."""
    found = []
    if rank != 1:
        absent = attend(RANKS, "a test")
    dist.barrier()
    if rank != 1:
        found.append(absent())
    dist.barrier()
    if rank == 1:
        absent = attend(RANKS, "a test")
    dist.barrier()
    found.append(absent())
    if rank == 0:
        found.append(attend(RANKS, "a test")())
    dist.barrier()
    return found


def test_who_is_missing_is_named(tmp_path: Path) -> None:
    first, second, third = gather(3, tmp_path / "store", meet)
    assert first == [[1], [], [1, 2]]
    assert second == [[]]
    assert third == [[1], []]
