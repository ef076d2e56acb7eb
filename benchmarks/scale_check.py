"""Whether the model of `benchmarks.scale` predicts the steps of real processes on this machine.

Seconds of an update and of refreshes are those of one process, and speeds of the exchange those of
two; what is predicted is the step of all numbers of processes. Where they are more than the cores,
what needs a core takes longer in proportion. All times are the shortest of several periods, place
by place: what this machine does without other work, as far as that can be seen.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import asteria
from asteria.distributed.spread import Speed
from asteria.planner.machine import Machine
from benchmarks.measurement import describe_machine
from benchmarks.scale_arms import Arm, Ranks, Where, run
from benchmarks.scale_model import (
    ADAMW_BYTES,
    TOKEN_FLOP,
    TRAVEL_BYTES,
    WEIGHT_BYTES,
    Cluster,
    Network,
    TileWork,
    Training,
    Workload,
)
from benchmarks.scale_run import (
    ADAMW,
    EVERY,
    NEVER_REFRESHED,
    SHARDS,
    SHARED,
    Case,
    Found,
    Times,
    run_together,
)

NAMES = {
    ADAMW: "AdamW",
    EVERY: "SOAP, every rank refreshes all",
    SHARED: "Asteria, replicas",
    SHARDS: "Asteria, exact shards",
}
UNLIMITED = 1e18  # of rates that play no part here
FULL_SHARE = 0.9  # of one process's refreshes, from which ranks do not share them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was measured of this machine, in seconds."""

    device_s: float
    adamw_s: float
    """An update of AdamW."""
    update_s: float
    """An update of SOAP, without refreshes."""
    round_s: float
    """A round of refreshes inside the step."""
    small_s: float = 0.0
    """Averaging a few bytes between two processes."""
    large_s: float = 0.0
    """Averaging all gradients between two processes."""


