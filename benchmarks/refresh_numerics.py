"""How near refreshes keep eigenbases to those of real factors, and what breaks them.

    python -m benchmarks.refresh_numerics --json benchmarks/results/refresh_numerics.json

1. A GPT of width 128 trains for 300 steps (or the recorded file of ``--stream`` is read). Every
   gradient is given to all trackers, for the factors of a few weights. off is the norm of
   Q^T L Q off its diagonal, relative to that of L; kl = mean log of q^T L q less mean log of L's
   eigenvalues, each with 1e-7 of the largest added: 0 in the eigenbasis, and small eigenvalues
   count as much as large ones. Both after the refresh, mean over the steps.
2. 10,000 refreshes of factors that are singular, or nearly: how many give no usable basis.
3. 3,000 steps of a factor that is kept in its eigenbasis: whether errors grow.

On one thread: rounding depends on their number. Factors of 512 take most of the half hour.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from asteria.linalg.eigenbasis import eigh_basis
from benchmarks.factor_stream import Stream, load, record
from benchmarks.measurement import describe_machine, format_table, write_json
from benchmarks.near_singular import count_breakdowns, drifts
from benchmarks.refresh_trackers import Tracker, make_trackers

Record = dict[str, Any]
WEIGHTS = ("blocks.1.v.weight", "blocks.1.up.weight", "blocks.1.down.weight", "head.weight")
FLOOR = 1e-7
METHODS = {"ldlr": "ldlr", "qr": "qr", None: "CholeskyQR2 of L Q"}


def follow(stream: Stream, side: str, trackers: list[Tracker], bar: tqdm) -> list[float]:
    """Let all trackers follow one factor; returns its largest condition number, and the last."""
    conditions = []
    for step, (factor, gradient) in enumerate(
        zip(stream.factors(side), stream.gradients, strict=True)
    ):
        exact = factor.double()
        spectrum = torch.linalg.eigvalsh(exact[0]).clamp_min(0)
        floor = FLOOR * float(spectrum[-1])
        conditions.append(float(spectrum[-1] / spectrum[0].clamp_min(1e-300)))
        if step == 0:
            start = eigh_basis(factor).basis
            for tracker in trackers:
                tracker.begin(factor, start)
            continue
        log_spectrum = float((spectrum + floor).log().sum())
        for tracker in trackers:
            tracker.advance(step, factor, gradient if side == "left" else gradient.mT)
            tracker.measure(exact, log_spectrum, floor)
        bar.update()
    return [max(conditions), conditions[-1]]


def compare(streams: dict[str, Stream], largest: int) -> list[Record]:
    """One record for every factor of at most this size."""
    places = [
        (name, side)
        for name, stream in streams.items()
        for side in ("left", "right")
        if len(getattr(stream, side)) <= largest
    ]
    results = []
    total = sum(len(streams[name].gradients) - 1 for name, _ in places)
    with tqdm(total=total, unit="step") as bar:
        for name, side in places:
            bar.set_description(f"{name} {side}")
            trackers = make_trackers()
            conditions = follow(streams[name], side, trackers, bar)
            results.append(
                {
                    "factor": f"{name.removesuffix('.weight')} {side}",
                    "size": len(getattr(streams[name], side)),
                    "condition": conditions,
                    "trackers": {tracker.label: _summary(tracker) for tracker in trackers},
                }
            )
    return results


def _summary(tracker: Tracker) -> Record:
    return {
        "off": statistics.fmean(tracker.off),
        "kl": statistics.fmean(tracker.kl),
        "orthogonality": tracker.orthogonality,
        "failures": tracker.failures,
    }


def print_results(results: list[Record], breakdowns: Record, drift: Record) -> None:
    """The tables."""
    labels = list(results[0]["trackers"])
    heads = [f"{r['factor']} ({r['size']})" for r in results]
    for what, form in (("off", ".4f"), ("kl", ".4f"), ("orthogonality", ".0e"), ("failures", "d")):
        rows = [
            (label, *(format(result["trackers"][label][what], form) for result in results))
            for label in labels
        ]
        print(f"\n{what}")
        print(format_table(("", *heads), rows))
    print("\nconditions, largest and last:")
    print(
        "  ".join(f"{r['factor']} {r['condition'][0]:.0e} {r['condition'][1]:.0e}" for r in results)
    )
    print("\nnear-singular factors")
    names = ("refreshes", "on_device", "saved", "kept", "unhandled")
    header = ("", "refreshes", "no basis at once", "saved", "kept", "unhandled")
    print(format_table(header, [(m, *(str(o[n]) for n in names)) for m, o in breakdowns.items()]))
    for name, points in drift.items():
        errors = [error for _, error, _ in points]
        print(
            f"kept in its eigenbasis, {name}: error {errors[0]:.1e} after {points[0][0]} steps, "
            f"{errors[-1]:.1e} after {points[-1][0]}, at most {max(errors):.1e}"
        )


def plot(results: list[Record], drift: Record, path: Path) -> None:
    """kl of every tracker, a dot for each factor, and the drift."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    labels = list(results[0]["trackers"])[::-1]
    for result in results:
        values = [result["trackers"][label]["kl"] for label in labels]
        left.plot(
            values, range(len(labels)), "o", ms=4, label=f"{result['factor']} ({result['size']})"
        )
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.set(xscale="log", xlabel="kl to the eigenbasis, mean over the steps")
    left.legend(fontsize=7, frameon=False, loc="lower right")
    for (name, points), color in zip(drift.items(), ("#0072B2", "#D55E00"), strict=True):
        steps, errors, _ = zip(*points, strict=True)
        right.plot(steps, errors, color=color, label=name)
    right.set(
        yscale="log", xlabel="step", ylabel="relative error of a factor kept in its eigenbasis"
    )
    right.legend(frameon=False)
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """All three studies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--stream", type=Path, help="a file of benchmarks.factor_stream; else a run is recorded")
    add("--width", type=int, default=128, help="of the recorded model (default 128)")
    add("--steps", type=int, default=300, help="of the recorded run (default 300)")
    add("--largest", type=int, default=512, help="size of a factor that is followed (default 512)")
    add("--refreshes", type=int, default=10_000, help="of near-singular factors (default 10000)")
    add("--drift", type=int, default=3000, help="steps of the drift (default 3000)")
    add("--json", type=Path, help="write all results here, and a plot beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.stream:
        streams = load(args.stream)
    else:
        first = max(1, min(20, args.steps // 2))
        count = args.steps - first
        streams = record(WEIGHTS, width=args.width, first=first, count=count, steps=args.steps)
    results = compare(streams, args.largest)
    breakdowns = {
        label: asdict(count_breakdowns(method, args.refreshes)) for method, label in METHODS.items()
    }
    drift = drifts(args.drift, every=max(1, args.drift // 60))
    print_results(results, breakdowns, drift)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        report = {"benchmark": "refresh_numerics", "machine": describe_machine()}
        report |= {"settings": settings, "factors": results}
        write_json(args.json, report | {"near_singular": breakdowns, "drift": drift})
        plot(results, drift, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
