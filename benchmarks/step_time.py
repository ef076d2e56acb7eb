"""Time of `step()`: ours, the SOAP of two other packages, and the products no update is without.

All contenders train their own copy of one model's shapes, alternately in one process: a step of
each in turn, in rotated order, on the same fresh gradients, set outside of what is timed.

    python -m benchmarks.step_time --table gpt-nano --json runs/step_time.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import (
    AS_THEY_COME,
    BARE,
    BUILDERS,
    COMPILED,
    OURS,
    PEERS,
    Contender,
    Workload,
)
from benchmarks.measurement import (
    describe_machine,
    format_table,
    memory_bytes,
    progress_bar,
    summarize,
    write_json,
)
from benchmarks.shapes import TABLES, Shape, cut, fit
from benchmarks.step_time_plot import plot

COLUMNS = ("mean", "p50", "p99", "max")
# What a run holds, in copies of one SOAP's weights and state: six optimizers, AdamW, the products.
COPIES = 7
MEMORY_SHARE = 0.6
MOST_SETTLING_PERIODS = 8
# Python's collector is off while timing and runs between rounds instead.
ROUNDS_PER_COLLECTION = 10


@dataclass(kw_only=True)
class Measured:
    """What was measured of one contender; times in milliseconds, one for each counted step."""

    settings: str
    times_ms: list[float] = field(default_factory=list)
    refresh_steps: list[int] | None = None
    """The counted steps in which an eigenbasis changed, from 0; ``None`` where none was found."""


class Gradients:
    """Fresh random gradients, one set for all contenders of a round."""

    def __init__(self, shapes: Sequence[Shape], seed: int) -> None:
        """Allocate one tensor for each of ``shapes``."""
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors = [torch.zeros(shape) for shape in shapes]

    def draw(self) -> list[Tensor]:
        """Overwrite the tensors with new gradients and return them."""
        for tensor in self.tensors:
            tensor.normal_(std=1e-2, generator=self._generator)
        return self.tensors


def find_basis(tree: Any) -> tuple[Any, ...] | None:
    """The keys that lead to the first orthogonal matrix (or stack of them) in containers."""
    if isinstance(tree, Tensor):
        if tree.dim() < 2 or tree.shape[-1] != tree.shape[-2] or not tree.is_floating_point():
            return None
        deviation = (tree.mT @ tree - torch.eye(tree.shape[-1])).abs().max()
        return () if deviation < 1e-2 else None
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    for key, child in children:
        path = find_basis(child)
        if path is not None:
            return (key, *path)
    return None


class _RefreshWatch:
    """Sees from outside in which steps an optimizer replaced its first eigenbasis."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._path = find_basis(state)
        self._last = self._basis()
        self.steps: list[int] | None = None if self._path is None else []

    def _basis(self) -> Tensor:
        if self._path is None:
            return torch.empty(0)
        basis: Tensor = functools.reduce(operator.getitem, self._path, self._state)
        return basis.clone()

    def look(self, step: int) -> None:
        """Compare with the basis of the last look."""
        basis = self._basis()
        if self.steps is not None and not torch.equal(basis, self._last):
            self.steps.append(step)
            self._last = basis


def measure(
    contenders: Sequence[Contender], gradients: Gradients, *, steps: int, warmup: int
) -> dict[str, Measured]:
    """Step all contenders in turn, ``warmup`` rounds uncounted, then ``steps`` rounds counted."""
    results = {entry.name: Measured(settings=entry.settings) for entry in contenders}
    watches: dict[str, _RefreshWatch] = {}
    rounds = progress_bar(range(-warmup, steps), "step time")
    gc.collect()
    gc.disable()
    try:
        for number in rounds:
            fresh = gradients.draw()
            if number == 0:
                watches = {entry.name: _RefreshWatch(entry.state) for entry in contenders}
            first = number % len(contenders)
            for entry in (*contenders[first:], *contenders[:first]):
                elapsed_ms = entry.timed_step(fresh)
                if number >= 0:
                    results[entry.name].times_ms.append(elapsed_ms)
                    watches[entry.name].look(number)
            if number % ROUNDS_PER_COLLECTION == 0:
                gc.collect()
    finally:
        gc.enable()
    for name, watch in watches.items():
        results[name].refresh_steps = watch.steps
    return results


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def settle(contender: Contender, gradients: Gradients, period: int) -> None:
    """Step until a whole period passed without a compilation, at most some periods."""
    for _ in range(MOST_SETTLING_PERIODS):
        before = compiled_graphs()
        for _ in range(period):
            contender.timed_step(gradients.draw())
        if compiled_graphs() == before:
            return


