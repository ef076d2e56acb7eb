"""The picture beside the report of `benchmarks.accelerator`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for everybody.
COLOURS = {
    "AdamW": "#666666",
    "in the step": "#D55E00",
    "by the host": "#E69F00",
    "beside": "#0072B2",
    "": "#009E73",
}
MARKS = {"ldlr": "o-", "qr": "s--", "eigh": "^:"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Steps of the 124M model by arm, its step times, and refreshes by size."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    bars, steps, refreshes = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    rows = [row for section in ("training", "peers") for row in rows_of(report, section)]
    rows = [row for row in rows if row.get("step_ms")]
    draw_bars(bars, rows)
    draw_steps(steps, [row for row in rows if row["period"] == 10 or "AdamW" in row["arm"]])
    draw_refreshes(refreshes, [row for row in rows_of(report, "refreshes") if row["ms"]])
    figure.suptitle(report["device"]["name"])
    figure.savefig(path, dpi=120)


def rows_of(report: Mapping[str, Any], section: str) -> list[Any]:
    """Of a section that has come to its end."""
    rows: list[Any] = (report["sections"].get(section, {}).get("result") or {}).get("rows", [])
    return rows


def colour(arm: str) -> str:
    """By where the refreshes are."""
    return next(value for key, value in COLOURS.items() if key in arm)


def draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Median and p99 of each arm."""
    for place, row in enumerate(rows):
        step = row["step_ms"]
        axes.barh(place, step["p99"], color=colour(row["arm"]), alpha=0.35)
        axes.barh(place, step["p50"], color=colour(row["arm"]))
        axes.annotate(f" {step['p50']:.0f} / {step['p99']:.0f}", (step["p99"], place), va="center")
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("ms of a step: median, p99")


def draw_steps(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each counted step."""
    for row in rows:
        axes.plot(row["times_ms"], color=colour(row["arm"]), label=row["arm"])
    axes.set_xlabel("counted step")
    axes.set_ylabel("ms")
    if rows:
        axes.legend(frameon=False, fontsize=8)


def draw_refreshes(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Milliseconds of one factor by size, the best of alone and stacked."""
    for method, marks in MARKS.items():
        best: dict[int, float] = {}
        for row in rows:
            if row["method"] == method:
                each = row["ms"] / row["blocks"]
                best[row["size"]] = min(each, best.get(row["size"], each))
        if best:
            axes.loglog(list(best), list(best.values()), marks, label=method, base=2)
    axes.set_xlabel("size of a factor")
    axes.set_ylabel("ms of a refresh")
    if rows:
        axes.legend(frameon=False)
