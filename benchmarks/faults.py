"""What an optimizer does when something goes wrong: one kind of fault per row, then all of them.

A small byte-level GPT learns the source of the standard library with RuntimeConfig's defaults while
faults strike at random steps. Every fault must be found in the optimizer's counters, the run must
end with finite weights, with the bits of the undisturbed run of the same seed where nothing was
lost, else with its loss up to the noise, and the process must end cleanly.

    python -m benchmarks.faults --json benchmarks/results/faults.json

Exits with status 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.fault_rows import ALL, ROWS, UNDISTURBED, Row
from benchmarks.fault_run import Plan
from benchmarks.faults_plot import plot
from benchmarks.measurement import describe_machine, format_table, write_json

Record = dict[str, Any]

WIDTH = 3.0
"""Standard deviations that a row's final loss may be off."""
EXIT_S = 15.0
"""Longest end of a process. Workers may hold it up for half a second, a busy machine for more."""
QUICK_STEPS = 60
MANY_STEPS = 500
"""Steps from which on chance leaves no kind of fault out."""


def launch(plan: Plan, on_steps: Callable[[int], None]) -> Record:
    """Do one run in a process of its own; what it recorded, and how it ended under "exit"."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "errors", "w+") as errors:
        file = Path(folder) / "record.json"
        command = ["-m", "benchmarks.fault_run", json.dumps(asdict(plan)), str(file)]
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        # A run that hangs is what we are here to find.
        killer = threading.Timer(120 + plan.steps / 2, process.kill)
        killer.start()
        ended_s = math.nan
        try:
            for line in process.stdout or ():
                if line.strip() == "end":
                    ended_s = time.monotonic()
                else:
                    on_steps(int(line))
            code = process.wait()
        finally:
            killer.cancel()
            process.kill()
            if process.stdout is not None:
                process.stdout.close()
        exit_s = time.monotonic() - ended_s
        errors.seek(0)
        record: Record = json.loads(file.read_text()) if file.exists() else {}
        ending = {"code": code, "seconds": None if math.isnan(exit_s) else exit_s}
        return {**record, "exit": {**ending, "stderr": errors.read()[-2000:]}}


def ending_problems(record: Record) -> list[str]:
    """What was wrong with the end of a run's process."""
    ending, problems = record["exit"], []
    if "loss" not in record or ending["seconds"] is None:
        problems.append("training did not end")
    elif ending["seconds"] > EXIT_S:
        problems.append(f"the process took {ending['seconds']:.1f} s to end")
    if ending["code"] != 0:
        problems.append(f"the process ended with status {ending['code']}")
    if ending["stderr"]:
        problems.append("the process complained: " + ending["stderr"].strip().splitlines()[-1])
    return problems


def judge(row: Row, record: Record, undisturbed: Record, noise: float) -> list[str]:
    """Why ``record`` is not what ``row`` asks for; nothing if it is.

    ``noise``: standard deviation of the difference of two final losses.
    """
    problems = ending_problems(record)
    if "loss" not in record:
        return problems
    problems += record["problems"]
    if not record["weights_finite"] or record["final"] is None:
        return [*problems, "a weight or a loss is not finite"]
    missing = sorted({*row.jobs, *row.loop} - record["injected"].keys())
    if missing and (len(record["loss"]) >= MANY_STEPS or not record["injected"]):
        problems.append("never happened: " + ", ".join(missing))
    if undisturbed.get("final") is None:
        return problems
    if row.outcome == "same bits":
        if record["loss"] != undisturbed["loss"] or record["final"] != undisturbed["final"]:
            problems.append("not the bits of the undisturbed run")
    elif abs(record["final"] - undisturbed["final"]) > WIDTH * noise:
        problems.append(f"the final loss is off by more than {WIDTH:g} standard deviations")
    return problems


def evaluate(seeds: Mapping[int, Record], rows: Mapping[str, Record]) -> Record:
    """Losses against the noise, and what failed, by row; the first seed is the rows' own."""
    finals = [r["final"] for r in seeds.values() if r.get("final") is not None]
    # Of a difference: the row's loss and the undisturbed one are both draws.
    noise = math.sqrt(2) * statistics.stdev(finals) if len(finals) > 1 else 0.0
    undisturbed = next(iter(seeds.values()))
    failed = {
        f"{UNDISTURBED}, seed {seed}": judge(ROWS[UNDISTURBED], record, record, noise)
        for seed, record in seeds.items()
    }
    failed |= {name: judge(ROWS[name], record, undisturbed, noise) for name, record in rows.items()}
    for name, record in rows.items():
        twin = rows.get(ROWS[name].twin or "", record)
        if record.get("loss") != twin.get("loss"):
            failed[name].append(f"not the bits of the row {ROWS[name].twin!r}")
    return {
        "noise": noise,
        "undisturbed": finals,
        "failed": {name: problems for name, problems in failed.items() if problems},
    }


