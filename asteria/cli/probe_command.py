"""``asteria probe``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from asteria.cli.progress import in_progress
from asteria.planner.machine import Machine, default_path, save_machine
from asteria.planner.measurements import Probe
from asteria.planner.table import aligned, readable_bytes, readable_s

__all__ = ["add_probe"]


def add_probe(commands: argparse._SubParsersAction[Any], *, epilog: str) -> None:
    """Add the command with its options."""
    parser = commands.add_parser(
        "probe",
        help="measure this machine for `asteria plan`",
        description="Measures memory, disk, links and refreshes of this machine in less than half "
        "a minute, and writes them to a file that `asteria plan` uses.",
        epilog=epilog,
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--path", type=Path, default=Path(), metavar="FOLDER", help="on the disk to measure"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"where to write to; default {default_path()}"
    )


def _run(options: dict[str, Any]) -> tuple[str, int]:
    target = options["json"] or default_path()
    fields: dict[str, Any] = {}
    for _, measure in in_progress(Probe(folder=options["path"]).measurements()):
        fields |= measure()
    machine = Machine(**fields, source="measured")
    save_machine(machine, target)
    return f"{_report(machine)}\nwritten to {target}", 0


def _report(machine: Machine) -> str:
    rows = [
        ("cores", str(machine.cores)),
        ("free host memory", readable_bytes(machine.host_bytes)),
        ("free on the disk", readable_bytes(machine.nvme_bytes)),
        ("disk reads", _rate(machine.disk_read_bytes_per_s)),
        ("disk writes", _rate(machine.disk_write_bytes_per_s)),
        ("host copies", _rate(machine.host_copy_bytes_per_s)),
    ]
    if machine.device_bytes is not None:
        rows += [
            ("free on the accelerator", readable_bytes(machine.device_bytes)),
            ("link", _rate(machine.link_bytes_per_s)),
        ]
    for name, timings in (("refresh", machine.refresh_s), ("exact", machine.exact_s)):
        rows += [(f"{name} of a factor of {size}", readable_s(s)) for size, s in timings]
    return aligned(rows)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
