"""The picture beside the report of `benchmarks.step_time`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which stay apart for colour-blind readers, and a line style.
STYLES = {
    "asteria.SOAP": ("#D55E00", "-"),
    "asteria.KLShampoo": ("#E69F00", "-"),
    "pytorch_optimizer SOAP": ("#0072B2", "-"),
    "heavyball SOAP, not compiled": ("#56B4E9", "-"),
    "heavyball SOAP, functions compiled": ("#56B4E9", "--"),
    "heavyball SOAP, whole step compiled": ("#56B4E9", ":"),
    "torch AdamW": ("#009E73", "-"),
    "bare products": ("#666666", "--"),
}
BARS = (("p50", 1.0), ("mean", 0.65), ("p99", 0.3))


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw times over steps and mean, p50 and p99 as bars; without matplotlib only say so."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed (extra bench)")
        return
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (over_steps, bars) = pyplot.subplots(
        1, 2, figsize=(14, 6.5), width_ratios=(3, 2), layout="constrained"
    )
    _draw_steps(over_steps, report["contenders"])
    _draw_bars(bars, report["contenders"])
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(
        f"step() on {settings['table']} shapes, refresh every {settings['period']} steps, "
        f"{settings['threads']} threads, {machine['cpu']}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"plot: {path}")


def _draw_steps(axes: Any, contenders: Mapping[str, Any]) -> None:
    """Time of each counted step, on a logarithmic axis: refreshes are many times a usual step."""
    for name, result in contenders.items():
        colour, dashes = STYLES[name]
        axes.plot(result["times_ms"], dashes, color=colour, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("counted step")
    axes.set_ylabel("step() in ms")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)


def _draw_bars(axes: Any, contenders: Mapping[str, Any]) -> None:
    """Three bars for each contender, with their values written beside them."""
    height = 0.8 / len(BARS)
    for row, (name, result) in enumerate(contenders.items()):
        for index, (column, strength) in enumerate(BARS):
            value = result["summary_ms"][column]
            position = row + (index - 1) * height
            axes.barh(position, value, height, color=STYLES[name][0], alpha=strength)
            axes.annotate(
                f"{column} {value:.1f}",
                (value, position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(contenders)), [name.replace(", ", "\n") for name in contenders])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
