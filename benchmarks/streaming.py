"""Training with a state larger than its memory: does the budget hold, and what does it cost?

    python -m benchmarks.streaming --json benchmarks/results/streaming.json

Two tables. *Memory*: a child process trains with a host budget far below its state; its resident
memory is read from outside, peak included, and compared with the budget and with what
`asteria.plan` has predicted for each tier. *Speed*: steps of one optimizer with all state in
memory, and of one whose state streams from disk, in turns with a bare O_DIRECT loop over files of
the same size; a step may take 1.25 times the bytes moved over the bare rates, plus the update
itself, which is the step in memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import asteria
from asteria.config.runtime import parse_bytes
from benchmarks.measurement import (
    describe_machine,
    format_table,
    progress_bar,
    summarize,
    write_json,
)
from benchmarks.tiers import MIB, BareDisk, Blocks

ALLOWED_GROWTH = 1.15
"""Of the budget; code and stacks of threads are not state."""
ALLOWED_ERROR = 0.02
ALLOWED_TIME = 1.25
"""Of the bytes moved over the bare rates."""


def build(side: int, matrices: int, **runtime: Any) -> asteria.SOAP:
    """An optimizer of square matrices with constant gradients."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(side, side)) for _ in range(matrices)]
    for parameter in parameters:
        parameter.grad = torch.randn(side, side)
    return asteria.SOAP(parameters, runtime=asteria.RuntimeConfig(**runtime))


def child(args: argparse.Namespace) -> None:
    """Train under the budget; tells its parent when to look."""
    # Without first bases, which take minutes at this size; refreshes run as they always do.
    runtime = {"start": "adam", "host_budget": args.budget, "nvme_path": args.path}
    optimizer = build(args.side, args.matrices, **runtime)
    # What libraries take when they are first used is not the optimizer's.
    sample = torch.randn(args.side, args.side)
    torch.linalg.eigh(sample @ sample.mT)
    del sample
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(args.steps):
        optimizer.step()
    time.sleep(2)  # until what was written behind is written
    stats = optimizer.stats()
    facts = {"tiers": dict(stats.tier_bytes), "in_flight": stats.in_flight}
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()


