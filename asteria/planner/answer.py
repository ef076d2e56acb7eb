"""From the question to the answer, with the functions that the optimizer itself uses."""

from __future__ import annotations

import torch

from asteria.planner.advice import suggestions, warnings_of
from asteria.planner.extents import planned_extents, routed
from asteria.planner.kinds import kinds
from asteria.planner.memory import budgets, housed, placed, traffic
from asteria.planner.plan import Plan
from asteria.planner.question import Question
from asteria.planner.refreshes import planned_refreshes, refreshes_beside
from asteria.runtime.claims import working_bytes

__all__ = ["answer"]


def answer(question: Question) -> Plan:
    """What training will take; allocates no tensors. Any thread.

    Raises ConfigError where the optimizer would.
    """
    config, machine = question.config, question.machine
    device = torch.device("cpu" if machine.shares_memory else "cuda")
    ways = routed(question.weights, question.group, question.rule)
    census = planned_extents(ways, device)
    refreshes = planned_refreshes(ways, question.group, config, machine, question.step_s)
    jobs, _ = refreshes_beside(config, machine)
    groups = placed(census, refreshes.period, config)
    limits = budgets(config, machine, working_bytes(census, refreshes=jobs))
    memory, placement = housed(census, groups, limits, refreshes=jobs)
    moved = traffic(
        groups,
        placement,
        memory,
        machine,
        # What the device refreshes stays there; where both do, this is what it would be at most.
        sent_every=refreshes.period if jobs and refreshes.round_s else None,
    )
    rows = kinds(ways)
    return Plan(
        model=question.model,
        optimizer=question.rule.name,
        parameters=sum(row.parameters for row in rows),
        adamw_rule_parameters=sum(row.parameters for row in rows if row.rule == "adamw"),
        adamw_bytes=sum(2 * w.shape.numel() * w.dtype.itemsize for w in question.weights),
        kinds=rows,
        memory=memory,
        traffic=moved,
        refreshes=refreshes,
        machine=machine,
        fits=placement is not None,
        warnings=tuple(warnings_of(question, memory, moved, refreshes)),
        suggestions=tuple(suggestions(question, ways, groups, memory, refreshes)),
    )
