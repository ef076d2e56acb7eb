"""Ranks that are killed or stopped at random: whether the others notice, end and can resume.

Three processes train a few matrices on gloo, replicated or in shards, with slow workers. One of
them is killed (kill -9) or stopped (SIGSTOP) in a random phase of a random step. Each of the others
must raise within the timeout of the process group and end by itself; started again from the last
checkpoint, all must come to the weights of an undisturbed run, bit by bit.

    python -m benchmarks.rank_faults --tries 50 --json benchmarks/results/rank_faults.json

Exits with status 1 if a try fails.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measurement import describe_machine, format_table, write_json
from benchmarks.rank_fault_run import KILL, MODES, PHASES, REPLICATED, SAVE_EVERY, STOP, Plan, run

RANKS, STEPS = 3, 28
TIMEOUT_S = 4.0
SLACK_S = 2.0
"""What a busy machine may add to it, and the call for who is missing."""
EXIT_S = 20.0
"""Longest end of a process that has nothing to wait for."""
MODULES = ["benchmarks.rank_fault_run", "torch._dynamo"]
"""Imported once, by the server whose children the ranks are."""
OURS = "CoherenceError"
_SHOWN = 280
"""Characters of an error that are reported; torch.distributed's are long."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of the ranks of one run."""

    hurt_s: float | None = None
    """When it happened, by the clock of `time.monotonic`."""
    ended_s: dict[int, float] = dataclasses.field(default_factory=dict)
    errors: dict[int, str] = dataclasses.field(default_factory=dict)
    weights: dict[int, bytes] = dataclasses.field(default_factory=dict)
    orphans: list[int] = dataclasses.field(default_factory=list)
    """Ranks whose process did not end by itself."""


def launch(plan: Plan, folder: Path) -> Outcome:
    """Do one run; its checkpoints are in ``folder``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    links: list[Connection] = []
    processes: list[ForkServerProcess] = []
    with tempfile.TemporaryDirectory() as place:
        try:
            for rank in range(plan.ranks):
                mine, theirs = context.Pipe()
                arguments = (rank, plan, folder, Path(place) / "store", theirs)
                process = context.Process(target=run, args=arguments, daemon=True)
                process.start()
                theirs.close()
                links.append(mine)
                processes.append(process)
            return _listen(plan, links, processes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _listen(
    plan: Plan, links: Sequence[Connection], processes: Sequence[ForkServerProcess]
) -> Outcome:
    outcome = Outcome()
    alive = dict(enumerate(links))
    until_s = time.monotonic() + 60.0 + 20 * plan.timeout_s
    while alive and time.monotonic() < until_s:
        for link in wait(list(alive.values()), timeout=1.0):
            rank = next(rank for rank, own in alive.items() if own is link)
            try:
                kind, seconds, *rest = links[rank].recv()
            except EOFError:  # it was killed
                del alive[rank]
                continue
            if kind == "hurt":
                outcome.hurt_s = seconds
                if plan.how == STOP:
                    del alive[rank]  # it says no more
            else:
                outcome.ended_s[rank] = seconds
                outcome.errors[rank], outcome.weights[rank] = rest
                del alive[rank]
    for rank, process in enumerate(processes):
        if rank != plan.victim or outcome.hurt_s is None:
            process.join(EXIT_S)
            if process.exitcode is None:
                outcome.orphans.append(rank)
    return outcome


def judge(
    plan: Plan, outcome: Outcome, resumed: Outcome, wanted: Mapping[int, bytes] | None = None
) -> list[str]:
    """What is wrong with a run that was disturbed and the one that went on from its checkpoint.

    ``wanted`` are the weights of an undisturbed run, by rank; None where these depend on how fast
    workers are, so that the ranks are compared with each other only.
    """
    if outcome.hurt_s is None:
        return ["nothing has happened to the victim"]
    problems = []
    for rank in range(plan.ranks):
        late_s = outcome.ended_s.get(rank, 0.0) - outcome.hurt_s
        error = outcome.errors.get(rank)
        if rank == plan.victim:
            continue
        if error is None:
            problems.append(f"rank {rank} never ended")
        elif not error:
            problems.append(f"rank {rank} did not notice")
        elif late_s > plan.timeout_s + SLACK_S:
            problems.append(f"rank {rank} took {late_s:.1f} s")
    ours = [error for error in outcome.errors.values() if error.startswith(OURS)]
    if ours and not any(f"rank {plan.victim} " in error for error in ours):
        problems.append(f"nobody has named rank {plan.victim}")
    problems += [f"rank {rank} is an orphan" for rank in outcome.orphans]
    if wanted is None:
        wanted = dict.fromkeys(range(plan.ranks), resumed.weights.get(0, b""))
    for rank in range(plan.ranks):
        if resumed.errors.get(rank):
            problems.append(f"resumed, rank {rank}: {resumed.errors[rank]}")
        elif resumed.weights.get(rank) != wanted[rank]:
            problems.append(f"resumed, rank {rank} has other weights")
    return problems


def draw(seed: int, steps: int = STEPS) -> Plan:
    """A random fault; its step is one after which there is still something to do."""
    chance = random.Random(seed)
    mode = chance.choice(MODES)
    phase = chance.choice(PHASES)
    step = chance.randrange(1, steps - 4)
    if phase == "while saving":
        step = step // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY - 1
    # Results of sharded parameters do not travel: what is ready is the rank's own matter.
    installs = ["scheduled", "ready"] if mode == REPLICATED else ["scheduled"]
    return Plan(
        ranks=RANKS,
        steps=steps,
        timeout_s=TIMEOUT_S,
        mode=mode,  # type: ignore[arg-type]
        victim=chance.randrange(RANKS),
        phase=phase,
        step=step,
        how=chance.choice([KILL, STOP]),  # type: ignore[arg-type]
        install=chance.choice(installs),  # type: ignore[arg-type]
        seed=seed,
    )


def attempt(plan: Plan, wanted: Mapping[int, bytes] | None = None) -> dict[str, Any]:
    """Disturb a run and go on from its checkpoint; ``wanted`` as in `judge`."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = launch(plan, Path(folder))
        resumed = launch(dataclasses.replace(plan, victim=-1), Path(folder))
    hurt_s = outcome.hurt_s or 0.0
    latest_s = max((end_s - hurt_s for end_s in outcome.ended_s.values()), default=0.0)
    return {
        **dataclasses.asdict(plan),
        "latest_s": round(latest_s, 3),
        "errors": {str(rank): error[:_SHOWN] for rank, error in sorted(outcome.errors.items())},
        "problems": judge(plan, outcome, resumed, wanted),
    }


