"""`asteria.plan`: what training will take, told before it begins."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import replace
from typing import Any

import torch

from asteria.algorithms.algorithm import Algorithm
from asteria.config.runtime import RuntimeConfig
from asteria.errors import ConfigError
from asteria.optim.kl import KLSOAP, KLShampoo
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.optim.soap import SOAP
from asteria.planner.answer import answer
from asteria.planner.machine import Machine, find_machine
from asteria.planner.plan import Plan
from asteria.planner.question import Question
from asteria.planner.weights import Described, weights_of

__all__ = ["OPTIMIZERS", "plan"]

OPTIMIZERS: dict[str, type[SecondOrderOptimizer]] = {
    "soap": SOAP,
    "klshampoo": KLShampoo,
    "klsoap": KLSOAP,
}
"""By the names that `plan` takes."""


def plan(
    model: Described,
    *,
    optimizer: str | type[SecondOrderOptimizer] = "soap",
    runtime: RuntimeConfig | None = None,
    machine: Machine | str | os.PathLike[str] | None = None,
    step_s: float | None = None,
    **options: Any,
) -> Plan:
    """What training with these settings will take: bytes, traffic, seconds and staleness.

    Needs no accelerator and allocates no tensors; any thread. The functions that place the state of
    a real optimizer place it here, so that the bytes of each tier are those of a run.

    Args:
        model: a module (on any device, ``meta`` too); the name of one (``"gpt2-xl"``,
            ``"llama-3-8b"``, ...); the path or the content of a Hugging Face ``config.json``; or
            shapes, or (name, shape) pairs.
        optimizer: ``"soap"``, ``"klshampoo"``, ``"klsoap"`` or the class.
        runtime: the settings of the run, its budgets above all; None takes ``RuntimeConfig()``.
        machine: what it will run on, or the file of an ``asteria probe``. None is this machine,
            with the rates that were probed, or else with modest ones.
        step_s: seconds of a step without refreshes, for what the host can sustain beside it.
        options: of the optimizer, as its constructor or a parameter group takes them.

    Raises ConfigError for what cannot be understood. State that has no room is no error:
    ``fits`` is False then, and ``suggestions`` say what to change.
    """
    runtime = RuntimeConfig() if runtime is None else runtime
    if not isinstance(runtime, RuntimeConfig):
        raise ConfigError(
            f"runtime must be an asteria.RuntimeConfig, found {type(runtime).__name__}"
        )
    kind = _class_of(optimizer)
    if step_s is not None and not 0 < step_s < math.inf:
        raise ConfigError(f"step_s must be a number of seconds > 0, found {step_s!r}")
    name, weights = weights_of(model)
    rule, group = _rule_and_group(kind, runtime, options)
    question = Question(
        model=name,
        weights=weights,
        rule=rule,
        group=group,
        config=runtime,
        machine=find_machine(machine, runtime.nvme_path),
        step_s=step_s,
    )
    return answer(question)


def _class_of(optimizer: object) -> type[SecondOrderOptimizer]:
    if isinstance(optimizer, type) and issubclass(optimizer, SecondOrderOptimizer):
        return optimizer
    key = str(optimizer).lower().replace("-", "").replace("_", "")
    if isinstance(optimizer, str) and key in OPTIMIZERS:
        return OPTIMIZERS[key]
    near = difflib.get_close_matches(key, OPTIMIZERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"optimizer {optimizer!r} was asked for, which is none of ours: {hint}There are "
        f"{', '.join(OPTIMIZERS)} and their classes"
    )


def _rule_and_group(
    kind: type[SecondOrderOptimizer], runtime: RuntimeConfig, options: dict[str, Any]
) -> tuple[Algorithm, dict[str, Any]]:
    """The rule, and the options of a parameter group as the optimizer completes and checks them."""
    # Of many dims, so that any number of batch dims is possible; a meta tensor has no memory.
    stand_in = torch.nn.Parameter(torch.empty((1,) * 16, device="meta"))
    quiet = replace(runtime, trace=None, nvme_path=None)
    with kind([{"params": [stand_in], **options}], runtime=quiet) as made:  # type: ignore[call-arg]
        group = made.param_groups[0].items()
        return made.rule, {key: value for key, value in group if key != "params"}
