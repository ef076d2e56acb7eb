"""Everything that only an accelerator can show, in eight minutes on a machine with one GPU.

    make accelerator        # python -m benchmarks.accelerator

Writes ``<device>.json``, ``<device>.md`` and ``<device>.png``: the tests that need a GPU, refresh
rates, whole steps of a 124M GPT and of the largest model that has room (AdamW, ours with
refreshes in the step, by the host and beside on the device, other packages' SOAP), a model of a
billion weights within 24 GB, waits, bytes of each link, energy. Each section has a process and a
time box of its own; one that fails is recorded, and the others go on. Without an accelerator the
sections run on a tiny model with the host in its place, and every figure is "not measured".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accelerator_plot import plot
from benchmarks.accelerator_report import judge, markdown
from benchmarks.accelerator_sections import ROOT, SECTIONS, Box
from benchmarks.measurement import describe_machine, progress_bar, write_json
from benchmarks.runs import finite

TOTAL_S = 8 * 60.0
START_S = 12.0
"""For a process to start and to end, beside its box."""
RESULTS = ROOT / "benchmarks" / "results"
Outcome = dict[str, Any]
RunSection = Callable[[str, str, float, float], Outcome]
"""(section, device, seconds of its box, seconds after which it is ended) -> what came of it."""


def run_in_process(name: str, device: str, seconds: float, most_s: float) -> Outcome:
    """Run a section in a process of its own, so that nothing it breaks or keeps is left."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.accelerator", "--section", name]
        command += ["--device", device, "--seconds", str(seconds), "--out", str(file)]
        # Segments that grow leave no gaps, which the memory of a small device has no room for.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | dict(os.environ)
        outcome: Outcome = {"status": "done"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                timeout=most_s,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                outcome = {"status": "failed", "error": _last_lines(done.stderr)}
        except subprocess.TimeoutExpired as late:
            outcome = {"status": "out of time", "error": _last_lines(late.stderr)}
        if file.exists():  # also what it had found before it was ended
            outcome["result"] = json.loads(file.read_text(encoding="utf-8"))
        return outcome


def _last_lines(text: str | bytes | None) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return "\n".join((text or "").strip().splitlines()[-8:])


def run_all(
    names: Sequence[str],
    device: str,
    *,
    total_s: float = TOTAL_S,
    run: RunSection = run_in_process,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """All sections, one after the other; those for which no time is left are left out."""
    begin_s, outcomes = clock(), dict[str, Outcome]()
    for name in progress_bar(names, "accelerator"):
        box_s, left_s = SECTIONS[name][0], total_s - (clock() - begin_s)
        if left_s < START_S + 0.2 * box_s:
            outcomes[name] = {"status": "out of time", "error": "no time was left", "seconds": 0.0}
            continue
        start_s = clock()
        outcome = run(name, device, min(box_s, left_s - START_S), min(box_s + START_S, left_s))
        outcomes[name] = outcome | {"seconds": round(clock() - start_s, 1)}
    return outcomes


def describe_device(device: str) -> dict[str, Any]:
    """Name, memory and driver of the accelerator."""
    if device == "cpu":
        return {"name": "no accelerator"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
    }


def slug(name: str) -> str:
    """As a file would be called."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report_on(device: str, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What was found, and the targets."""
    return {
        "benchmark": "accelerator",
        "device": describe_device(device),
        "measured": device != "cpu",
        "machine": describe_machine(["heavyball", "pytorch_optimizer"]),
        "sections": dict(outcomes),
        "targets": judge(outcomes),
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu: the host plays it, and nothing is measured")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    add("--minutes", type=float, default=TOTAL_S / 60, help="for everything")
    add("--folder", type=Path, default=RESULTS, help="where the report goes")
    add("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _save(path: Path, result: Mapping[str, Any]) -> None:
    write_json(path, finite(dict(result)))


def main(argv: Sequence[str] | None = None, run: RunSection = run_in_process) -> None:
    """Run all sections and write the report; or one of them, in a process of its own."""
    args = parse_arguments(argv)
    if args.section is not None:
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
        save = partial(_save, args.out)
        save(SECTIONS[args.section][1](Box(torch.device(args.device), args.seconds, save)))
        return
    if args.device == "cpu":
        print("no accelerator: the host plays it on a tiny model, and nothing is measured")
    outcomes = run_all(args.only, args.device, total_s=60 * args.minutes, run=run)
    report = report_on(args.device, outcomes)
    text = markdown(report)
    print(text)
    path = args.folder / f"{slug(report['device']['name'])}.json"
    write_json(path, finite(report))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if report["measured"]:
        plot(report, path.with_suffix(".png"))
    print(f"report: {path}")


if __name__ == "__main__":
    main()
