"""Whether refreshes hide behind the device: synchronous, asynchronous and none, step by step.

    python -m benchmarks.overlap --json results/overlap.json

Without an accelerator one is emulated: where it would run forward and backward the training thread
sleeps, and the gradients come from a pool (low rank and noise). The update is real. Torch has one
thread in the training thread, and the asynchronous optimizer one worker, so that two cores are
enough. With an accelerator (``--device cuda``) it runs forward and backward of the example's GPT;
the training thread then waits for it before and after ``step()``, so that both times are whole.

Each contender trains weights of its own, in turn in one process. A turn is made so that
asynchronous refreshes neither gain from the time of the others nor disturb them:

1. One period of steps is not counted. Afterwards whatever a worker had finished ahead is used up,
   and it has as much to do as in a training without pauses.
2. The counted steps: whole periods, so that every turn has as many synchronous refreshes.
3. Nothing runs until the workers are idle, which the processor time of the process tells.

All start with exact eigenbases and no extra refreshes (``start="eigh"``), and skip the steps before
the first turn: only the steady state is measured.
"""

import argparse
import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import asteria
from benchmarks.measurement import (
    describe_machine,
    format_table,
    progress_bar,
    read_stats,
    summarize,
    write_json,
)
from benchmarks.overlap_plot import plot
from benchmarks.runs import NEVER
from benchmarks.shapes import TABLES, Shape
from examples import train_gpt as example

OPTIMIZERS = {"soap": asteria.SOAP, "klshampoo": asteria.KLShampoo, "klsoap": asteria.KLSOAP}
SYNC, ASYNC, NEVER_REFRESHED = "synchronous", "asynchronous", "never refreshed"
SYNC_SPREAD, ASYNC_SPREAD, EXTRA = 1.5, 1.1, 1.1  # targets: p99 / p50, and mean over never's mean
MODEL = {"context": 512, "width": 768, "layers": 6, "heads": 12}  # on a real accelerator
BATCH = 16
RANK, POOL = 4, 8
IDLE_WINDOW_S, IDLE_SHARE, IDLE_LIMIT_S = 0.05, 0.1, 60.0
ForwardBackward = Callable[[int], None]


