"""The picture beside the report of `benchmarks.scale`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that stay apart for everybody.
STYLES = {
    "AdamW": {"color": "#000000", "lw": 1.2},
    "SOAP, every rank refreshes all": {"color": "#999999", "lw": 1.6},
    "SOAP, owners, updates gathered": {"color": "#D55E00", "lw": 1.6},
    "Asteria, replicas": {"color": "#56B4E9", "lw": 1.6},
    "Asteria, exact shards": {"color": "#0072B2", "lw": 1.6},
    "Asteria, exact shards, on the device": {"color": "#009E73", "lw": 1.6},
}
TITLES = (
    "speed-up over AdamW on one rank",
    "seconds of a step",
    "seconds of a step / AdamW's",
)
DRAWN_STALENESS = 2  # as a line, or the smallest that there is; others as an area


def plot(report: Mapping[str, Any], path: Path) -> None:
    """A picture for each network; the first has the name, others have theirs appended."""
    networks = list(next(iter(report["models"].values()))["networks"])
    for place, network in enumerate(networks):
        models = {name: model["networks"][network] for name, model in report["models"].items()}
        figure = draw_network(models)
        figure.suptitle(
            f"{network}, a fixed global batch, refreshes every {report['settings']['period']} steps"
        )
        named = path if not place else path.with_name(f"{path.stem}_{network}{path.suffix}")
        figure.savefig(named, dpi=90)


def draw_network(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A column for each model: speed-up, seconds of a step, and these over AdamW's."""
    figure = Figure(figsize=(1.5 + 4.2 * len(models), 10.5), layout="constrained")
    panels = figure.subplots(3, len(models), squeeze=False, sharex=True)
    for column, (name, rows) in enumerate(models.items()):
        adamw = step_times(rows, "AdamW", 0)
        counts = sorted(adamw)
        first_s = adamw[counts[0]]
        scales: list[Callable[[int, float], float]] = [
            lambda n, s, first_s=first_s: first_s / s,  # type: ignore[misc]
            lambda n, s: s,
            lambda n, s, adamw=adamw: s / adamw[n],  # type: ignore[misc]
        ]
        for row, scale in enumerate(scales):
            for arm, style in STYLES.items():
                draw(panels[row][column], rows, arm, style, scale)
            finish(panels[row][column], counts)
        ideal = [n / counts[0] for n in counts]
        panels[0][column].plot(counts, ideal, ":", color="#999999", lw=1)
        panels[0][column].set_title(name, fontsize=10)
        panels[2][column].set_xlabel("ranks")
    for panel, title in zip(panels[:, 0], TITLES, strict=True):
        panel.set_ylabel(title)
    handles, labels = panels[0][0].get_legend_handles_labels()
    columns = min(3, len(models))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def step_times(rows: Sequence[Mapping[str, Any]], arm: str, staleness: int) -> dict[int, float]:
    """Seconds by number of ranks."""
    return {
        row["ranks"]: row["step_s"]
        for row in rows
        if row["arm"] == arm and row["staleness"] == staleness
    }


def draw(
    panel: Axes,
    rows: Sequence[Mapping[str, Any]],
    arm: str,
    style: Mapping[str, Any],
    scale: Callable[[int, float], float],
) -> None:
    """One arm, ``scale`` of (ranks, seconds); Asteria from its slowest to its fastest S >= 1."""
    known = sorted({row["staleness"] for row in rows if row["arm"] == arm})
    later = [s for s in known if s] or known
    if not later:
        return
    drawn = DRAWN_STALENESS if DRAWN_STALENESS in later else later[0]

    def values(staleness: int) -> list[float]:
        return [scale(n, s) for n, s in step_times(rows, arm, staleness).items()]

    counts = list(step_times(rows, arm, drawn))
    label = arm if later == [0] else f"{arm}, S = {drawn} (area: {later[0]} to {later[-1]})"
    panel.plot(counts, values(drawn), label=label, **style)
    if len(later) > 1:
        every = list(zip(*(values(s) for s in later), strict=True))
        low, high = [min(v) for v in every], [max(v) for v in every]
        panel.fill_between(counts, low, high, color=style["color"], alpha=0.15, lw=0)


def finish(panel: Axes, counts: Sequence[int]) -> None:
    """Logarithmic axes with plain numbers."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(counts, [str(n) for n in counts], fontsize=7)
    low, high = panel.get_ylim()
    marks = [k * 10.0**power for power in range(-3, 5) for k in (1, 2, 5)]
    ticks = [mark for mark in marks if low <= mark <= high]
    if len(ticks) > 9:
        ticks = [mark for mark in ticks if f"{mark:e}".startswith("1")]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