def resident_bytes(pid: int, field: str) -> int:
    """Of another process, ``VmRSS`` or ``VmHWM``, its peak."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_table(args: argparse.Namespace) -> dict[str, Any]:
    """What a process with a budget takes, seen from outside."""
    options = [f"--{name}={getattr(args, name)}" for name in ("side", "matrices", "steps")]
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", *options]
    command += [f"--budget={args.budget}", f"--path={args.path}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the child has no pipes")
        process.stdout.readline()
        Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")
        before = resident_bytes(process.pid, "VmRSS")
        process.stdin.write("go\n")
        process.stdin.flush()
        facts = json.loads(process.stdout.readline())
        peak = resident_bytes(process.pid, "VmHWM") - before
        now = resident_bytes(process.pid, "VmRSS") - before
        process.stdin.write("end\n")
    runtime = asteria.RuntimeConfig(start="adam", host_budget=args.budget, nvme_path=args.path)
    plan = asteria.plan([(args.side, args.side)] * args.matrices, runtime=runtime)
    budget = parse_bytes(args.budget)
    at = plan.memory.bytes_at or {}
    predicted = {
        "device": at.get("device", 0) + plan.memory.window_bytes,
        "nvme": at.get("nvme", 0) + plan.memory.waiting_bytes,
    }
    found = {tier: facts["tiers"][tier] for tier in predicted}
    errors = {tier: found[tier] / max(1, predicted[tier]) - 1 for tier in predicted}
    return {
        "state_bytes": plan.memory.state_bytes,
        "budget_bytes": budget,
        "growth_bytes": now,
        "peak_growth_bytes": peak,
        "peak_to_budget": peak / max(1, budget),
        "predicted_bytes": predicted,
        "found_bytes": found,
        "errors": errors,
        "in_flight": facts["in_flight"],
        "met": peak <= ALLOWED_GROWTH * budget
        and all(abs(error) <= ALLOWED_ERROR for error in errors.values()),
    }


def speed_table(args: argparse.Namespace) -> dict[str, Any]:
    """What streaming costs, in turns with the bare disk."""
    # Identity bases and no refresh: a step is its products, and what moves.
    plain: dict[str, Any] = {"start": "adam", "refresh": "sync"}
    matrices = max(1, args.matrices // 4)
    near = build(args.side, matrices, **plain)
    away = build(args.side, matrices, **plain, host_budget=args.budget, nvme_path=args.path)
    for optimizer in (near, away):
        optimizer.param_groups[0]["precondition_frequency"] = 10**6
    count = max(args.depth, 512 // args.mib)
    blocks = Blocks(args.mib * MIB, args.depth)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=args.path, prefix="streaming-") as folder:
        disk = BareDisk(Path(folder), blocks, count)
        for number in progress_bar(range(args.rounds + 2), "speed"):
            turn = one_round(near, away, disk, count * args.mib * MIB)
            if number >= 2:  # the first bring the state to the disk
                rounds.append(turn)
        disk.close()
    near.close()
    away.close()
    # Nothing moves if the budget is enough for all of it.
    ratios = [
        (turn["away_s"] - turn["near_s"]) / turn["disk_s"] for turn in rounds if turn["disk_s"]
    ] or [0.0]
    return {
        "rounds": rounds,
        **{name: summarize([turn[name] for turn in rounds]) for name in rounds[0]},
        "ratio": summarize(ratios),
        "met": summarize(ratios)["p50"] <= ALLOWED_TIME,
    }


def one_round(
    near: asteria.SOAP, away: asteria.SOAP, disk: BareDisk, nbytes: int
) -> dict[str, float]:
    """A step of each, and the rates of the bare disk."""
    near_s = timed(near.step)
    write_s, read_s = timed(disk.write), timed(disk.read)
    disk.clear()
    before = away.stats().traffic
    away_s = timed(away.step)
    after = away.stats().traffic
    read = after.read_bytes - before.read_bytes
    written = after.written_bytes - before.written_bytes
    return {
        "near_s": near_s,
        "away_s": away_s,
        "disk_s": read * read_s / nbytes + written * write_s / nbytes,
        "read_bytes": float(read),
        "written_bytes": float(written),
        "wait_s": after.wait_s - before.wait_s,
    }


def timed(work: Any) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def text_of(report: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    machine, memory, speed = report["machine"], report["memory"], report["speed"]
    load = " / ".join(str(value) for value in machine["load_average"])
    text = [f"{machine['cpu']}, {machine['cores']} cores, load before {load}.", ""]
    if memory:
        rows = [
            ("state", f"{memory['state_bytes'] / 1e6:.0f}", ""),
            ("budget", f"{memory['budget_bytes'] / 1e6:.0f}", ""),
            (
                "peak growth of the process",
                f"{memory['peak_growth_bytes'] / 1e6:.0f}",
                f"{memory['peak_to_budget']:.2f} of the budget, allowed {ALLOWED_GROWTH}",
            ),
        ]
        for tier, found in memory["found_bytes"].items():
            predicted = memory["predicted_bytes"][tier] / 1e6
            error = f"{100 * memory['errors'][tier]:+.1f} % of the {predicted:.0f} predicted"
            rows.append((f"on {tier}", f"{found / 1e6:.0f}", error))
        text += [format_table(("memory", "MB", ""), rows), ""]
    if speed:
        rows = [
            ("step, all in memory", *spread(speed["near_s"])),
            ("bytes moved over the bare rates", *spread(speed["disk_s"])),
            ("step, streaming", *spread(speed["away_s"])),
            ("of it waiting for state", *spread(speed["wait_s"])),
            (f"what streaming adds, of the bare disk; {ALLOWED_TIME}", *spread(speed["ratio"])),
        ]
        text += [format_table(("speed", "median", "10th to 90th percentile"), rows), ""]
    return "\n".join(text)


def spread(summary: dict[str, float]) -> tuple[str, str]:
    """The median, and the percentiles about it."""
    return f"{summary['p50']:.2f}", f"{summary['p10']:.2f} to {summary['p90']:.2f}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--path", default=tempfile.gettempdir(), help="a folder on the disk")
    add("--side", type=int, default=1024, help="of the square matrices")
    add("--matrices", type=int, default=160, help="a quarter of them for the speed")
    add("--budget", default="512MB", help="of host memory")
    add("--steps", type=int, default=15, help="for the memory; refreshes come every tenth")
    add("--mib", type=int, default=8, help="blocks of the bare disk, about what the state has")
    add("--depth", type=int, default=4, help="blocks in flight on the bare disk")
    add("--rounds", type=int, default=7, help="counted turns of the speed")
    add("--only", choices=("memory", "speed"), help="one of the tables")
    add("--json", type=Path, metavar="FILE", help="write the report here, and .md beside")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and write the report."""
    args = parse_arguments(argv)
    if args.child:
        child(args)
        return
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "path", "child")}
    report = {
        "benchmark": "streaming",
        "machine": describe_machine(["tensorstore"]),
        "settings": settings,
        "speed": speed_table(args) if args.only != "memory" else {},
        "memory": memory_table(args) if args.only != "speed" else {},
    }
    text = text_of(report)
    print(text)
    if args.json:
        write_json(args.json, report)
        args.json.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
