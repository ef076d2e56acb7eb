"""How much memory is free, on a plain machine and in a container."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from asteria.store import pressure

GIB = 1024**3


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    memory = SimpleNamespace(total=1024 * GIB, available=900 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(pressure, "_CGROUP", tmp_path)
    return tmp_path


def contain(folder: Path, limit: str, used_bytes: int, **stat: int) -> None:
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used_bytes))
    lines = [f"{name} {value}\n" for name, value in stat.items()]
    (folder / "memory.stat").write_text("".join(lines))


def test_without_a_container_it_is_the_machine(cgroup: Path) -> None:
    assert pressure.host_free_bytes() == 900 * GIB
    assert pressure.host_total_bytes() == 1024 * GIB
    assert pressure.reserve_bytes() == int(0.05 * 1024 * GIB)


def test_a_container_without_a_limit_is_the_machine(cgroup: Path) -> None:
    contain(cgroup, "max", 3 * GIB)
    assert pressure.host_free_bytes() == 900 * GIB
    assert pressure.host_total_bytes() == 1024 * GIB


def test_the_limit_of_a_container_decides(cgroup: Path) -> None:
    contain(cgroup, str(8 * GIB), 3 * GIB)
    assert pressure.host_free_bytes() == 5 * GIB
    assert pressure.host_total_bytes() == 8 * GIB
    assert pressure.reserve_bytes() == int(0.05 * 8 * GIB)
    assert pressure.device_free_bytes(torch.device("cpu")) == 5 * GIB


def test_what_the_kernel_takes_back_is_free(cgroup: Path) -> None:
    contain(
        cgroup,
        str(8 * GIB),
        8 * GIB,
        anon=4 * GIB,
        inactive_file=GIB,
        active_file=2 * GIB,
        slab_reclaimable=GIB,
        file=3 * GIB,
    )
    assert pressure.host_free_bytes() == 4 * GIB
