"""Step times of 1 to 1024 ranks on paper: AdamW, synchronous SOAP, and Asteria by its staleness.

    python -m benchmarks.scale --json benchmarks/results/scale.json

Nothing is trained. Steps are simulated (`benchmarks.scale_simulation`) from the shapes of the
models, the seconds that refreshes take on this machine's cores, the bytes of every exchange, and
rates of accelerators and links, which are assumptions and printed with the results. The global
batch is fixed: strong scaling.

- AdamW: with replicas of the weights for the smallest model, with FSDP2 for the larger.
- SOAP, every rank refreshes all: what the published implementations do under DDP.
- SOAP, owners, updates gathered: each rank has the state of its blocks, computes their updates and
  refreshes, and sends the updates to all (arXiv 2309.06497, Distributed Shampoo).
- Asteria, replicas: owners keep factors and refresh, every rank has all bases and computes all
  updates. Results travel beside the steps; with S = 0 all of it is done inside the step.
- Asteria, exact shards: FSDP2; gradients go to the owner, updates come back, bases stay there.
- On the device: refreshes beside the step that take time of the owner's accelerator.

The model is compared with runs of real processes on this machine (``--check-ranks``).
"""

import argparse
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asteria
from asteria.distributed.spread import Speed
from asteria.planner.machine import Machine, Timings, load_machine
from asteria.planner.measurements import Probe
from benchmarks import scale_check
from benchmarks.measurement import describe_machine, progress_bar, write_json
from benchmarks.scale_arms import Ranks, arms, run
from benchmarks.scale_model import NETWORKS, TRAININGS, Cluster, Network, Workload, workload
from benchmarks.scale_plot import plot

RANKS = [2**power for power in range(11)]
SHOWN_STALENESS = (0, 1, 2, 5, 10)
WAITING = 0.01  # of the time, from which a table tells of waits
TRAINING_CORES = 2
TIE = 1.005  # of step times that are called equal
OWNERS = "SOAP, owners, updates gathered"
LEFT_OUT = """\
- attention scores, activations, launches of kernels, stragglers, and how small shares of a batch
  lower the rate of an accelerator
- that results of refreshes, gradients and data loading share processors of a host and its memory
- the first steps, when factors are young and refreshes are part of the step
- tiers: state that does not fit the device is marked, not moved"""

Row = Mapping[str, Any]


def sweep(
    work: Workload, args: argparse.Namespace, cluster: Cluster, network: Network
) -> list[dict[str, Any]]:
    """All arms at all numbers of ranks."""
    rows: list[dict[str, Any]] = []
    for count in args.ranks:
        ranks = Ranks(work, count, cluster, network, phases_by_owner=args.phases == "owner")
        ways = arms(work.training.sharded, args.staleness)
        rows += [run(ranks, arm, period=args.period) for arm in ways]
    return rows


def describe(work: Workload, cluster: Cluster) -> dict[str, Any]:
    """What SOAP makes of the model."""
    jobs, threads = cluster.workers
    host_s = [tile.refresh_s(cluster.host, threads) for tile in work.tiles]
    return {
        "parameters": work.parameters,
        "batch_tokens": work.training.batch_tokens,
        "options": dict(work.training.options),
        "tiles": len(work.tiles),
        "round_bytes": sum(tile.basis_bytes for tile in work.tiles),
        "round_on_one_host_s": sum(host_s) / jobs,
        "longest_on_host_s": max(host_s, default=0.0),
        "round_on_device_s": sum(tile.refresh_s(cluster.device) for tile in work.tiles),
    }


# What was found, for people.
def cell(row: Row, adamw_s: float) -> str:
    """Seconds, times AdamW's; ``!`` for what does not fit the device, ``w`` for waits."""
    marks = "" if row["fits"] else "!"
    marks += "w" if row["wait_s"] > WAITING * row["step_s"] else ""
    return f"{row['step_s']:.3g} ({row['step_s'] / adamw_s:.2f}){marks}"


