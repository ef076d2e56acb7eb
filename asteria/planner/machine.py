"""What a plan needs to know of a machine, and the file that keeps what was measured of it."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asteria.errors import ConfigError
from asteria.linalg.method import Method
from asteria.refresh.costs import HOST_LDLR_SHARE, HOST_S, Timings, interpolated
from asteria.refresh.threads import free_cores
from asteria.store.pressure import (
    device_free_bytes,
    host_free_bytes,
    reserve_bytes,
    shares_host_memory,
)

__all__ = [
    "Machine",
    "default_path",
    "find_machine",
    "load_machine",
    "local_machine",
    "save_machine",
]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Memory, links, cores and speed of one machine. The rates are those of a modest one."""

    device_bytes: int | None = None
    """What the state may take of an accelerator's memory: what is free beside weights, gradients
    and activations. None where there is no accelerator or it computes in the host's memory."""
    host_bytes: int | None = None
    """Likewise of the host's memory; None is not known, and then no limit."""
    nvme_bytes: int | None = None
    """Likewise free on the disk of the NVMe tier."""
    cores: int = 2
    """Logical cores that the process may keep busy."""
    training_threads: int | None = None
    """Cores of them that training keeps busy; None is 2 with an accelerator, else all."""
    link_bytes_per_s: float = 20e9
    """Between host and accelerator, each way; PCIe 4.0 with 16 lanes has 25e9."""
    disk_read_bytes_per_s: float = 2.5e9
    disk_write_bytes_per_s: float = 1.2e9
    host_copy_bytes_per_s: float = 5e9
    refresh_s: Timings = HOST_S
    """Of one warm-started orthogonal iteration in float32 on ``math_threads``."""
    exact_s: Timings = ((256, 0.0095), (512, 0.034), (1024, 0.23))
    """Of one exact eigenbasis, in float64."""
    math_threads: int = 1
    """Threads that the seconds above were measured with."""
    source: str = "default rates, not measured"
    """Where the rates are from."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            problem = _problem(field.name, getattr(self, field.name))
            if problem:
                raise ConfigError(
                    f"Machine.{field.name} must be {problem}, found {getattr(self, field.name)!r}"
                )

    @property
    def shares_memory(self) -> bool:
        """Whether the state is computed with in the memory of the host."""
        return self.device_bytes is None

    @property
    def free_cores(self) -> int:
        """Cores that training leaves over, at least one: the threads that refresh by default."""
        training = self.training_threads
        if training is None:
            training = self.cores if self.shares_memory else 2
        return max(1, self.cores - training)

    def seconds(self, size: int, threads: int, *, method: Method) -> float:
        """Of refreshing one factor (size, size) on so many math threads.

        Between two measured sizes on a straight line of logarithms, beyond them by the cube; the
        work is taken to divide evenly among threads.
        """
        known = self.exact_s if method == "eigh" else self.refresh_s
        share = HOST_LDLR_SHARE if method == "ldlr" else 1.0
        return share * interpolated(known, size) * self.math_threads / threads


def _problem(name: str, value: object) -> str | None:
    """What a field must be, if this is not it."""
    count = isinstance(value, int) and not isinstance(value, bool)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if name == "source":
        return None if isinstance(value, str) else "a text"
    if name.endswith("_per_s"):
        return None if number and 0 < value < math.inf else "a number > 0"  # type: ignore[operator]
    if name.endswith("_bytes"):
        return None if value is None or (count and value >= 0) else "None or an int >= 0"  # type: ignore[operator]
    if name in ("refresh_s", "exact_s"):
        return None if _are_timings(value) else "(size, seconds) pairs of increasing sizes, above 0"
    least = 0 if name == "training_threads" else 1
    optional = name == "training_threads" and value is None
    return None if optional or (count and value >= least) else f"an int >= {least}"  # type: ignore[operator]


def _are_timings(value: object) -> bool:
    if not isinstance(value, tuple) or not value:
        return False
    last = 0
    for pair in value:
        if not isinstance(pair, tuple) or len(pair) != 2:
            return False
        size, seconds = pair
        sound = isinstance(size, int) and isinstance(seconds, numbers.Real)
        if not sound or size <= last or not 0 < seconds < math.inf:
            return False
        last = size
    return True


def local_machine(nvme_path: str | os.PathLike[str] | None = None) -> Machine:
    """This machine: cores and free memory as they are just now, default rates. Any thread.

    Of free memory the reserve is left out that the runtime keeps free. What is free on the disk of
    ``nvme_path`` is not known (None) where that folder is not there.
    """
    device = torch.device("cuda")
    accelerator = torch.cuda.is_available() and not shares_host_memory(device)
    return Machine(
        device_bytes=_after_reserve(device_free_bytes(device), reserve_bytes(device))
        if accelerator
        else None,
        host_bytes=_after_reserve(host_free_bytes(), reserve_bytes()),
        nvme_bytes=None if nvme_path is None else _disk_free_bytes(Path(nvme_path)),
        cores=free_cores(0),
        training_threads=None if accelerator else torch.get_num_threads(),
    )


def _disk_free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _after_reserve(free: int, reserve: int) -> int:
    return max(0, free - reserve)


def default_path() -> Path:
    """Where a probe is kept: ``machine.json`` in the user's cache folder (XDG_CACHE_HOME)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "asteria" / "machine.json"


def find_machine(
    given: Machine | str | os.PathLike[str] | None,
    nvme_path: str | os.PathLike[str] | None = None,
) -> Machine:
    """A machine as it is, from a file, or None: this one, with the rates that were probed.

    Raises ConfigError as `load_machine`.
    """
    if isinstance(given, Machine):
        return given
    if given is not None:
        return load_machine(Path(given))
    here = local_machine(nvme_path)
    if not default_path().exists():
        return here
    # Rates stay, free memory does not.
    return dataclasses.replace(
        load_machine(default_path()),
        device_bytes=here.device_bytes,
        host_bytes=here.host_bytes,
        nvme_bytes=here.nvme_bytes,
    )


def save_machine(machine: Machine, path: Path) -> None:
    """Write ``machine`` as JSON, making folders that are missing; whole or not at all.

    Raises ConfigError where that is not possible.
    """
    content = {"format": _FORMAT, **dataclasses.asdict(machine)}
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(
            f"what was measured was to be written to {path}, found {error}: give another file"
        ) from error


def load_machine(path: Path) -> Machine:
    """Read what `save_machine` wrote; ``source`` names the file.

    Raises ConfigError if it cannot be read or holds something else.
    """
    again = "write it again with `asteria probe`"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the measurements of a machine were to be read from {path}, found {error}: {again}"
        ) from error
    known = {field.name for field in dataclasses.fields(Machine)}
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ConfigError(f"{path}: no measurements of a machine, of format {_FORMAT}: {again}")
    if unknown := sorted(content.keys() - known):
        raise ConfigError(f"{path}: unknown fields {', '.join(unknown)}: {again}")
    for name in ("refresh_s", "exact_s"):
        if isinstance(content.get(name), list):
            pairs = content[name]
            content[name] = tuple(tuple(p) if isinstance(p, list) else p for p in pairs)
    try:
        return Machine(**content | {"source": f"measured, {path}"})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {again}") from error
