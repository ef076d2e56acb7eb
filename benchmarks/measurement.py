"""What every benchmark reports the same way: the machine, quantiles, a table and a JSON file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def describe_machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describe what the figures were measured on.

    Args:
        packages: Distributions whose versions matter; ``None`` stands for one not installed.
    """
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "versions": {name: version(name) for name in ("torch", "numpy", *packages)},
    }


def version(package: str) -> str | None:
    """The installed version of ``package``, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_bytes(field: str) -> int:
    """A field of ``/proc/meminfo`` such as ``MemAvailable``; all physical memory elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kibibytes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(kibibytes[field]) * 1024


def _usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def quantile(values: Sequence[float], fraction: float) -> float:
    """The ``fraction`` quantile, linear between the two nearest order statistics.

    Raises:
        ValueError: No values, or a fraction outside [0, 1].
    """
    if not values or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"no {fraction} quantile of {len(values)} values")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, quantiles and extremes of ``values``."""
    fractions = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    summary = {"mean": sum(values) / len(values)}
    return summary | {name: quantile(values, fraction) for name, fraction in fractions.items()}


def progress_bar(items: Sequence[Item], title: str) -> Iterable[Item]:
    """``items`` under a progress bar on stderr; bare where `tqdm` is not installed."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        print(f"{title}: no progress bar without tqdm", file=sys.stderr)
        return items
    bar: Iterable[Item] = tqdm(items, desc=title, leave=False, dynamic_ncols=True)
    return bar


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align ``rows`` under ``header``: columns of numbers to the right, of words to the left."""
    columns = range(len(header))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in columns]
    numeric = [all(_is_number(row[column]) for row in rows) for column in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join((line(header), rule, *(line(row) for row in rows)))


def _is_number(cell: str) -> bool:
    """Whether ``cell`` is a number, or the dash that stands for none."""
    digits = cell.removeprefix("-").removeprefix("+").replace(".", "", 1).replace(",", "")
    return cell == "-" or digits.isdigit()


def read_stats(optimizer: Any) -> dict[str, Any]:
    """The fields of ``optimizer.stats()`` as JSON can hold them; none for torch's optimizers."""
    return _plain(optimizer.stats()) if hasattr(optimizer, "stats") else {}


def _plain(value: Any) -> Any:
    """Records and mappings as dicts with keys of text, numbers and texts as they are."""
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, int | float | str | None) else str(value)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write ``report`` to ``path``, making its folder; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)
