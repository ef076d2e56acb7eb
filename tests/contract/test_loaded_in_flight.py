"""A refresh in flight that came with a checkpoint: nobody here has computed it."""

import json
from pathlib import Path

import torch
from torch import Tensor

import asteria


def make(parameter: Tensor, trace: Path | None = None) -> asteria.SOAP:
    runtime = asteria.RuntimeConfig(start="eigh", trace=None if trace is None else str(trace))
    return asteria.SOAP([parameter], precondition_frequency=4, runtime=runtime)


def steps(optimizer: asteria.SOAP, parameter: Tensor, count: int) -> None:
    for step in range(count):
        parameter.grad = torch.cos(torch.arange(12.0) + step).view(3, 4)
        optimizer.step()


def test_it_costs_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameter = torch.randn(3, 4).requires_grad_()
    with make(parameter) as optimizer:
        steps(optimizer, parameter, 6)
        assert optimizer.stats().in_flight == 1
        saved = optimizer.state_dict()
    with make(parameter, tmp_path / "trace.json") as loaded:
        loaded.load_state_dict(saved)
        steps(loaded, parameter, 2)
        assert loaded.stats().installs == 2
        assert loaded._engine._governor.pace.seen_units == 0
        assert loaded.stats().worker_s == 0.0
    assert "saved refresh" not in json.dumps(json.loads((tmp_path / "trace.json").read_text()))
