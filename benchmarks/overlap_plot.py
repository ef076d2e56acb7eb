"""The picture beside the report of `benchmarks.overlap`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in this order, the thin line over the thick ones; colours that stay apart for everybody.
STYLES = {
    "synchronous": {"color": "#D55E00", "lw": 1.3},
    "never refreshed": {"color": "#999999", "lw": 4.0, "alpha": 0.6},
    "asynchronous": {"color": "#0072B2", "lw": 1.3},
}
PARTS = {
    "step": "whole step, ms",
    "visible": "optimizer's step(), ms",
}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Time of each counted step, of the whole and of the optimizer's part."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, (part, title) in zip(panels, PARTS.items(), strict=True):
        draw(panel, report["contenders"], part)
        panel.set_ylabel(title)
    settings, machine = report["settings"], report["machine"]
    block = settings["period"] * settings["periods"]
    panels[1].set_xlabel(f"counted step, in turns of {block}")
    emulated = settings["device"] == "cpu"
    work = f"{settings['device_ms']:g} ms emulated" if emulated else machine["device"]
    shapes = f"{settings['table']} shapes, " if emulated else ""
    figure.suptitle(
        f"{settings['optimizer']}, {shapes}forward and backward: {work}, "
        f"a refresh every {settings['period']} steps"
    )
    figure.savefig(path, dpi=130)


def draw(panel: Axes, contenders: Mapping[str, Any], part: str) -> None:
    """All contenders' times of one part on a logarithmic axis, quantiles in the legend."""
    for name, style in STYLES.items():
        if name in contenders:
            summary = contenders[name][f"{part}_ms"]
            quantiles = ", ".join(f"{key} {summary[key]:.0f}" for key in ("p50", "p99", "max"))
            times = contenders[name]["times_ms"][part]
            panel.plot(range(1, len(times) + 1), times, label=f"{name}: {quantiles}", **style)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    marks = [k * 10.0**power for power in range(-3, 6) for k in (1, 2, 3, 5)]
    ticks = [mark for mark in marks if low <= mark <= high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.margins(x=0.01)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper left", bbox_to_anchor=(0, 1.15), ncols=3, frameon=False, fontsize=9)
