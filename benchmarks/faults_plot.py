"""The picture beside the report of `benchmarks.faults`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.fault_rows import ALL, ROWS, UNDISTURBED


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw each row's final loss beside the undisturbed ones, and losses over steps."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    finals, curves = figure.subplots(1, 2, width_ratios=(1, 1.2))
    rows = {name: record for name, record in report["rows"].items() if record.get("validation")}
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colors = {name: palette[index % len(palette)] for index, name in enumerate(rows)}
    colors |= {ALL: "black"}
    _draw_finals(finals, report, rows, colors)
    _draw_curves(curves, report, rows, colors)
    settings = report["settings"]
    figure.suptitle(
        f"{settings['optimizer']}, {settings['steps']} steps with faults at random steps; "
        f"grey: {settings['seeds']} undisturbed seeds",
        fontsize=11,
    )
    for panel in (finals, curves):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_finals(
    axes: Axes, report: Mapping[str, Any], rows: Mapping[str, Any], colors: Mapping[str, Any]
) -> None:
    """Final losses from top to bottom, over the band of the undisturbed seeds."""
    seeds = report["undisturbed"]
    if seeds:
        axes.axvspan(min(seeds), max(seeds), color="lightgray", alpha=0.6, lw=0)
        axes.axvline(seeds[0], color="gray", lw=1)
        axes.scatter(seeds, [0] * len(seeds), color="gray", s=30)
    for place, (name, record) in enumerate(rows.items(), 1):
        if record["final"] is not None:
            exact = ROWS[name].outcome == "same bits"
            axes.scatter(
                record["final"], place, marker="D" if exact else "o", s=34, color=colors[name]
            )
            if name in report["failed"]:
                axes.scatter(record["final"], place, marker="x", s=120, color="red")
    axes.set_yticks(range(len(rows) + 1), [f"{UNDISTURBED}, all seeds", *rows])
    axes.invert_yaxis()
    axes.set_xlabel("final validation loss, nats per byte")
    axes.set_title(
        "line: undisturbed, same seed; diamonds: must have its bits; x: failed", fontsize=9
    )


def _draw_curves(
    axes: Axes, report: Mapping[str, Any], rows: Mapping[str, Any], colors: Mapping[str, Any]
) -> None:
    """Validation losses over steps."""
    for record in report["seeds"].values():
        if record.get("validation"):
            axes.plot(*zip(*record["validation"], strict=True), color="lightgray", lw=5, zorder=1)
    for name, record in rows.items():
        wide = name == ALL
        line = axes.plot(*zip(*record["validation"], strict=True), color=colors[name])[0]
        line.set(linewidth=1.6 if wide else 1.0, label=name, zorder=3 if wide else 2)
        line.set_linestyle("--" if wide else "-")
    axes.set(xlabel="step", ylabel="validation loss, nats per byte", xlim=0)
    ends = [loss for record in rows.values() for at, loss in record["validation"][2:]]
    if ends:
        spread = max(ends) - min(ends) or 1.0
        axes.set_ylim(min(ends) - 0.05 * spread, max(ends) + 0.05 * spread)
    axes.legend(fontsize=7, frameon=False)
