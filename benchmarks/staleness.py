"""What stale eigenbases cost: asynchronous refreshes against synchronous ones, paired by seed.

    python -m benchmarks.convergence --staleness --json results/staleness.json
    python -m benchmarks.convergence --staleness --optimizer klsoap --seeds 0 1 2 3 4 --jobs 2

The learning rate stays constant after the warm-up: one that falls to zero hides staleness, and long
trainings spend most of their time at a high one. Every arm differs from the synchronous one, which
refreshes every 10 steps, in what its name says:

- asynchronous with all defaults, with other delays, with another start, with half the period;
- frozen: no period ends in a refresh after half of the steps;
- naive: everything delayed by a period, and no extra refreshes while the factors are young;
- perturbed: synchronous, the first weights changed by 1e-6. How far its loss goes is the noise.

Model and data are those of ``examples/train_gpt.py``. Every finished run is stored under ``--out``
as one file, so a benchmark that was killed continues where it was.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import asteria
from benchmarks.measurement import describe_machine, format_table, write_json
from benchmarks.processes import execute_missing
from benchmarks.runs import RAISE, Lab, Record, Run, Runner, final, finite, optimizer_ms, set_up
from benchmarks.staleness_plot import plot

TARGET = 0.01  # nats that asynchronous refreshes with all defaults may cost
PERIOD = 10
DELAYS = (0, 1, 2, 5, 10, 50)
OPTIMIZERS = ("soap", "klshampoo", "klsoap")
LR = 4e-3  # after the warm-up; for KL-SOAP much better than half of it too (1.82 against 1.97)
BASELINE, NOISE, DEFAULT = "synchronous", "perturbed", "asynchronous"
JUDGED = (BASELINE, NOISE, DEFAULT, "delay 0")
Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to refresh."""

    label: str
    runtime: Fields = (("refresh", "sync"),)
    period: int = PERIOD
    delay: int | None = None  # where it stands on the axis of delays, if it does
    frozen: bool = False
    perturbation: float | None = None


def asynchronous(**settings: Any) -> Fields:
    """Fields of the RuntimeConfig: those at their default are left out, so arms can be equal."""
    usual = asteria.RuntimeConfig()
    changed = {name: value for name, value in settings.items() if value != getattr(usual, name)}
    return (("refresh", "async"), *changed.items())


