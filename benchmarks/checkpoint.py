"""Saving and loading a state that is larger than memory, by torch.distributed.checkpoint.

    python -m benchmarks.checkpoint --json benchmarks/results/checkpoint.json

A child process trains with a host budget far below its state, which lies on NVMe, saves it, and
loads it into a new optimizer of the same budget. Its resident memory is read from outside, peaks
included. With ``--plain`` every tensor is read before it is saved, as other optimizers' are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import asteria
from asteria.config.runtime import parse_bytes
from benchmarks.measurement import describe_machine, format_table, write_json
from benchmarks.streaming import resident_bytes

ALLOWED_SHARE = 0.1
"""Of the state: what a process may grow by while it saves or loads it."""
PHASES = ("save", "load")


class Run:
    """Square matrices with constant gradients, and their optimizer under a budget."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        shape = (args.side, args.side)
        self.model = nn.ParameterList([torch.randn(shape) for _ in range(args.matrices)])
        for parameter in self.model:
            parameter.grad = torch.randn(shape)
        # Identity bases: what they are makes no difference to their bytes.
        options = {"host_budget": args.budget, "nvme_path": args.path, "start": "adam"}
        self.optimizer = asteria.SOAP(
            self.model.parameters(),
            precondition_frequency=10**6,
            runtime=asteria.RuntimeConfig(**options),
        )

    def state(self) -> Any:
        """As torch.distributed.checkpoint takes it."""
        return {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}

    def rest(self) -> None:
        """Wait until what was written behind is written."""
        for door in self.optimizer._engine._residence._doors.values():
            door.flush()


def save(run: Run, folder: str, *, plain: bool) -> None:
    """Write the state of ``run``; with ``plain`` all of it is in memory before."""
    state = run.state()
    if plain:
        entries = state["optimizer"]["state"]
        for name in entries:
            entries[name] = {key: tensor.clone() for key, tensor in entries[name].items()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def load(run: Run, folder: str) -> None:
    """Read the state of ``run``, by way of its own."""
    state = run.state()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])


def child(args: argparse.Namespace) -> None:
    """Train, save and load; tells its parent when to look."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory(dir=args.path, prefix="checkpoint-") as folder:
        saved, loaded = Run(args), Run(args)
        for run, steps in ((saved, args.steps), (loaded, 1)):
            for _ in range(steps):
                run.optimizer.step()
            run.rest()
        when_told("save", lambda: save(saved, folder, plain=args.plain))
        files = sum(file.stat().st_size for file in Path(folder).iterdir())
        when_told("load", lambda: load(loaded, folder))
        stats = saved.optimizer.stats()
        facts = {"tiers": stats.tier_bytes, "file_bytes": files, "same": same(saved, loaded)}
        print(json.dumps(facts), flush=True)


def when_told(phase: str, work: Callable[[], None]) -> None:
    """Do ``work`` when the parent says so, and tell how many seconds it took."""
    print(phase, flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    work()
    print(json.dumps(time.perf_counter() - start), flush=True)
    sys.stdin.readline()


def same(saved: Run, loaded: Run) -> bool:
    """Whether the last matrix has the same state in both."""
    ours, theirs = (run.optimizer.state[run.model[-1]] for run in (saved, loaded))
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The growth of a child in each phase, seen from outside."""
    options = [f"--{name}={getattr(args, name)}" for name in ("side", "matrices", "steps")]
    options += [f"--budget={args.budget}", f"--path={args.path}"]
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--child", *options]
    command += ["--plain"] if args.plain else []
    report: dict[str, Any] = {}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the child has no pipes")
        for phase in PHASES:
            process.stdout.readline()
            Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")
            before = resident_bytes(process.pid, "VmRSS")
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds = json.loads(process.stdout.readline())
            peak = resident_bytes(process.pid, "VmHWM") - before
            process.stdin.write("on\n")
            process.stdin.flush()
            report[phase] = {"seconds": seconds, "resident_bytes": before, "peak_growth": peak}
        facts = json.loads(process.stdout.readline())
    state = 6 * 4 * args.side**2 * args.matrices
    grown = max(report[phase]["peak_growth"] for phase in PHASES)
    return {
        **report,
        **facts,
        "state_bytes": state,
        "budget_bytes": parse_bytes(args.budget),
        "met": grown <= ALLOWED_SHARE * state and facts["same"],
    }


def text_of(report: dict[str, Any]) -> str:
    """The figures in Markdown."""
    machine, found = report["machine"], report["figures"]
    load_average = " / ".join(str(value) for value in machine["load_average"])
    rows = [
        (name, f"{found[key] / 1e6:.0f}", "")
        for name, key in (
            ("state", "state_bytes"),
            ("host budget", "budget_bytes"),
            ("files of the checkpoint", "file_bytes"),
        )
    ]
    rows += [
        (
            f"peak growth of the process, {phase}",
            f"{found[phase]['peak_growth'] / 1e6:.0f}",
            f"{found[phase]['seconds']:.1f} s",
        )
        for phase in PHASES
    ]
    head = f"{machine['cpu']}, {machine['cores']} cores, load before {load_average}."
    return f"{head}\n\n{format_table(('checkpoint', 'MB', ''), rows)}\n"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--path", default=tempfile.gettempdir(), help="a folder on the disk")
    add("--side", type=int, default=1024, help="of the square matrices")
    add("--matrices", type=int, default=160)
    add("--budget", default="512MB", help="of host memory")
    add("--steps", type=int, default=2, help="before the state is saved")
    add("--plain", action="store_true", help="read every tensor before saving")
    add("--json", type=Path, metavar="FILE", help="write the report here, and .md beside")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the report."""
    args = parse_arguments(argv)
    if args.child:
        child(args)
        return
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "path", "child")}
    machine = describe_machine(["tensorstore"])
    report = {
        "benchmark": "checkpoint",
        "machine": machine,
        "settings": settings,
        "figures": measure(args),
    }
    text = text_of(report)
    print(text)
    if args.json:
        write_json(args.json, report)
        args.json.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
