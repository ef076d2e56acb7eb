"""What tests of tiers share."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asteria.store.array_files import ArrayFiles
from asteria.store.nvme import NvmeSlot, NvmeTier
from asteria.store.tier import Bytes, Slot, Tier

SIZES = [0, 1, 511, 512, 4095, 4096, 4097, 100_003]
PAGE = 4096


def noise(nbytes: int, seed: int = 0) -> Tensor:
    """Bytes that no two seeds share."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def read(tier: Tier, slot: Slot) -> Tensor:
    """A slot's content, in memory that held something else."""
    target = torch.full((slot.nbytes,), 7, dtype=torch.uint8)
    tier.get(slot, target).wait()
    return target


def file_of(tier: NvmeTier, slot: NvmeSlot) -> Path:
    """Where a slot that is written lies."""
    return tier.path / str(slot.number)


class HeldFiles(ArrayFiles):
    """Files whose writes and reads wait until they are let go."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(folder, threads)
        self.writing, self.may_write = threading.Event(), threading.Event()
        self.reading, self.may_read = threading.Event(), threading.Event()

    def write(self, number: int, source: Bytes) -> None:
        self.writing.set()
        assert self.may_write.wait(20)
        super().write(number, source)

    def read(self, number: int, target: Bytes) -> None:
        self.reading.set()
        assert self.may_read.wait(20)
        super().read(number, target)


class HeldTier(NvmeTier):
    """A tier whose disk does nothing until it is told to."""

    files: HeldFiles

    def _open_files(self) -> ArrayFiles:
        self.files = HeldFiles(self.path, 4)
        return self.files

    def let_go(self) -> None:
        self.files.may_write.set()
        self.files.may_read.set()


@contextmanager
def mounted(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of so many bytes; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def start_python(program: str, *arguments: str) -> "subprocess.Popen[str]":
    """Another process, that talks over its standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