def make_arms() -> dict[str, Arm]:
    """All arms by name; the usual delay and the usual start are those of the default arm."""
    usual = asteria.RuntimeConfig()
    label = f"asynchronous, all defaults (delay {usual.staleness}, {usual.start} start)"
    delays = {
        f"delay {delay}": Arm(
            label=f"asynchronous, delay {delay}",
            runtime=asynchronous(staleness=delay),
            delay=delay,
        )
        for delay in DELAYS
        if delay != usual.staleness
    }
    starts = {
        f"{start} start": Arm(
            label=f"asynchronous, {start} start", runtime=asynchronous(start=start)
        )
        for start in ("fresh", "eigh", "adam")
        if start != usual.start
    }
    half = PERIOD // 2
    naive = asynchronous(start="eigh", staleness=PERIOD)
    return {
        BASELINE: Arm(label="synchronous"),
        NOISE: Arm(label="synchronous, perturbed by 1e-6", perturbation=1e-6),
        DEFAULT: Arm(label=label, runtime=asynchronous(), delay=usual.staleness),
        **delays,
        **starts,
        f"period {half}": Arm(
            label=f"asynchronous, period {half}", runtime=asynchronous(), period=half
        ),
        "naive": Arm(label=f"naive: eigh start, delay {PERIOD}", runtime=naive),
        "frozen": Arm(label="frozen after half of the steps", frozen=True),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What all arms share."""

    optimizer: str
    lr: float
    steps: int
    seeds: tuple[int, ...]
    schedule: Literal["constant", "raised"] = "constant"

    def run(self, arm: Arm, seed: int) -> Run:
        """The run of ``arm`` with ``seed``; the warm-up is a fifth of the steps."""
        return Run(
            optimizer=self.optimizer,
            lr=self.lr,
            steps=self.steps,
            seed=seed,
            warmup=max(1, self.steps // 5),
            schedule=self.schedule,
            runtime=arm.runtime,
            options=(("precondition_frequency", arm.period),),
            frozen_after=self.steps // 2 if arm.frozen else None,
            perturbation=arm.perturbation,
        )

    def runs(self, arms: dict[str, Arm]) -> list[Run]:
        """Seed by seed, so that a study that is stopped has whole pairs."""
        return [self.run(arm, seed) for seed in self.seeds for arm in arms.values()]


def mean_and_error(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, nan where there is none; infinite if a run broke off."""
    if not all(map(math.isfinite, differences)):
        return math.inf, math.nan
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return statistics.fmean(differences), error


def compare(arms: dict[str, Arm], runner: Runner, study: Study) -> dict[str, Record]:
    """Every arm against the synchronous one, paired by seed."""
    base = [runner(study.run(arms[BASELINE], seed)) for seed in study.seeds]
    results = {}
    for name, arm in arms.items():
        records = [runner(study.run(arm, seed)) for seed in study.seeds]
        losses = [final(record) for record in records]
        gaps = [loss - final(other) for loss, other in zip(losses, base, strict=True)]
        gap, error = mean_and_error(gaps)
        pairs = zip(records, base, strict=True)
        results[name] = {
            "label": arm.label,
            "delay": arm.delay,
            "final": losses,
            "gaps": gaps,
            "gap": gap,
            "standard_error": error,
            "same_bits": all(record["loss"] == other["loss"] for record, other in pairs),
            "optimizer_ms": optimizer_ms(records),
            "waits": [record["stats"].get("waits") for record in records],
            "wait_s": [record["stats"].get("wait_s") for record in records],
        }
    return results


def judge(results: dict[str, Record]) -> Record:
    """Whether the defaults keep to the target, how large the noise is, and whether 0 is sync."""
    noise = results[NOISE]["gaps"]
    default = results[DEFAULT]
    return {
        "target": TARGET,
        "gap": default["gap"],
        "standard_error": default["standard_error"],
        "met": default["gap"] <= TARGET,
        "noise": math.sqrt(statistics.fmean(gap * gap for gap in noise)),
        "delay_0_is_synchronous": results["delay 0"]["same_bits"],
    }


def print_results(results: dict[str, Record], verdict: Record, study: Study) -> None:
    """The table, and what it comes to."""
    rows = []
    for arm in results.values():
        losses = (f"{loss:.4f}" if math.isfinite(loss) else "-" for loss in arm["final"])
        gap = f"{arm['gap']:+.4f}" if math.isfinite(arm["gap"]) else "-"
        error = arm["standard_error"]
        shown = f"{error:.4f}" if math.isfinite(error) else "-"
        waits = [count for count in arm["waits"] if count is not None]
        counted = f"{statistics.fmean(waits):.0f}" if waits else "-"
        rows.append((arm["label"], gap, shown, *losses, f"{arm['optimizer_ms']:.1f}", counted))
    seeds = (f"seed {seed}" for seed in study.seeds)
    header = (study.optimizer, "mean gap", "std. error", *seeds, "step() ms", "waits")
    rate = f"lr {study.lr:g} {study.schedule}"
    print(f"\nvalidation loss in nats per byte after {study.steps} steps, {rate}")
    print(format_table(header, rows))
    print(f"\nnoise: a start changed by 1e-6 moves the loss by {verdict['noise']:.4f} (rms)")
    exact = "yes" if verdict["delay_0_is_synchronous"] else "NO"
    print(f"asynchronous with delay 0 repeats the synchronous losses bit for bit: {exact}")
    met = "met" if verdict["met"] else "MISSED"
    error = f"standard error {verdict['standard_error']:.4f}"
    print(f"asynchronous with all defaults: mean gap {verdict['gap']:+.4f} nats ({error})", end="")
    print(f", at most {TARGET}: {met}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; several jobs have one thread each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence --staleness",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="soap")
    add("--lr", type=float, default=LR, help="after the warm-up (default 4e-3)")
    add("--steps", type=int, default=300, help="a fifth of them warm-up (default 300)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    add("--raised", action="store_true", help=f"the rate is {RAISE:g} times as high from half on")
    add("--arms", nargs="+", metavar="ARM", help="beside those that are judged (default: all)")
    add("--jobs", type=int, default=1, help="runs at a time, of one thread each if several")
    add("--threads", type=int, help="of torch; the bits depend on it (default: torch's own)")
    add("--out", type=Path, default=Path("runs/staleness"), help="finished runs")
    add("--json", type=Path, help="write all results here, and a plot beside it")
    add("--quick", action="store_true", help="a tiny model, 30 steps: tests the benchmark only")
    args = parser.parse_args(argv)
    if args.jobs < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--jobs and --threads must be at least 1")
    if args.jobs > 1:
        if args.threads not in (None, 1):
            parser.error(f"several jobs have one thread each, found --threads {args.threads}")
        args.threads = 1
    if unknown := set(args.arms or ()) - make_arms().keys():
        parser.error(f"unknown arms {sorted(unknown)}, known are {sorted(make_arms())}")
    args.steps = 30 if args.quick else args.steps
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the study, then print and write its results."""
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    task, corpus = set_up(quick=args.quick, threads=args.threads)
    seeds = tuple(args.seeds)
    study = Study(
        optimizer=args.optimizer,
        lr=args.lr,
        steps=args.steps,
        seeds=seeds,
        schedule="raised" if args.raised else "constant",
    )
    arms = {n: arm for n, arm in make_arms().items() if n in (*JUDGED, *(args.arms or [n]))}
    for arm in arms.values():  # what is refused is refused before anything is trained
        asteria.RuntimeConfig(**dict(arm.runtime))
    runs = study.runs(arms)
    with tqdm(total=len(runs) * study.steps, unit="step", smoothing=0.05) as bar:
        lab = Lab(task, corpus, args.out, bar)
        if args.jobs > 1:
            execute_missing(lab, runs, args.jobs)
        for run in runs:
            lab(run)
    results = compare(arms, lab, study)
    verdict = judge(results)
    print_results(results, verdict, study)
    if lab.outdated:
        print(f"{lab.outdated} runs in {args.out} were made with another version of asteria")
    if args.json:
        settings = asdict(study) | {"task": asdict(task), "jobs": args.jobs}
        report = {"benchmark": "staleness", "machine": describe_machine(), "settings": settings}
        report |= {"arms": results, "verdict": verdict, "runs": lab.summary()}
        write_json(args.json, finite(report))
        plot(results, verdict, study.optimizer, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