def ratios(results: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Our mean over the faster peer's mean, and our median over the bare products' median.

    The former also of the peers as they come, without what users have to ask for; the latter also
    round by round: where a processor changes between two speeds, medians may be of different ones.
    """
    summary = {name: summarize(result.times_ms) for name, result in results.items()}
    found: dict[str, dict[str, Any]] = {}
    for what, names in (
        ("faster peer's mean", PEERS),
        ("mean of those as they come", AS_THEY_COME),
    ):
        peers = [name for name in names if name in summary]
        if OURS in summary and peers:
            faster = min(peers, key=lambda name: summary[name]["mean"])
            value = summary[OURS]["mean"] / summary[faster]["mean"]
            found[f"mean / {what}"] = {"value": value, "against": faster}
    if OURS in summary and BARE in summary:
        value = summary[OURS]["p50"] / summary[BARE]["p50"]
        found["median / bare products' median"] = {"value": value, "against": BARE}
        rounds = zip(results[OURS].times_ms, results[BARE].times_ms, strict=True)
        value = statistics.median(ours / bare for ours, bare in rounds)
        found["median of the ratios of all rounds"] = {"value": value, "against": BARE}
    return found


def results_table(results: Mapping[str, Measured], missing: Mapping[str, str]) -> str:
    """The table for people: one row for each contender, also for those that are missing."""
    rows = []
    for name in BUILDERS:
        if name in missing:
            rows.append((name, *("-" for _ in COLUMNS), "-", missing[name]))
        elif name in results:
            result = results[name]
            summary = summarize(result.times_ms)
            cells = (f"{summary[column]:.1f}" for column in COLUMNS)
            refreshes = "-" if result.refresh_steps is None else str(len(result.refresh_steps))
            rows.append((name, *cells, refreshes, result.settings))
    header = ("step() in ms", *COLUMNS, "refreshes", "settings")
    return format_table(header, rows)


def enter_contenders(
    workload: Workload, gradients: Gradients, names: Sequence[str]
) -> tuple[list[Contender], dict[str, str]]:
    """Build what is installed, and step what compiles until it is done with compiling.

    Returns:
        The contenders, and why the others are missing.
    """
    buffers = [torch.zeros_like(tensor) for tensor in gradients.tensors]
    entries = {
        name: _enter(name, workload, gradients, buffers) for name in progress_bar(names, "set up")
    }
    contenders = [entry for entry in entries.values() if isinstance(entry, Contender)]
    return contenders, {name: entry for name, entry in entries.items() if isinstance(entry, str)}


def _enter(
    name: str, workload: Workload, gradients: Gradients, buffers: Sequence[Tensor]
) -> Contender | str:
    """One contender ready to be measured, or why there is none."""
    try:
        contender = BUILDERS[name](workload, buffers)
        if contender.compiled:
            settle(contender, gradients, workload.period)
    except ModuleNotFoundError as error:
        package = error.name or "a module"
        if name not in PEERS:
            raise
        return "not installed" if name.startswith(package) else f"{package} not installed"
    except Exception as error:
        # Compilers fail in many ways, where there is no C++ compiler for one.
        if name not in COMPILED:
            raise
        return f"does not compile here: {type(error).__name__}"
    return contender


def run(workload: Workload, *, steps: int, warmup: int, names: Sequence[str]) -> dict[str, Any]:
    """Measure the contenders of these names, print what was found, and return it."""
    gradients = Gradients(workload.table.shapes(), workload.seed)
    contenders, missing = enter_contenders(workload, gradients, names)
    graphs = compiled_graphs()
    results = measure(contenders, gradients, steps=steps, warmup=warmup)
    print(results_table(results, missing))
    found = ratios(results)
    for name, ratio in found.items():
        print(f"{OURS}, {name}: {ratio['value']:.3f} (against {ratio['against']})")
    return {
        "contenders": {
            name: {
                "settings": result.settings,
                "summary_ms": summarize(result.times_ms),
                "refresh_steps": result.refresh_steps,
                "times_ms": result.times_ms,
            }
            for name, result in results.items()
        },
        "missing": missing,
        "compilations_while_measuring": compiled_graphs() - graphs,
        "ratios": found,
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; counted steps are rounded up to whole periods."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--table", choices=TABLES, default="gpt-nano", help="the model whose shapes are used")
    add("--steps", type=int, default=120, help="counted steps")
    add("--period", type=int, default=10, help="steps from one refresh to the next")
    add("--threads", type=int, default=2, help="threads of torch, the same for all")
    add("--max-parameters", type=int, help="cut the table to this size; else to what fits")
    add("--max-precond-dim", type=int, help="else the table's own limit")
    add("--no-compile", action="store_true", help="skip what compiles, which takes minutes")
    add("--seed", type=int, default=0, help="of parameters and gradients")
    add("--json", type=Path, metavar="FILE", help="write the report here, and a plot beside it")
    arguments = parser.parse_args(argv)
    for name in ("steps", "period", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    arguments.steps = math.ceil(arguments.steps / arguments.period) * arguments.period
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the report if a file was named."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    whole = TABLES[arguments.table]
    max_precond_dim = arguments.max_precond_dim or whole.max_precond_dim
    allowed_bytes = int(MEMORY_SHARE * memory_bytes("MemAvailable"))
    limit = arguments.max_parameters or fit(
        whole, allowed_bytes, copies=COPIES, max_precond_dim=max_precond_dim
    )
    table, kept = cut(whole, limit)
    workload = Workload(
        table=table,
        period=arguments.period,
        max_precond_dim=max_precond_dim,
        seed=arguments.seed,
    )
    machine = describe_machine(("pytorch_optimizer", "heavyball"))
    warmup = arguments.period + 5
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads")
    print(f"{kept}; dimensions above {max_precond_dim:,} without a factor")
    print(f"{arguments.steps} steps counted after {warmup} of warm-up, period {arguments.period}")
    names = [name for name in BUILDERS if not (arguments.no_compile and name in COMPILED)]
    report = run(workload, steps=arguments.steps, warmup=warmup, names=names)
    if arguments.json is None:
        return
    settings = {
        **{name: value for name, value in vars(arguments).items() if name != "json"},
        "warmup": warmup,
        "max_precond_dim": max_precond_dim,
        "kept": kept,
        "shapes": [[list(shape), count] for shape, count in table.counts().items()],
    }
    report = {"benchmark": "step_time", "machine": machine, "settings": settings, **report}
    write_json(arguments.json, report)
    plot(report, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