def results_table(seeds: Mapping[int, Record], rows: Mapping[str, Record], found: Record) -> str:
    """The table for people."""
    base = next(iter(seeds.values())).get("final")
    lines = []
    named = {f"{UNDISTURBED}, seed {seed}": (UNDISTURBED, r) for seed, r in seeds.items()}
    for name, (kind, record) in (named | {name: (name, r) for name, r in rows.items()}).items():
        final, row = record.get("final"), ROWS[kind]
        off = "-" if final is None or base is None else f"{final - base:.4f}"
        by_noise = (
            "-" if off == "-" or not found["noise"] else f"{(final - base) / found['noise']:.2f}"
        )
        dropped = sum(record.get("dropped", {}).values())
        own = kind != UNDISTURBED
        lines.append(
            (
                name,
                str(sum(record.get("injected", {}).values())) if own else "-",
                str(dropped) if own else "-",
                "-" if final is None else f"{final:.4f}",
                off,
                by_noise,
                row.outcome if own else "-",
                "FAILED" if name in found["failed"] else "ok",
                row.check,
            )
        )
    header = ("fault", "injected", "dropped", "loss", "off by", "/ noise", "asked for", "", "check")
    return format_table(header, lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=("soap", "klshampoo", "klsoap"), default="soap", help="trains")
    add("--steps", type=int, default=1000, help="of each run; a fifth of them warm-up")
    add("--seeds", type=int, default=5, help="undisturbed runs; faults strike the first seed")
    rows = [name for name in ROWS if name != UNDISTURBED]
    add("--rows", nargs="*", choices=rows, default=rows, metavar="FAULT", help="names of the table")
    add("--quick", action="store_true", help=f"a tiny model, {QUICK_STEPS} steps: tests itself")
    add("--json", type=Path, metavar="FILE", help="write the report here, and a plot beside it")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps = QUICK_STEPS
    for name, least in (("steps", 40), ("seeds", 2)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, found {getattr(arguments, name)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Do all runs, print the table, write the report; status 1 if a row fails."""
    arguments = parse_arguments(argv)
    common = {name: getattr(arguments, name) for name in ("optimizer", "steps", "quick")}
    plans = [Plan(row=UNDISTURBED, seed=seed, **common) for seed in range(arguments.seeds)]
    plans += [Plan(row=name, **common) for name in arguments.rows]
    seeds: dict[int, Record] = {}
    rows: dict[str, Record] = {}
    with tqdm(total=len(plans) * arguments.steps, unit="step", dynamic_ncols=True) as bar:
        for number, plan in enumerate(plans, 1):
            bar.set_description(f"{plan.row}, seed {plan.seed}")
            record = launch(plan, lambda count: bar.update(count) and None)
            bar.update(number * arguments.steps - bar.n)
            if plan.row == UNDISTURBED:
                seeds[plan.seed] = record
            else:
                rows[plan.row] = record
    found = evaluate(seeds, rows)
    print(results_table(seeds, rows, found))
    for name, problems in found["failed"].items():
        print(f"{name}: {'; '.join(problems)}")
    print(
        f"noise: {found['noise']:.4f}, standard deviation of the difference of two of the "
        f"{arguments.seeds} undisturbed seeds. Dropped: never installed, hence in no counter "
        "but worker_deaths"
    )
    if ALL in rows and "counted" in rows[ALL]:
        print(f"{ALL}, counted: {rows[ALL]['counted']}, caught: {rows[ALL]['caught']}")
    if arguments.json is not None:
        report = {
            "benchmark": "faults",
            "machine": describe_machine(),
            "settings": {**common, "seeds": arguments.seeds, "task": asdict(plans[0].task)},
            **found,
            "seeds": seeds,
            "rows": rows,
        }
        write_json(arguments.json, report)
        plot(report, arguments.json.with_suffix(".png"))
    if found["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
