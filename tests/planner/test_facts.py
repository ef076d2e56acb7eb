"""Published arithmetic comes out of a plan, without a tensor and in no time."""

import re
import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import asteria
from asteria.planner.machine import Machine

HIDDEN = [
    (f"layers.{layer}.{name}", shape)
    for layer in range(32)
    for name, shape in (
        ("q", (4096, 4096)),
        ("k", (4096, 4096)),
        ("v", (4096, 4096)),
        ("o", (4096, 4096)),
        ("gate", (11008, 4096)),
        ("up", (11008, 4096)),
        ("down", (4096, 11008)),
    )
]


@pytest.mark.parametrize(("optimizer", "state_gb"), [("soap", 192), ("klshampoo", 166)])
def test_hidden_matrices_of_llama_7b(optimizer: str, state_gb: float) -> None:
    plan = asteria.plan(HIDDEN, optimizer=optimizer, machine=Machine(), max_precond_dim=11008)
    assert plan.refreshes.factors == {4096: 352, 11008: 96}
    assert plan.adamw_bytes / 1e9 == pytest.approx(51.8, abs=0.05)
    assert plan.memory.state_bytes / 1e9 == pytest.approx(state_gb, abs=0.5)
    assert plan.memory.by_class["factors"] / 1e9 == pytest.approx(70, abs=0.5)
    assert plan.memory.by_class["bases"] == plan.memory.by_class["factors"]
    large = plan.refreshes.factors[11008] * Machine().seconds(11008, 1, method="qr")
    assert large / plan.refreshes.round_s == pytest.approx(0.84, abs=0.01)


def test_a_large_dim_is_one_sided_or_blocked() -> None:
    plan = asteria.plan(HIDDEN[4:5], machine=Machine())
    (one_sided,) = plan.kinds
    assert one_sided.large_dims == (11008,)
    assert one_sided.factors == ((4096, 1),)
    assert "one-sided: factors of 4096, none of 11008" in str(plan)
    plan = asteria.plan(HIDDEN[4:5], machine=Machine(), large_dims="blocks", max_precond_dim=2048)
    (blocks,) = plan.kinds
    assert blocks.large_dims == ()
    assert blocks.factors == ((1834, 4), (1835, 8), (2048, 12))
    assert "8 blocks 1835x2048 + 4 blocks 1834x2048" in str(plan)


def test_kinds_are_grouped_and_the_adamw_rule_is_counted() -> None:
    plan = asteria.plan("gpt2", machine=Machine())
    rows = {kind.name: kind for kind in plan.kinds}
    assert rows["transformer.h.*.attn.c_attn.weight"].count == 12
    assert rows["transformer.h.*.attn.c_attn.weight"].parameters == 12 * 768 * 2304
    assert rows["transformer.h.*.attn.c_attn.bias"].rule == "adamw"
    vectors = 12 * (768 * 2 * 2 + 2304 + 768 + 3072 + 768) + 2 * 768
    assert plan.adamw_rule_parameters == vectors
    assert plan.parameters == 124_439_808
    assert len(plan.kinds) == 14
    table = str(plan).split("\n\n")[1]
    assert "attn.c_attn.bias" not in table, "vectors are one row"
    assert re.search(r"vectors and scalars +98 +adamw", table)


@pytest.mark.parametrize("options", [{}, {"large_dims": "blocks", "max_precond_dim": 2048}])
def test_70b_takes_less_than_two_seconds(options: dict[str, Any]) -> None:
    begin = time.process_time()
    text = str(asteria.plan("llama-3-70b", machine=Machine(), **options))
    assert time.process_time() - begin < 2.0
    assert len(text.splitlines()) < 60


class NoTensors(TorchDispatchMode):
    """Refuses every operation whose result has memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            assert result.device.type == "meta", func
        return result


def test_nothing_is_allocated() -> None:
    with NoTensors():
        asteria.plan("llama-3-70b")
        with pytest.raises(AssertionError):
            torch.zeros(1)
