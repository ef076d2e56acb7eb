"""Texts for people: columns that line up, sizes and times that can be read."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "readable_bytes", "readable_count", "readable_s"]


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """The rows as a table, two blanks between columns; columns of ``right`` end in line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def readable_bytes(size: int | None) -> str:
    """``"1.5 GiB"``; None is no limit."""
    if size is None:
        return "no limit"
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def readable_count(number: int) -> str:
    """``"124.4 M"``."""
    value, unit = float(number), ""
    for unit in ("", " k", " M", " G", " T"):
        if value < 1000 or unit == " T":
            break
        value /= 1000
    return f"{value:.1f}{unit}" if unit else str(number)


def readable_s(seconds: float) -> str:
    """``"12 ms"``, ``"3.4 s"``, ``"12 min"``, ``"3.1 h"``."""
    for least, unit, factor in ((5400.0, "h", 3600.0), (90.0, "min", 60.0), (1.0, "s", 1.0)):
        if seconds >= least:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
