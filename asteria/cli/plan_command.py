"""``asteria plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from asteria.config.runtime import RuntimeConfig, parse_bytes
from asteria.optim.planning import OPTIMIZERS, plan
from asteria.planner.architectures import MODELS
from asteria.planner.machine import Machine, find_machine

__all__ = ["add_plan"]

_RUNTIME = tuple(field.name for field in dataclasses.fields(RuntimeConfig))


def add_plan(commands: argparse._SubParsersAction[Any], *, epilog: str) -> None:
    """Add the command with its options."""
    parser = commands.add_parser(
        "plan",
        help="what training will take, told before it begins",
        description="Bytes per tier, traffic, seconds per refresh and the staleness that result, "
        "before training. Needs no accelerator.",
        epilog=epilog,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "model", help=f"one of {', '.join(MODELS)}, or the path of a Hugging Face config.json"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--step-time", type=float, metavar="S", help="seconds of a training step")

    of_optimizer = parser.add_argument_group("optimizer")
    of_optimizer.add_argument("--optimizer", metavar="NAME", help=", ".join(OPTIMIZERS))
    of_optimizer.add_argument("--precondition-frequency", type=_count_or_auto, metavar="STEPS")
    of_optimizer.add_argument("--max-precond-dim", type=int, metavar="N")
    of_optimizer.add_argument("--large-dims", metavar="one_sided|blocks")
    of_optimizer.add_argument("--merge-dims", action="store_true")
    of_optimizer.add_argument("--precondition-1d", action="store_true")

    of_runtime = parser.add_argument_group("runtime")
    for option in ("--device-budget", "--host-budget", "--nvme-budget"):
        of_runtime.add_argument(option, metavar="SIZE", help="of state, such as 8GiB")
    of_runtime.add_argument("--nvme-path", metavar="FOLDER", help="of the NVMe tier")
    of_runtime.add_argument("--refresh", metavar="async|sync")
    of_runtime.add_argument("--refresh-method", metavar="qr|eigh|auto")
    of_runtime.add_argument("--factors", metavar="full|packed", help="how they are kept")
    of_runtime.add_argument("--staleness", type=int, metavar="STEPS")
    of_runtime.add_argument("--workers", type=int, metavar="N", help="host threads for refreshes")

    of_machine = parser.add_argument_group(
        "machine", "by default this one, with the rates that `asteria probe` has measured"
    )
    of_machine.add_argument("--machine", metavar="FILE", help="what `asteria probe` wrote")
    of_machine.add_argument("--device-memory", metavar="SIZE", help="free on the accelerator")
    of_machine.add_argument("--host-memory", metavar="SIZE", help="free on the host")
    of_machine.add_argument("--nvme-space", metavar="SIZE", help="free on the disk")
    of_machine.add_argument("--cores", type=int, metavar="N")


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _run(options: dict[str, Any]) -> tuple[str, int]:
    as_json = options.pop("json", False)
    runtime = RuntimeConfig(**{name: options.pop(name) for name in _RUNTIME if name in options})
    machine = _machine(options, runtime)
    step_s = options.pop("step_time", None)
    found = plan(options.pop("model"), runtime=runtime, machine=machine, step_s=step_s, **options)
    text = json.dumps(found.to_dict(), indent=2) if as_json else str(found)
    return text, 0 if found.fits else 1


def _machine(options: dict[str, Any], runtime: RuntimeConfig) -> Machine:
    """The machine, with what the options say of it; these are taken out of ``options``."""
    machine = find_machine(options.pop("machine", None), runtime.nvme_path)
    sizes: Mapping[str, str] = {
        "device_memory": "device_bytes",
        "host_memory": "host_bytes",
        "nvme_space": "nvme_bytes",
    }
    told: dict[str, Any] = {
        field: parse_bytes(options.pop(name)) for name, field in sizes.items() if name in options
    }
    if "cores" in options:
        # The threads of training were those of this machine.
        told |= {"cores": options.pop("cores"), "training_threads": None}
    return dataclasses.replace(machine, **told)