def table(rows: Sequence[Row], staleness: Iterable[int]) -> str:
    """Markdown: step times of each arm by number of ranks, and the S that is enough."""
    counts = list(dict.fromkeys(row["ranks"] for row in rows))
    known = {(row["arm"], row["staleness"], row["ranks"]): row for row in rows}
    shown = dict.fromkeys((row["arm"], row["staleness"]) for row in rows)
    lines = [
        "| ranks | S | " + " | ".join(map(str, counts)) + " |",
        "|:--|--:|" + "--:|" * len(counts),
    ]
    for arm, s in shown:
        if s and s not in staleness:
            continue
        cells = [cell(known[arm, s, n], known["AdamW", 0, n]["step_s"]) for n in counts]
        lines.append(f"| {arm} | {s if 'Asteria' in arm else '-'} | " + " | ".join(cells) + " |")
    for arm in dict.fromkeys(arm for arm, s in shown if s):
        enough = [smallest_staleness(rows, arm, n) for n in counts]
        cells = ["none" if s is None else str(s) for s in enough]
        lines.append(f"| smallest S >= 1 without waits: {arm} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smallest_staleness(rows: Iterable[Row], arm: str, ranks: int) -> int | None:
    """The least S, at least 1, of which hardly a step waits; None where all tried ones do."""
    enough = [
        row["staleness"]
        for row in rows
        if (row["arm"], row["ranks"]) == (arm, ranks)
        and row["staleness"]
        and row["wait_s"] <= WAITING * row["step_s"]
    ]
    return min(enough, default=None)


def unfavourable(rows: Iterable[Row], staleness: int) -> str:
    """A line for each way of Asteria: where synchronous SOAP with owners is faster."""
    steps = {(row["arm"], row["staleness"], row["ranks"]): row["step_s"] for row in rows}
    lines = []
    for arm in dict.fromkeys(arm for arm, s, _ in steps if s == staleness):
        counts = [n for name, s, n in steps if (name, s) == (arm, staleness)]
        slower = [str(n) for n in counts if steps[arm, staleness, n] > TIE * steps[OWNERS, 0, n]]
        where = f"at {', '.join(slower)} ranks" if slower else "nowhere"
        lines.append(f"- {arm}, S = {staleness}: {where}")
    return "\n".join(lines)


def text_of(report: Mapping[str, Any]) -> str:
    """All of the report in Markdown."""
    settings = report["settings"]
    head = (
        f"Simulated seconds of a step, in brackets times AdamW's at the same number of ranks; a "
        f"refresh every {settings['period']} steps. `!`: weights, gradients and state do not fit "
        f"the device (activations not counted). `w`: steps wait for refreshes at the bound.\n\n"
        f"{assumptions_text(report['assumptions'])}\n\nNot in the model:\n\n{LEFT_OUT}"
    )
    parts = [head]
    for name, model in report["models"].items():
        made = model["made_of"]
        parts.append(
            f"### {name}\n\n{made['parameters'] / 1e9:.2f}B parameters, a batch of "
            f"{made['batch_tokens']:,} tokens, {made['tiles']} tiles; a round of refreshes: "
            f"{made['round_on_one_host_s']:.0f} s on the host of one rank (longest "
            f"{made['longest_on_host_s']:.2f} s), {made['round_on_device_s']:.1f} s on one device, "
            f"{made['round_bytes'] / 1e9:.1f} GB of bases"
        )
        for network, rows in model["networks"].items():
            parts.append(f"#### {network}\n\n{table(rows, settings['shown_staleness'])}")
            worse = unfavourable(rows, settings["judged_staleness"])
            if worse:
                parts.append(f"Slower than {OWNERS}:\n\n{worse}")
    parts.append(f"### Against real processes\n\n{scale_check.text_of(report['check'])}")
    return "\n\n".join(parts) + "\n"


def assumptions_text(found: Mapping[str, Any]) -> str:
    """A bullet for each."""
    cluster = found["cluster"]
    host, device = cluster["host"], cluster["device"]
    text = (
        "Assumptions, not measured unless said:\n\n"
        f"- accelerator: {cluster['compute_flop_per_s'] / 1e12:g} TFLOP/s in forward and backward, "
        f"{cluster['product_flop_per_s'] / 1e12:g} in the optimizer's products (float32), "
        f"{cluster['memory_bytes_per_s'] / 1e12:g} TB/s, {cluster['device_bytes'] / 1e9:g} GB; "
        f"{cluster['link_bytes_per_s'] / 1e9:g} GB/s to its host\n"
        f"- host of a rank: {found['host_jobs']} refreshes at a time on {found['host_threads']} "
        f"threads each; {seconds_by_size(host)} on {host['math_threads']} ({host['source']}), by "
        "the cube beyond; work is taken to divide evenly among threads\n"
        f"- refreshes on the device: {seconds_by_size(device)} ({device['source']})\n"
        f"- {cluster['node_size']} ranks on a node; forward and backward hide communication\n"
    )
    for name, network in found["networks"].items():
        speeds = [
            f"{way.replace('_', ' ')} {network[way]['bytes_per_s'] / 1e9:.3g} GB/s and "
            f"{network[way]['latency_s'] * 1e6:.3g} us"
            for way in ("intra", "inter", "results_intra", "results_inter")
        ]
        text += f"- {name}, of a rank one way: {', '.join(speeds)}\n"
    return text.rstrip()


def seconds_by_size(machine: Mapping[str, Any]) -> str:
    """Seconds of a refresh."""
    return ", ".join(f"{size}: {seconds:.3g} s" for size, seconds in machine["refresh_s"])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, given = parser.add_argument, Cluster()
    add("--models", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="what is trained")
    add("--ranks", type=int, nargs="+", default=RANKS, help="numbers of processes")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="between nodes")
    add("--staleness", type=int, nargs="+", default=list(range(11)), help="S of Asteria")
    add("--period", type=int, default=10, help="steps from one refresh to the next")
    add("--phases", choices=("model", "owner"), default="model", help="what is spread over it")
    add("--machine", type=Path, help="of `asteria probe`; else refreshes are timed here")
    add("--host-cores", type=int, default=given.host.cores, help="of a rank; 2 feed the device")
    add("--node-size", type=int, default=given.node_size, help="ranks of a node")
    add("--compute-tflops", type=float, default=given.compute_flop_per_s / 1e12, help="of a device")
    add("--product-tflops", type=float, default=given.product_flop_per_s / 1e12, help="in float32")
    add("--device-gb", type=float, default=given.device_bytes / 1e9, help="memory of a device")
    add("--inter-gb-per-s", type=float, help="between nodes, of a rank, instead of the network's")
    add("--results-gb-per-s", type=float, help="likewise, where results travel")
    add("--check-ranks", type=int, nargs="*", default=[1, 2, 4], help="real processes; none: leave")
    add("--check-steps", type=int, default=100, help="of each of them")
    add("--json", type=Path, metavar="FILE", help="write the report here, and .md and .png beside")
    args = parser.parse_args(argv)
    for count in args.ranks:
        if count < 1 or count % min(count, args.node_size):
            parser.error(f"--ranks must be whole nodes of --node-size, found {count}")
    if min(args.staleness) < 0 or args.period < 1 or args.host_cores < 1:
        parser.error("--staleness must be at least 0, --period and --host-cores at least 1")
    return args


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The assumptions, with what the command line says of them."""
    cpu = describe_machine()["cpu"]
    if args.machine is None:
        host = Machine(refresh_s=refresh_cpu_s(), source=f"processor time measured on {cpu}")
    else:
        host = dataclasses.replace(load_machine(args.machine), source=f"measured on {cpu}")
    return Cluster(
        node_size=args.node_size,
        compute_flop_per_s=args.compute_tflops * 1e12,
        product_flop_per_s=args.product_tflops * 1e12,
        device_bytes=args.device_gb * 1e9,
        host=dataclasses.replace(host, cores=args.host_cores, training_threads=TRAINING_CORES),
    )


def refresh_cpu_s() -> Timings:
    """Processor time of refreshes on this machine, which other processes hardly change."""
    probe = Probe(folder=Path(), clock=time.process_time)
    found: Timings = dict(probe.measurements())["refreshes"]()["refresh_s"]
    return found


def network_of(name: str, args: argparse.Namespace) -> Network:
    """A network of the table, with what the command line says of it."""
    network = NETWORKS[name]
    for field, given in (
        ("inter", args.inter_gb_per_s),
        ("results_inter", args.results_gb_per_s),
    ):
        if given is not None:
            speed = Speed(given * 1e9, getattr(network, field).latency_s)
            network = dataclasses.replace(network, **{field: speed})
    return network


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, compare with real processes, print, and write the report if a file was named."""
    args = parse_arguments(argv)
    cluster = cluster_of(args)
    networks = {name: network_of(name, args) for name in args.networks}
    jobs, threads = cluster.workers
    models = {}
    for name in progress_bar(args.models, "scale"):
        work = workload(TRAININGS[name])
        found = {key: sweep(work, args, cluster, network) for key, network in networks.items()}
        models[name] = {"made_of": describe(work, cluster), "networks": found}
    report = {
        "benchmark": "scale",
        "machine": describe_machine(),
        "settings": {
            **{key: value for key, value in vars(args).items() if key not in ("json", "machine")},
            "shown_staleness": [s for s in SHOWN_STALENESS if s in args.staleness],
            "judged_staleness": asteria.RuntimeConfig().staleness,
        },
        "assumptions": {
            "cluster": dataclasses.asdict(cluster),
            "networks": {name: dataclasses.asdict(network) for name, network in networks.items()},
            "host_jobs": jobs,
            "host_threads": threads,
        },
        "models": models,
        "check": scale_check.compare(args.check_ranks, steps=args.check_steps),
    }
    text = text_of(report)
    print(text)
    if args.json is not None:
        write_json(args.json, report)
        args.json.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(report, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
