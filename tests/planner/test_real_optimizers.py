"""What is planned is what happens: bytes of real optimizers, kind by kind."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import asteria
from asteria.planner.extents import planned_extents, routed
from asteria.planner.machine import Machine
from asteria.planner.memory import CLASSES
from asteria.planner.weights import weights_of
from asteria.runtime.claims import working_bytes

OPTIMIZERS: dict[str, type[Any]] = {
    "soap": asteria.SOAP,
    "klshampoo": asteria.KLShampoo,
    "klsoap": asteria.KLSOAP,
}


class Net(nn.Module):
    """Matrices, a vector, a scalar, a convolution, a stack of experts and a large dim."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 24)
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24)
        self.again = nn.Linear(24, 40)
        self.conv = nn.Conv2d(6, 8, 3)
        self.experts = nn.Parameter(torch.zeros(3, 33, 34))
        self.scale = nn.Parameter(torch.zeros(()))
        self.precise = nn.Parameter(torch.zeros(12, 10, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros(5, 5), requires_grad=False)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one-sided": {"max_precond_dim": 32},
    "blocks": {"max_precond_dim": 16, "large_dims": "blocks"},
    "no stacks": {"batch_dims": 0},
}


def stepped(kind: type[Any], model: nn.Module, options: dict[str, Any], **runtime: Any) -> Any:
    group = {"params": [p for p in model.parameters() if p.requires_grad], **options}
    optimizer = kind([group], runtime=asteria.RuntimeConfig(**runtime))
    for parameter in group["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


STORED: dict[str, dict[str, Any]] = {
    "wide": {},
    "narrow": {"state_dtype": torch.bfloat16},
    "packed": {"factors": "packed"},
}


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_of_every_class_are_those_of_the_real_state(
    name: str, options: str, form: str
) -> None:
    model = Net()
    runtime = asteria.RuntimeConfig(**STORED[form])
    plan = asteria.plan(
        model, optimizer=name, machine=Machine(), runtime=runtime, **OPTIONS[options]
    )
    with stepped(OPTIMIZERS[name], model, OPTIONS[options], **STORED[form]) as optimizer:
        real: Counter[str] = Counter()
        for extents in optimizer._engine._extents.values():
            for extent in extents:
                for life, cell in extent.cells.items():
                    real[CLASSES[life]] += cell.nbytes
        shown = optimizer.describe()
    assert plan.memory.by_class == real
    assert plan.memory.bytes_at == {"device": sum(real.values()), "pinned": 0, "nvme": 0}
    assert sum(kind.state_bytes for kind in plan.kinds) == shown.state_bytes
    assert Counter({k.rule: 0 for k in plan.kinds}).keys() == {row.rule for row in shown.rows}


@pytest.mark.parametrize("form", ["narrow", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_extents_are_those_of_the_real_state(
    options: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that tiles of a kind are spread over several extents.
    monkeypatch.setattr("asteria.runtime.extents.EXTENT_BYTES", 20_000)
    model = Net()
    with stepped(asteria.SOAP, model, OPTIONS[options], **STORED[form]) as optimizer:
        real = [
            (extent.key, extent.blocks)
            for extents in optimizer._engine._extents.values()
            for extent in extents
        ]
        group, rule = optimizer.param_groups[0], optimizer.rule
        working = optimizer._engine._residence._working_bytes
        refreshes = optimizer._engine._residence._refreshes
    ways = routed(weights_of(model)[1], group, rule)
    census = planned_extents(ways, torch.device("cpu"))
    assert census == real
    assert len(census) > len({key for key, _ in census}), "some kinds have several extents"
    assert working_bytes(census, refreshes=refreshes) == working


def test_a_model_on_the_meta_device_has_the_plan_of_a_real_one() -> None:
    with torch.device("meta"):
        model = Net()
    real = asteria.plan(Net(), machine=Machine())
    assert asteria.plan(model, machine=Machine()) == real


def test_factors_that_turn_take_the_room_of_full_ones_and_more_only_in_a_step() -> None:
    full, turning = (
        asteria.plan(Net(), optimizer="soap", machine=Machine(), runtime=runtime)
        for runtime in (
            asteria.RuntimeConfig(refresh_method="ldlr"),
            asteria.RuntimeConfig(factors="rotated"),
        )
    )
    assert turning.memory.by_class == full.memory.by_class
    assert turning.memory.working_bytes > full.memory.working_bytes
    assert turning.refreshes == full.refreshes