def undisturbed(mode: str, ranks: int, steps: int, timeout_s: float) -> dict[int, bytes]:
    """Weights by rank of a run that nothing happens to; raises RuntimeError if something does."""
    plan = Plan(ranks, steps, timeout_s, mode=mode)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        outcome = launch(plan, Path(folder))
    if set(outcome.errors.values()) != {""} or outcome.orphans:
        raise RuntimeError(f"an undisturbed run ended with {outcome.errors}")
    return outcome.weights


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each mode and phase: the longest time to an error, and which errors they were."""
    rows = []
    for mode in MODES:
        for phase in PHASES:
            mine = [one for one in records if (one["mode"], one["phase"]) == (mode, phase)]
            if not mine:
                continue
            kinds = collections.Counter(
                error.partition(":")[0] for one in mine for error in one["errors"].values()
            )
            hows = collections.Counter(one["how"] for one in mine)
            rows.append(
                (
                    mode,
                    phase,
                    ", ".join(f"{how} {count}" for how, count in sorted(hows.items())),
                    f"{max(one['latest_s'] for one in mine):.2f}",
                    ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()),
                    str(sum(bool(one["problems"]) for one in mine)),
                )
            )
    head = ("mode", "phase", "tries", "latest error (s)", "errors of the others", "failed")
    return format_table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the tries; the status of the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    arguments = parser.parse_args(argv)
    plans = [draw(arguments.seed + number) for number in range(arguments.tries)]
    modes = sorted({plan.mode for plan in plans})
    wanted = {mode: undisturbed(mode, RANKS, STEPS, TIMEOUT_S) for mode in modes}
    records = []
    for number, plan in enumerate(tqdm(plans, disable=None)):
        known = wanted[plan.mode] if plan.install == "scheduled" else None
        records.append(attempt(plan, known))
        for problem in records[-1]["problems"]:
            tqdm.write(f"try {number}: {problem}", file=sys.stderr)
    print(table(records))
    if arguments.json:
        found = {"machine": describe_machine(), "timeout_s": TIMEOUT_S, "tries": records}
        write_json(arguments.json, found)
    return int(any(record["problems"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
