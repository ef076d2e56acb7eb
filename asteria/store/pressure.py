"""How much memory and disk is free just now."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

__all__ = [
    "device_free_bytes",
    "host_free_bytes",
    "host_total_bytes",
    "reserve_bytes",
    "shares_host_memory",
]

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""What the kernel takes back from a container before it kills anybody."""
_RESERVE_SHARE = 0.05


def host_free_bytes() -> int:
    """Host memory that can be had without swapping, within the limit of the container."""
    free = int(psutil.virtual_memory().available)
    for limit, usage in _LIMITS:
        most, used = _number(_CGROUP / limit), _number(_CGROUP / usage)
        if most is not None and used is not None:
            free = min(free, max(0, most - used + _reclaimable()))
    return free


def host_total_bytes() -> int:
    """Host memory there is, within the limit of the container."""
    limits = [_number(_CGROUP / limit) for limit, _ in _LIMITS]
    return min([int(psutil.virtual_memory().total), *(most for most in limits if most is not None)])


def device_free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that torch could still take, or has taken and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + unused
    return host_free_bytes()


def reserve_bytes(device: torch.device | None = None) -> int:
    """What is to stay free: a twentieth of the memory of the host, or of a device."""
    if device is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = host_total_bytes()
    return int(total * _RESERVE_SHARE)


def shares_host_memory(device: torch.device) -> bool:
    """Whether the device computes in the memory of the host (CPU, Apple, GB10 and the like)."""
    if device.type == "cuda":
        return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    return device.type in ("cpu", "mps")


def _reclaimable() -> int:
    """Bytes of the container's usage that are page cache, which gives way."""
    for name in ("memory.stat", "memory/memory.stat"):
        try:
            lines = (_CGROUP / name).read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue
        return sum(int(line.split()[1]) for line in lines if line.split()[0] in _RECLAIMABLE)
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