@dataclass(kw_only=True)
class Contender:
    """One way to refresh, its weights, and the times of its counted steps."""

    settings: str
    optimizer: torch.optim.Optimizer
    forward_backward: ForwardBackward
    """Leaves the gradients of a step, given by its number."""
    synchronize: Callable[[], None] = lambda: None
    """Waits until the device is done."""
    steps: int = 0
    step_ms: list[float] = field(default_factory=list)
    visible_ms: list[float] = field(default_factory=list)
    """Time that the optimizer adds to the step: its ``step()``."""
    waits: list[int] = field(default_factory=list)
    """How often the step had to wait for a worker."""

    def step(self, *, counted: bool) -> None:
        """One training step."""
        waits = self._waits() if counted else 0
        begin_s = time.perf_counter()
        self.forward_backward(self.steps)
        self.synchronize()
        middle_s = time.perf_counter()
        self.optimizer.step()
        self.synchronize()
        end_s = time.perf_counter()
        self.steps += 1
        if counted:
            self.step_ms.append(1e3 * (end_s - begin_s))
            self.visible_ms.append(1e3 * (end_s - middle_s))
            self.waits.append(self._waits() - waits)

    def _waits(self) -> int:
        count: int = read_stats(self.optimizer).get("waits", 0)
        return count


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of the measurement."""

    contender: str
    counted: bool
    last: bool  # of its contender's turn: the workers come to rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How many steps there are of what."""

    steps: int  # counted, for each contender
    block: int  # counted steps in a turn
    lead: int  # steps before them
    skip: int  # steps before the first turn

    def turns(self, names: Sequence[str]) -> list[Turn]:
        """All steps in order; the contenders take turns in an order that rotates."""
        turns = [Turn(name, False, n + 1 == self.skip) for name in names for n in range(self.skip)]
        for number in range(self.steps // self.block):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                turns += [Turn(name, False, False)] * self.lead
                turns += [Turn(name, True, n + 1 == self.block) for n in range(self.block)]
        return turns


def come_to_rest() -> float:
    """Sleep until this process uses no processor time; seconds that took.

    Raises:
        TimeoutError: Something is still at work after a minute.
    """
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < IDLE_LIMIT_S:
        used_s = time.process_time()
        time.sleep(IDLE_WINDOW_S)
        if time.process_time() - used_s < IDLE_SHARE * IDLE_WINDOW_S:
            return time.perf_counter() - begin_s
    raise TimeoutError(f"the process is not idle after {IDLE_LIMIT_S} s: a worker does not stop")


def measure(contenders: Mapping[str, Contender], plan: Plan) -> None:
    """Step all contenders as planned, Python's collector running between turns only."""
    gc.collect()
    gc.disable()
    try:
        for turn in progress_bar(plan.turns(list(contenders)), "overlap"):
            contender = contenders[turn.contender]
            contender.step(counted=turn.counted)
            if turn.last:
                contender.synchronize()
                come_to_rest()
                gc.collect()
    finally:
        gc.enable()


# What the contenders train.
def make_pool(shapes: Sequence[Shape], seed: int) -> list[list[Tensor]]:
    """Sets of gradients: for each matrix the same few directions in other mixtures, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ends = [(normal(s[0], RANK), normal(RANK, s[1])) if len(s) == 2 else None for s in shapes]
    pool = []
    for _ in range(POOL):
        gradients = []
        for shape, pair in zip(shapes, ends, strict=True):
            gradient = 0.3 * normal(*shape)
            if pair is not None:
                gradient += (pair[0] * normal(RANK)) @ pair[1]
            gradients.append(gradient.mul_(1e-2))
        pool.append(gradients)
    return pool


def emulate(
    shapes: Sequence[Shape], pool: Sequence[Sequence[Tensor]], device_s: float, seed: int
) -> tuple[list[Parameter], ForwardBackward]:
    """Weights, and a device that takes ``device_s`` seconds for their gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [Parameter(torch.randn(shape, generator=generator).mul_(0.02)) for shape in shapes]

    def forward_backward(step: int) -> None:
        time.sleep(device_s)
        for parameter, gradient in zip(parameters, pool[step % len(pool)], strict=True):
            parameter.grad = gradient

    return parameters, forward_backward


def train_on(
    device: torch.device, settings: Mapping[str, int], batch: int, seed: int
) -> tuple[list[Parameter], ForwardBackward]:
    """The example's GPT on ``device``, and its forward and backward on random bytes."""
    torch.manual_seed(seed)
    model = example.GPT(**settings).to(device)
    shape = (POOL, batch, settings["context"] + 1)
    rows = torch.randint(example.VOCABULARY, shape).to(device)

    def forward_backward(step: int) -> None:
        tokens = rows[step % POOL]
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()

    return list(model.parameters()), forward_backward


def make_contenders(args: argparse.Namespace, configs: Mapping[str, Any]) -> dict[str, Contender]:
    """A contender for each of ``configs``, all with the same first weights and gradients."""
    table = TABLES[args.table]
    pool = make_pool(table.shapes(), args.seed) if args.device == "cpu" else []
    contenders = {}
    for name, config in configs.items():
        if args.device == "cpu":
            device_s = args.device_ms / 1e3
            parameters, work = emulate(table.shapes(), pool, device_s, args.seed)
        else:
            parameters, work = train_on(torch.device(args.device), MODEL, BATCH, args.seed)
        contenders[name] = Contender(
            settings=repr(config),
            optimizer=OPTIMIZERS[args.optimizer](
                parameters,
                lr=1e-3,
                precondition_frequency=NEVER if name == NEVER_REFRESHED else args.period,
                max_precond_dim=table.max_precond_dim if args.device == "cpu" else 10000,
                runtime=config,
            ),
            forward_backward=work,
            synchronize=torch.cuda.synchronize if args.device == "cuda" else lambda: None,
        )
    return contenders


def make_configs(args: argparse.Namespace) -> dict[str, asteria.RuntimeConfig]:
    """The contenders: they differ in when bases are refreshed."""
    config, method = asteria.RuntimeConfig, args.refresh_method
    inside = config(refresh="sync", start="eigh", refresh_method=method)
    beside = config(refresh="async", start="eigh", refresh_method=method, workers=args.workers)
    return {SYNC: inside, ASYNC: beside, NEVER_REFRESHED: inside}


# What was found.
def report_on(contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """Summaries of all contenders, their times and statistics."""
    return {
        name: {
            "settings": entry.settings,
            "step_ms": summarize(entry.step_ms),
            "visible_ms": summarize(entry.visible_ms),
            "waits": sum(entry.waits),
            "stats": read_stats(entry.optimizer),
            "times_ms": {"step": entry.step_ms, "visible": entry.visible_ms},
        }
        for name, entry in contenders.items()
    }


def judge(results: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The targets, what was found, and how long a round of refreshes takes in the step."""

    def spread(name: str) -> float:
        return results[name]["step_ms"]["p99"] / results[name]["step_ms"]["p50"]

    never = results[NEVER_REFRESHED]["visible_ms"]
    extra = results[ASYNC]["visible_ms"]["mean"] / never["mean"]
    times = sorted(results[SYNC]["times_ms"]["visible"])
    slowest = times[-max(1, len(times) // period) :]
    return {
        "round_ms": sum(slowest) / len(slowest) - never["p50"],
        "targets": [
            target("asynchronous: p99 / p50 of the whole step", spread(ASYNC), most=ASYNC_SPREAD),
            target("synchronous: p99 / p50 of the whole step", spread(SYNC), least=SYNC_SPREAD),
            target("visible optimizer time, asynchronous / never refreshed", extra, most=EXTRA),
        ],
    }


def target(
    name: str, value: float, *, most: float = math.inf, least: float = -math.inf
) -> dict[str, Any]:
    """A value and whether it keeps to its bound."""
    bound = f"at most {most:g}" if math.isfinite(most) else f"at least {least:g}"
    return {"name": name, "value": value, "bound": bound, "met": least <= value <= most}


def print_results(results: Mapping[str, Any], verdict: Mapping[str, Any]) -> None:
    """A row for the whole step and one for the optimizer's part of each contender."""
    columns = ("mean", "p50", "p99", "max")
    rows = []
    for part, title in (("step_ms", "whole step"), ("visible_ms", "optimizer")):
        for name, result in results.items():
            summary = result[part]
            cells = [f"{summary[column]:.1f}" for column in columns]
            spread = f"{summary['p99'] / summary['p50']:.2f}"
            rows.append((f"{title}, {name}", *cells, spread, str(result["waits"])))
    print(format_table(("ms", *columns, "p99 / p50", "waits"), rows))
    print(f"\na round of refreshes inside the step takes {verdict['round_ms']:.0f} ms")
    for entry in verdict["targets"]:
        met = "met" if entry["met"] else "MISSED"
        print(f"{entry['name']}: {entry['value']:.2f}, {entry['bound']}: {met}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; counted steps are rounded up to whole turns."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="cpu: one is emulated")
    add("--device-ms", type=float, default=150.0, help="of the emulated forward and backward")
    add("--table", choices=TABLES, default="gpt-micro", help="the emulated model's shapes")
    add("--optimizer", choices=OPTIMIZERS, default="soap", help="what takes the steps")
    add("--refresh-method", choices=("auto", "qr", "eigh"), default="auto", help="eigh: longer")
    add("--period", type=int, default=10, help="steps from one refresh to the next")
    add("--steps", type=int, default=200, help="counted steps of each contender")
    add("--periods", type=int, default=2, help="counted in a turn")
    add("--workers", type=int, default=1, help="threads of the asynchronous optimizer")
    add("--threads", type=int, default=1, help="of torch in the training thread")
    add("--seed", type=int, default=0, help="of weights and gradients")
    add("--json", type=Path, metavar="FILE", help="write the report here, and a plot beside it")
    args = parser.parse_args(argv)
    for name in ("period", "steps", "periods", "workers", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(args, name)}")
    block = args.period * args.periods
    args.steps = math.ceil(args.steps / block) * block
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print what was found, and write the report if a file was named."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    block = args.period * args.periods
    plan = Plan(steps=args.steps, block=block, lead=args.period, skip=args.period)
    machine = describe_machine()
    machine["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "emulated"
    print(f"{machine['cpu']}, {machine['cores']} cores; device: {machine['device']}")
    with contextlib.ExitStack() as stack:
        contenders = make_contenders(args, make_configs(args))
        for entry in contenders.values():
            stack.enter_context(example.closing(entry.optimizer))
        measure(contenders, plan)
        results = report_on(contenders)
    verdict = judge(results, args.period)
    print_results(results, verdict)
    if args.json is None:
        return
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings |= {"lead": plan.lead, "skip": plan.skip}
    report = {"benchmark": "overlap", "machine": machine, "settings": settings}
    report |= {"contenders": results, "verdict": verdict}
    write_json(args.json, report)
    plot(report, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
