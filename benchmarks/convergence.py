"""How far each optimizer gets on the example's task, every one tuned over as many learning rates.

    python -m benchmarks.convergence --json results/convergence.json

1. Each arm runs its whole grid of learning rates with the first seed.
2. The best rate of each arm runs with the remaining seeds.
3. AdamW at its best rate gets a schedule a third longer; SOAP's control arm gets shorter schedules
   of its own, to find how many steps it needs for the loss that AdamW reaches there.

Model, data and the loss are those of ``examples/train_gpt.py``. Every finished run is stored under
``--out`` as one file, so a benchmark that was killed continues where it was.

``--staleness`` is another study of the same task: what asynchronous refreshes cost in loss
(``benchmarks/staleness.py``). ``--period-one`` is a third: what refreshes at every step gain, by
method (``benchmarks/period_one.py``).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import period_one, staleness
from benchmarks.measurement import describe_machine, write_json
from benchmarks.runs import Lab, Record, Run, Runner, final, finite, optimizer_ms, set_up


@dataclass(frozen=True, slots=True)
class Arm:
    """An optimizer of the comparison and the learning rates it is tuned over."""

    label: str
    color: str
    optimizer: str
    rates: tuple[float, ...]
    preset: Literal["default", "reference"] = "default"


SOAP_RATES = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)  # KL-Shampoo's and KL-SOAP's too
BASELINE, CONTROL = "adamw", "soap_reference"
ARMS = {
    "adamw": Arm("AdamW", "dimgray", "adamw", (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "soap_reference": Arm("SOAP, control arm", "tab:cyan", "soap", SOAP_RATES, "reference"),
    "soap": Arm("SOAP", "tab:blue", "soap", SOAP_RATES),
    "klshampoo": Arm("KL-Shampoo", "tab:orange", "klshampoo", SOAP_RATES),
    "klsoap": Arm("KL-SOAP", "tab:green", "klsoap", SOAP_RATES),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Which runs are made; the first seed tunes."""

    steps: int
    seeds: tuple[int, ...]

    @property
    def warmup(self) -> int:
        """Steps of warm-up, the same for every length of schedule: 60 of 300."""
        return max(1, self.steps // 5)

    @property
    def long(self) -> int:
        """Length of AdamW's longer schedule."""
        return self.steps * 4 // 3

    @property
    def lengths(self) -> list[int]:
        """Shorter schedules that the control arm tries, from half to 65 % of AdamW's longer one."""
        return [round(self.long * share) for share in (0.50, 0.55, 0.60, 0.65)]

    @property
    def total_steps(self) -> int:
        """Steps of all runs."""
        runs = sum(len(arm.rates) + len(self.seeds) - 1 for arm in ARMS.values())
        return runs * self.steps + len(self.seeds) * (self.long + sum(self.lengths))

    def run(self, arm: Arm, lr: float, seed: int, steps: int | None = None) -> Run:
        """The run of ``arm`` with these settings, of the usual length unless ``steps`` is given."""
        kind: dict[str, Any] = {"optimizer": arm.optimizer, "preset": arm.preset}
        return Run(lr=lr, seed=seed, steps=steps or self.steps, warmup=self.warmup, **kind)


def tune(arm: Arm, runner: Runner, study: Study) -> Record:
    """Grid with the first seed, then the best rate with the others."""
    tried = {lr: final(runner(study.run(arm, lr, study.seeds[0]))) for lr in arm.rates}
    best = min(tried, key=lambda lr: tried[lr])
    records = [runner(study.run(arm, best, seed)) for seed in study.seeds]
    losses = [final(record) for record in records]
    return {
        "label": arm.label,
        "lr": best,
        "lr_at_edge": best in (arm.rates[0], arm.rates[-1]),
        "tried": [[lr, loss] for lr, loss in tried.items()],
        "final": losses,
        "mean": statistics.fmean(losses),
        "optimizer_ms": optimizer_ms(records),
        "state_bytes": records[0]["state_bytes"],
        "curves": [record["validation"] for record in records],
    }


def shortest(lengths: Sequence[int], losses: Sequence[float], target: float) -> int | None:
    """Smallest of ``lengths`` whose final loss is at most ``target``, or ``None``."""
    pairs = zip(lengths, losses, strict=True)
    return min((length for length, loss in pairs if loss <= target), default=None)


def shorten(arms: dict[str, Record], runner: Runner, study: Study) -> Record:
    """AdamW with a longer schedule, and the control arm with shorter ones to the same loss."""
    rows = []
    for seed in study.seeds:
        baseline = study.run(ARMS[BASELINE], arms[BASELINE]["lr"], seed, study.long)
        lr = arms[CONTROL]["lr"]
        runs = [study.run(ARMS[CONTROL], lr, seed, length) for length in study.lengths]
        target, losses = final(runner(baseline)), [final(runner(run)) for run in runs]
        needed = shortest(study.lengths, losses, target)
        rows.append({"seed": seed, "target": target, "final": losses, "steps": needed})
    return {"adamw_steps": study.long, "lengths": study.lengths, "seeds": rows}


def print_results(arms: dict[str, Record], lengths: Record, seeds: Sequence[int]) -> None:
    """The tables, with gaps to AdamW paired by seed."""
    heads = "".join(f"{f'seed {seed}':>9}" for seed in seeds)
    gaps = "".join(f"{f'gap {seed}':>9}" for seed in seeds)
    print(f"\n{'':20}{'best lr':>9}{heads}{'mean':>9}{gaps}{'step() ms':>11}{'state MB':>10}")
    for arm in arms.values():
        pairs = zip(arm["final"], arms[BASELINE]["final"], strict=True)
        losses = "".join(f"{loss:9.3f}" for loss in arm["final"])
        differences = "".join(f"{loss - base:+9.3f}" for loss, base in pairs)
        rate = f"{arm['lr']:g}{'*' if arm['lr_at_edge'] else ''}"
        cost = f"{arm['optimizer_ms']:11.1f}{arm['state_bytes'] / 1e6:10.1f}"
        print(f"{arm['label']:20}{rate:>9}{losses}{arm['mean']:9.3f}{differences}{cost}")
    if any(arm["lr_at_edge"] for arm in arms.values()):
        print("* at the edge of its grid: a better rate may lie beyond")
    print(f"\n{ARMS[CONTROL].label}, final loss by length of its schedule, and the loss to reach:")
    columns = "".join(f"{n:>9}" for n in lengths["lengths"])
    print(f"{'':8}{columns}{'AdamW ' + str(lengths['adamw_steps']):>12}{'needs':>8}")
    for row in lengths["seeds"]:
        losses = "".join(f"{loss:9.3f}" for loss in row["final"])
        print(f"seed {row['seed']:<3}{losses}{row['target']:12.3f}{row['steps'] or '-':>8}")


def plot(arms: dict[str, Record], lengths: Record, path: Path) -> None:
    """Curves with their spread over the seeds, and the final loss by learning rate and length."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    layout = [["curves", "rates"], ["curves", "lengths"]]
    panels = figure.subplot_mosaic(layout, width_ratios=[2, 1])
    tops = [curve[len(curve) // 6][2] for arm in arms.values() for curve in arm["curves"] if curve]
    for key, arm in arms.items():
        color = ARMS[key].color
        plot_curves(panels["curves"], arm, color)
        rates, losses = zip(*arm["tried"], strict=True)
        panels["rates"].plot(rates, losses, "o-", color=color, markersize=3.5)
    ticks = sorted({rate for arm in ARMS.values() for rate in arm.rates})
    panels["curves"].set(xlabel="step", ylabel="validation loss, nats per byte", xlim=0)
    panels["curves"].set_ylim(top=max(tops, default=6) + 0.05)
    panels["curves"].legend(title="mean over the seeds, in the band of all", frameon=False)
    panels["rates"].set(xlabel="peak learning rate", ylabel="final loss", xscale="log")
    panels["rates"].set_xticks(ticks, [f"{rate:g}" for rate in ticks], rotation=90, fontsize=7)
    panels["rates"].minorticks_off()
    for row in lengths["seeds"]:
        line = panels["lengths"].plot(lengths["lengths"], row["final"], "o-", markersize=3.5)[0]
        line.set_label(f"seed {row['seed']}")
        panels["lengths"].axhline(row["target"], color=line.get_color(), ls=":")
    panels["lengths"].set(xlabel="length of the schedule, steps", ylabel="final loss")
    dotted = f"dotted: AdamW, {lengths['adamw_steps']} steps"
    panels["lengths"].set_title(f"{ARMS[CONTROL].label}; {dotted}", fontsize=9)
    panels["lengths"].legend(frameon=False)
    for panel in panels.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_curves(panel: Axes, arm: Record, color: str) -> None:
    """One arm's mean curve over the seeds that finished, between the lowest and the highest."""
    pairs = zip(arm["curves"], arm["final"], strict=True)
    complete = [curve for curve, loss in pairs if math.isfinite(loss)]
    if not complete:
        return
    steps = [point[0] for point in complete[0]]
    columns = list(zip(*([point[2] for point in curve] for curve in complete), strict=True))
    label = f"{arm['label']}, lr {arm['lr']:g}"
    panel.plot(steps, [statistics.fmean(column) for column in columns], color=color, label=label)
    panel.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.2)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of the study, then print and write its results."""
    argv = sys.argv[1:] if argv is None else argv
    if "--period-one" in argv:
        period_one.main([word for word in argv if word != "--period-one"])
        return
    if "--staleness" in argv:
        staleness.main([word for word in argv if word != "--staleness"])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--staleness", action="store_true", help="another study, with options of its own")
    add("--period-one", action="store_true", help="a third one, likewise")
    add("--steps", type=int, default=300, help="a fifth of them warm-up (default 300)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the first one tunes (default 0 1)")
    add("--out", type=Path, default=Path("runs/convergence"), help="finished runs")
    add("--json", type=Path, help="write all results here, and a plot beside it")
    add("--quick", action="store_true", help="a tiny model, 30 steps: tests the benchmark only")
    args = parser.parse_args(argv)
    task, corpus = set_up(quick=args.quick)
    args.steps = 30 if args.quick else args.steps
    study = Study(steps=args.steps, seeds=tuple(args.seeds))
    with tqdm(total=study.total_steps, unit="step", smoothing=0.05) as bar:
        lab = Lab(task, corpus, args.out, bar)
        arms = {key: tune(arm, lab, study) for key, arm in ARMS.items()}
        lengths = shorten(arms, lab, study)
    print_results(arms, lengths, study.seeds)
    if lab.outdated:
        print(f"{lab.outdated} runs in {args.out} were made with another version of asteria")
    if args.json:
        settings = asdict(study) | {"warmup": study.warmup, "task": asdict(task)}
        results: Record = {"settings": settings, "machine": describe_machine()}
        results |= {"arms": arms, "lengths": lengths}
        results["runs"] = lab.summary()
        write_json(args.json, finite(results))
        plot(arms, lengths, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
