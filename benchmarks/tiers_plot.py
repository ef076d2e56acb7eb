"""The picture beside the report of `benchmarks.tiers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"ours": "#0072B2", "bare": "#999999"}
WAYS = ("write", "read")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each table and way that were measured: rates by the size of blocks."""
    measured = {title: entries for title, entries in report["tables"].items() if entries}
    figure = Figure(figsize=(10, 3.6 * len(measured)), layout="constrained")
    panels = figure.subplots(len(measured), 2, squeeze=False, sharey="row")
    for row, (title, entries) in zip(panels, measured.items(), strict=True):
        for panel, way in zip(row, WAYS, strict=True):
            draw(panel, entries, way)
            panel.set_title(f"{title}: {way}", fontsize=10)
        row[0].set_ylabel("GB/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(f"{settings['depth']} blocks in flight, {machine['cpu']}")
    figure.savefig(path, dpi=120)


def draw(panel: Axes, entries: Mapping[str, Any], way: str) -> None:
    """Medians as bars with the 10th to 90th percentile, the ratio above."""
    for place, (side, colour) in enumerate(COLOURS.items()):
        found = [result[way][side] for result in entries.values()]
        middle = [summary["p50"] for summary in found]
        low = [summary["p50"] - summary["p10"] for summary in found]
        high = [summary["p90"] - summary["p50"] for summary in found]
        at = [number + 0.4 * place for number in range(len(found))]
        panel.bar(at, middle, 0.38, yerr=(low, high), color=colour, label=side, capsize=2)
    for number, result in enumerate(entries.values()):
        panel.text(number, 0, f"{result[way]['ratio']['p50']:.2f}", ha="center", color="white")
    panel.set_xticks(
        [number + 0.2 for number in range(len(entries))], [f"{m} MiB" for m in entries]
    )
    panel.spines[["top", "right"]].set_visible(False)