def compare(counts: Sequence[int], *, steps: int) -> dict[str, Any]:
    """Run so many processes each and predict their steps; what went wrong is in the report."""
    case = Case(steps=max(1, steps // Case(steps=1).period) * Case(steps=1).period)
    report: dict[str, Any] = {"case": dataclasses.asdict(case), "rows": [], "refused": {}}
    report["error"] = None
    if not counts:
        report["error"] = "not asked for"
        return report
    report["load_before"] = os.getloadavg()[0]
    found: dict[int, list[Found]] = {}
    try:
        # One process and two are what the rates are from.
        for count in sorted({1, *counts} | ({2} if max(counts) > 1 else set())):
            found[count] = run_together(count, case)
    except (RuntimeError, OSError, FutureTimeout, asteria.AsteriaError) as error:
        report["error"] = f"{type(error).__name__}: {error}"
        if 1 not in found or (max(found) > 1) != (2 in found):
            return report
    rates = rates_of(found, case)
    cores = describe_machine()["cores"]
    report |= {"rates_s": dataclasses.asdict(rates), "cores": cores}
    for count in [count for count in counts if count in found]:
        for key in [key for key in case.ways(count) if key[0] in NAMES]:
            if key in found[count][0].refused:
                report["refused"][f"{NAMES[key[0]]}, S = {key[1]}"] = found[count][0].refused[key]
                continue
            times = [rank.times[key] for rank in found[count]]
            whole = found[1][0].times[EVERY, 0].refreshes
            shared = key[0] in (SHARED, SHARDS) and count > 1 and is_shared(times, whole)
            predicted_s = predict(case, rates, count, key, shared=shared, cores=cores)
            measured_s = statistics.fmean(quiet(times[0].steps_s, case.period))
            report["rows"].append(
                {
                    "arm": NAMES[key[0]],
                    "staleness": key[1],
                    "ranks": count,
                    "shared": shared,
                    "measured_s": measured_s,
                    "predicted_s": predicted_s,
                    "ratio": predicted_s / measured_s,
                }
            )
    return report


def is_shared(times: Sequence[Times], whole: int) -> bool:
    """Whether the ranks have shared the refreshes that one process does alone."""
    return max(rank.refreshes for rank in times) < FULL_SHARE * whole


def quiet(seconds: Sequence[float], period: int) -> list[float]:
    """Of each place in the period its shortest time, so that bursts of other processes go by."""
    return [min(seconds[at::period]) for at in range(period)]


def rates_of(found: Mapping[int, Sequence[Found]], case: Case) -> Rates:
    """From one process, and of the exchange from two, if there were."""
    alone, period = found[1][0].times, case.period
    never = alone[NEVER_REFRESHED, 0]
    update_s = statistics.fmean(quiet(never.update_s, period))
    pair = found.get(2, [Found()])[0]
    return Rates(
        device_s=statistics.fmean(quiet(never.device_s, period)),
        adamw_s=statistics.fmean(quiet(alone[ADAMW, 0].update_s, period)),
        update_s=update_s,
        # Which step of a period refreshes is seen, not known: the one that takes longest.
        round_s=max(0.0, max(quiet(alone[EVERY, 0].update_s, period)) - update_s),
        small_s=pair.small_s,
        large_s=pair.large_s,
    )


def predict(
    case: Case,
    rates: Rates,
    count: int,
    key: tuple[str, int],
    *,
    shared: bool,
    cores: int,
) -> float:
    """Seconds of a step of ``count`` processes, by the model."""
    way, staleness = key
    work = _work(case, count)
    crowd = max(1.0, count / cores)
    if way == ADAMW:
        where = Where.NOBODY
    else:
        where = Where.HOST if staleness else Where.INSIDE
    shards = way == SHARDS
    arm = Arm(
        name=NAMES[way],
        where=where,
        owned=shared,
        update_owned=shards,
        sharded=shards,
        staleness=staleness,
    )
    ranks = Ranks(work, count, _cluster(work, rates, crowd, count), _network(case, rates))
    step_s: float = run(ranks, arm, period=case.period)["step_s"]
    return step_s


def _work(case: Case, count: int) -> Workload:
    """Each rank has a token, so that the emulated device takes as long on any number."""
    tiles = tuple(
        TileWork(shape, 1, shape[0] * shape[1], place) for place, shape in enumerate(case.shapes)
    )
    training = Training(model="check", batch_tokens=count)
    return Workload(training, case.parameters, case.parameters, tiles)


def _cluster(work: Workload, rates: Rates, crowd: float, count: int) -> Cluster:
    """Rates with which the model takes the measured seconds for one process."""
    memory = ADAMW_BYTES * work.parameters / rates.adamw_s
    probe = Cluster(product_flop_per_s=1.0, memory_bytes_per_s=UNLIMITED)
    flop = sum(tile.turn_s(probe) + tile.fold_s(probe) for tile in work.tiles)
    moved = sum(ADAMW_BYTES * tile.elements + 4 * tile.basis_bytes for tile in work.tiles)
    products_s = max(rates.update_s - moved / memory, rates.update_s / 2)
    cubes = sum(size**3 for tile in work.tiles for size in tile.sizes)
    sizes = sorted({size for tile in work.tiles for size in tile.sizes})
    cube_s = max(rates.round_s, 1e-9) * crowd / cubes
    machine = Machine(
        cores=1, training_threads=0, refresh_s=tuple((n, cube_s * n**3) for n in sizes)
    )
    return Cluster(
        node_size=count,
        compute_flop_per_s=TOKEN_FLOP * work.in_products / rates.device_s,
        product_flop_per_s=flop / products_s / crowd,
        memory_bytes_per_s=memory / crowd,
        device_bytes=UNLIMITED,
        link_bytes_per_s=UNLIMITED,
        overlap=0.0,
        host=machine,
        device=machine,
    )


def _network(case: Case, rates: Rates) -> Network:
    """All processes on one node. Two passes between two processes send every byte once."""
    large_s = max(rates.large_s - rates.small_s, 1e-9)
    exchange = Speed(TRAVEL_BYTES * case.parameters / large_s, rates.small_s / 2)
    results = Speed(WEIGHT_BYTES * case.parameters / large_s, rates.small_s / 2)
    return Network(
        name="this machine",
        intra=exchange,
        inter=exchange,
        results_intra=results,
        results_inter=results,
    )


def text_of(report: Mapping[str, Any]) -> str:
    """Markdown for people."""
    lines = []
    if report["rows"]:
        case = report["case"]
        rows, columns = case["shapes"][0]
        about = (
            f"Processes of one training thread and one worker on {report['cores']} cores; an "
            f"emulated device of {case['device_s'] * 1e3:g} ms, {len(case['shapes'])} matrices of "
            f"about {rows}x{columns}, a refresh every {case['period']} steps; load before: "
            f"{report['load_before']:.1f}. Rates are those of one process, and of the exchange "
            f"those of two; of each place in the period the shortest of "
            f"{case['steps'] // case['period']}.\n"
        )
        lines = [
            about,
            "| run | S | processes | refreshes | measured ms | predicted ms | ratio |",
            "|:--|--:|--:|:--|--:|--:|--:|",
        ]
    for row in report["rows"]:
        how = "-" if row["arm"] == NAMES[ADAMW] else "shared" if row["shared"] else "by every rank"
        lines.append(
            f"| {row['arm']} | {row['staleness']} | {row['ranks']} | {how} | "
            f"{row['measured_s'] * 1e3:.1f} | {row['predicted_s'] * 1e3:.1f} | "
            f"{row['ratio']:.2f} |"
        )
    for what, why in report["refused"].items():
        lines += ["", f"{what} is refused by this version: {why}"]
    if report["error"]:
        lines += ["", f"Not all was compared: {report['error']}"]
    return "\n".join(lines).strip()
