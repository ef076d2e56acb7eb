"""The command line: which commands there are, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from asteria.cli.plan_command import add_plan
from asteria.cli.probe_command import add_probe
from asteria.errors import AsteriaError
from asteria.version import __version__

__all__ = ["main"]

_EPILOG = """exit status: 0 done, 1 the state of the plan has no room, 2 something cannot be used"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``asteria`` with ``arguments``, by default those of the process.

    Returns the exit status: 0, 1 if the state of a plan has no room, 2 for what an AsteriaError
    tells on stderr. Raises SystemExit for arguments that cannot be parsed (2) and for ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="asteria",
        description="Second-order optimizers for PyTorch that anyone can switch on.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_plan(commands, epilog=_EPILOG)
    add_probe(commands, epilog=_EPILOG)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        text, status = run(options)
    except AsteriaError as error:
        sys.stderr.write(f"asteria: {error}\n")
        return 2
    sys.stdout.write(f"{text}\n")
    return int(status)
