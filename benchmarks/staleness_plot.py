"""The picture beside the report of `benchmarks.staleness`."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]
DELAYED, OTHER, GRAY = "#0072B2", "#D55E00", "dimgray"  # apart for colour-blind readers too
LINEAR = 0.01  # nats: the axis is linear up to here and logarithmic beyond


def plot(results: dict[str, Record], verdict: Record, optimizer: str, path: Path) -> None:
    """The gap to the synchronous arm against the delay, and that of all other arms beside it."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    usable = {name: arm for name, arm in results.items() if math.isfinite(arm["gap"])}
    delayed = sorted(
        (arm for arm in usable.values() if arm["delay"] is not None), key=lambda arm: arm["delay"]
    )
    # The baseline is the zero, and the perturbed arm the band around it.
    others = [
        (name, arm)
        for name, arm in usable.items()
        if arm["delay"] is None and name not in ("synchronous", "perturbed")
    ]
    draw_arms(left, [arm["delay"] for arm in delayed], delayed, DELAYED)
    left.plot([arm["delay"] for arm in delayed], [arm["gap"] for arm in delayed], color=DELAYED)
    left.set_xscale("symlog", linthresh=1, linscale=0.6)
    ticks = [arm["delay"] for arm in delayed]
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_xlim(-0.25, 1.7 * max(ticks, default=1))
    left.set(
        xlabel="delay between launch and install, steps",
        title=f"{optimizer}, asynchronous, by delay",
    )
    left.set_ylabel(f"loss above synchronous refreshes, nats (linear to {LINEAR})")
    draw_arms(right, list(range(len(others))), [arm for _, arm in others], OTHER)
    right.set_xticks(range(len(others)), [name for name, _ in others], rotation=25, ha="right")
    right.set(xlim=(-0.6, len(others) - 0.1), title="other arms")
    for panel in (left, right):
        finish(panel, verdict)
    set_height(left, [gap for arm in usable.values() for gap in arm["gaps"]], verdict["target"])
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles, labels, loc="upper left", frameon=False)
    figure.savefig(path, dpi=150)


def draw_arms(panel: Axes, places: list[int], arms: list[Record], color: str) -> None:
    """Mean with its standard error, the single seeds faintly behind, the value beside it."""
    for place, arm in zip(places, arms, strict=True):
        panel.plot([place] * len(arm["gaps"]), arm["gaps"], "o", color=color, ms=3.5, alpha=0.35)
        text = f"{arm['gap']:+.4f}"
        offset = {"xytext": (7, -11), "textcoords": "offset points", "fontsize": 8}
        panel.annotate(text, (place, arm["gap"]), color=color, **offset)
    errors = [arm["standard_error"] for arm in arms]
    shown = [error if math.isfinite(error) else 0.0 for error in errors]
    gaps = [arm["gap"] for arm in arms]
    label = "mean over the seeds, its standard error, and each seed"
    panel.errorbar(places, gaps, shown, fmt="o", color=color, capsize=4, ms=6, label=label)


def finish(panel: Axes, verdict: Record) -> None:
    """Zero, the noise around it, and the target."""
    noise, target = verdict["noise"], verdict["target"]
    if math.isfinite(noise):
        label = f"noise: first weights changed by 1e-6 (±{noise:.4f})"
        panel.axhspan(-noise, noise, color=GRAY, alpha=0.18, lw=0, label=label)
    panel.axhline(0, color=GRAY, lw=1)
    panel.axhline(target, color=GRAY, ls="--", lw=1, label=f"target of the defaults: {target}")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def set_height(panel: Axes, gaps: list[float], target: float) -> None:
    """An axis that shows gaps of a thousandth as well as those of a tenth."""
    panel.set_yscale("symlog", linthresh=LINEAR, linscale=1.0)
    low, high = min([0.0, *gaps]), max([target, *gaps])
    steps = (1, 2, 5)
    marks = [k * 10.0**power for power in (-3, -2, -1, 0) for k in steps]
    sparse = [mark for mark in marks if mark >= 0.002]
    ticks = sorted({0.0, *sparse, *(-mark for mark in sparse)})
    panel.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(1.4 * low - 0.002, 1.6 * high)
