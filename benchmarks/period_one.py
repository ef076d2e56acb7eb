"""Whether ways to refresh at every step are as good as QR at every step, paired by seed.

    python -m benchmarks.convergence --period-one --jobs 2 --json results/period_one.json

All arms but one are synchronous and differ from the first one, QR in the step, in what their names
say; that one has its bases as an accelerator has them that refreshes beside the training. How far
the loss of a start that differs by 1e-6 goes is the noise. Model and data are those of
``examples/train_gpt.py``, two layers of width 64; the rate is constant after the warm-up, because
one that falls to zero hides differences between bases. Every finished run is stored under
``--out``.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.measurement import describe_machine, format_table, write_json
from benchmarks.processes import execute_missing
from benchmarks.runs import Lab, Record, Run, Runner, final, finite, optimizer_ms, set_up
from benchmarks.staleness import mean_and_error

BASELINE, NOISE = "qr", "perturbed"
LR = 4e-3  # after the warm-up
MODEL = {"context": 64, "width": 64, "layers": 2, "heads": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to refresh; fields as in `benchmarks.runs.Run`."""

    label: str
    runtime: tuple[tuple[str, Any], ...] = ()
    period: int = 1
    perturbation: float | None = None
    ldlr_iterations: int | None = None


LDLR = (("refresh_method", "ldlr"),)
NARROW = (("state_dtype", "bfloat16"),)
PACKED = (("factors", "packed"),)
BESIDE = (("refresh", "async"), ("refresh_on", "device"))
ARMS = {
    BASELINE: Arm(label="qr"),
    NOISE: Arm(label="qr, first weights changed by 1e-6", perturbation=1e-6),
    "ldlr": Arm(label="ldlr", runtime=LDLR),
    "rotated": Arm(label="ldlr, factors rotated", runtime=(("factors", "rotated"),)),
    "ldlr 2": Arm(label="ldlr, worth two iterations", runtime=LDLR, ldlr_iterations=2),
    "narrow": Arm(label="qr, bases in bfloat16", runtime=NARROW),
    "narrow ldlr": Arm(label="ldlr, bases in bfloat16", runtime=(*LDLR, *NARROW)),
    "narrow 10": Arm(label="qr every 10th step, bases in bfloat16", runtime=NARROW, period=10),
    "packed": Arm(label="qr, half of each factor", runtime=PACKED),
    "packed 10": Arm(label="qr every 10th step, half of each factor", runtime=PACKED, period=10),
    "beside": Arm(label="ldlr, installed two steps later", runtime=BESIDE),
    "qr 10": Arm(label="qr every 10th step", period=10),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What all arms share."""

    optimizer: str
    lr: float
    steps: int
    seeds: tuple[int, ...]

    def run(self, arm: Arm, seed: int) -> Run:
        """The run of ``arm`` with ``seed``; the warm-up is a fifth of the steps."""
        return Run(
            optimizer=self.optimizer,
            lr=self.lr,
            steps=self.steps,
            seed=seed,
            warmup=max(1, self.steps // 5),
            schedule="constant",
            runtime=(("refresh", "sync"), *arm.runtime),
            options=(("precondition_frequency", arm.period),),
            perturbation=arm.perturbation,
            ldlr_iterations=arm.ldlr_iterations,
        )


def compare(arms: dict[str, Arm], runner: Runner, study: Study) -> dict[str, Record]:
    """Every arm against the first one, paired by seed."""
    base = [final(runner(study.run(arms[BASELINE], seed))) for seed in study.seeds]
    results = {}
    for name, arm in arms.items():
        records = [runner(study.run(arm, seed)) for seed in study.seeds]
        losses = [final(record) for record in records]
        gaps = [loss - other for loss, other in zip(losses, base, strict=True)]
        gap, error = mean_and_error(gaps)
        results[name] = {
            "label": arm.label,
            "final": losses,
            "gaps": gaps,
            "gap": gap,
            "standard_error": error,
            "optimizer_ms": optimizer_ms(records),
            "state_bytes": records[0]["state_bytes"],
            "retried": [record["stats"].get("retried_refreshes") for record in records],
            "failed": [record["stats"].get("failed_refreshes") for record in records],
        }
    return results


def print_results(results: dict[str, Record], study: Study) -> None:
    """The table."""
    rows = []
    for arm in results.values():
        losses = (f"{loss:.4f}" if math.isfinite(loss) else "-" for loss in arm["final"])
        error = f"{arm['standard_error']:.4f}" if math.isfinite(arm["standard_error"]) else "-"
        cost = (f"{arm['optimizer_ms']:.1f}", f"{arm['state_bytes'] / 1e6:.1f}")
        rows.append((arm["label"], f"{arm['gap']:+.4f}", error, *losses, *cost))
    seeds = (f"seed {seed}" for seed in study.seeds)
    print(f"\nvalidation loss in nats per byte after {study.steps} steps, lr {study.lr:g} constant")
    header = (study.optimizer, "mean gap", "std. error", *seeds, "step() ms", "state MB")
    print(format_table(header, rows))


def plot(results: dict[str, Record], path: Path) -> None:
    """The gap of every arm to the first one, with the single seeds and the noise."""
    others = [arm for name, arm in results.items() if name not in (BASELINE, NOISE)]
    noise = math.sqrt(sum(gap**2 for gap in results[NOISE]["gaps"]) / len(results[NOISE]["gaps"]))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    label = f"noise: first weights changed by 1e-6 (±{noise:.4f})"
    panel.axvspan(-noise, noise, color="dimgray", alpha=0.18, lw=0, label=label)
    panel.axvline(0, color="dimgray", lw=1)
    for place, arm in enumerate(reversed(others)):
        panel.plot(arm["gaps"], [place] * len(arm["gaps"]), "o", color="#0072B2", ms=4, alpha=0.4)
        error = arm["standard_error"] if math.isfinite(arm["standard_error"]) else 0.0
        panel.errorbar(arm["gap"], place, xerr=error, fmt="o", color="#0072B2", capsize=4)
        offset = {"xytext": (0, 8), "textcoords": "offset points", "fontsize": 8}
        panel.annotate(f"{arm['gap']:+.4f}", (arm["gap"], place), ha="center", **offset)
    panel.set_yticks(range(len(others)), [arm["label"] for arm in reversed(others)])
    panel.set_ylim(-0.6, len(others) - 0.3)
    panel.set_xlabel("loss above QR at every step, nats per byte; mean, standard error, seeds")
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; each run has one thread."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence --period-one",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument
    add("--optimizer", choices=("soap", "klshampoo", "klsoap"), default="soap")
    add("--lr", type=float, default=LR, help="after the warm-up (default 4e-3)")
    add("--steps", type=int, default=300, help="a fifth of them warm-up (default 300)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="(default 0 to 3)")
    add("--arms", nargs="+", choices=ARMS, metavar="ARM", help="beside the first two (all)")
    add("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    add("--out", type=Path, default=Path("runs/period_one"), help="finished runs")
    add("--json", type=Path, help="write all results here, and a plot beside it")
    add("--quick", action="store_true", help="a tiny model, 30 steps: tests the benchmark only")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    args.steps = 30 if args.quick else args.steps
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the study, then print and write its results."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    task, corpus = set_up(quick=args.quick, threads=1)
    task = task if args.quick else replace(task, **MODEL)
    study = Study(optimizer=args.optimizer, lr=args.lr, steps=args.steps, seeds=tuple(args.seeds))
    arms = {
        name: arm for name, arm in ARMS.items() if name in (BASELINE, NOISE, *(args.arms or ARMS))
    }
    runs = [study.run(arm, seed) for seed in study.seeds for arm in arms.values()]
    with tqdm(total=len(runs) * study.steps, unit="step", smoothing=0.05) as bar:
        lab = Lab(task, corpus, args.out, bar)
        if args.jobs > 1:
            execute_missing(lab, runs, args.jobs)
        for run in runs:
            lab(run)
    results = compare(arms, lab, study)
    print_results(results, study)
    if lab.outdated:
        print(f"{lab.outdated} runs in {args.out} were made with another version of asteria")
    if args.json:
        settings = asdict(study) | {"task": asdict(task), "jobs": args.jobs}
        report = {"benchmark": "period_one", "machine": describe_machine(), "settings": settings}
        write_json(args.json, finite(report | {"arms": results}))
        plot(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
