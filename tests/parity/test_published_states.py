"""A state dict of the published SOAP continues its trajectory here."""

from typing import Any

import numpy as np
import pytest
import torch

import asteria
from tests.parity.replay import PUBLISHED_SOAP, assert_follows
from tests.parity.test_published_trajectories import CASES, recorded
from tests.reference import ReferenceSOAP
from tests.reference.soap import Array

SOAP_CASES = [name for name, case in CASES.items() if case["optimizer"] == "SOAP"]
FIRST = [1, 2, 11, 13]
"""Steps before the switch: bases just made; no moments but one; on a refresh; between two."""


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.tensor(value)
        return [convert(each) for each in value] if isinstance(value, list) else value

    return {key: convert(value) for key, value in state.items()}


def published_group(options: dict[str, Any], count: int) -> dict[str, Any]:
    """The one parameter group of the published program, which does not keep data_format there."""
    group = {**PUBLISHED_SOAP, **options, "params": list(range(count))}
    del group["data_format"]
    return group


def continued(
    name: str, steps: int, runtime: asteria.RuntimeConfig
) -> tuple[list[Array], list[Array]]:
    """(trajectories here, those of the reference) from step ``steps`` on, in float64."""
    options = CASES[name]["kwargs"]
    gradients, starts = recorded(name, "grads"), recorded(name, "p0")
    references = [ReferenceSOAP(start, **options) for start in starts]
    state = {}
    for index, (reference, mine) in enumerate(zip(references, gradients, strict=True)):
        for gradient in mine[:steps]:
            reference.step(gradient)
        state[index] = as_tensors(reference.published_state())
    params = [torch.nn.Parameter(torch.tensor(r.parameter)) for r in references]
    layout = {"data_format": options.get("data_format", "channels_first")}
    optimizer = asteria.SOAP(params, runtime=runtime, **layout)
    group = published_group(options, len(params))
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    mine_now: list[list[Array]] = [[] for _ in params]
    theirs: list[list[Array]] = [[] for _ in params]
    for step in range(steps, len(gradients[0])):
        for p, given in zip(params, gradients, strict=True):
            p.grad = torch.tensor(given[step], dtype=torch.float64)
        optimizer.step()
        for index, reference in enumerate(references):
            mine_now[index].append(params[index].detach().numpy().copy())
            theirs[index].append(reference.step(gradients[index][step]))
    return [np.stack(a) for a in mine_now], [np.stack(b) for b in theirs]


@pytest.mark.parametrize("steps", FIRST)
@pytest.mark.parametrize("name", SOAP_CASES)
def test_it_goes_on_as_the_reference_does(name: str, steps: int) -> None:
    actual, expected = continued(name, steps, asteria.RuntimeConfig.reference())
    published = recorded(name, "params")
    for mine, theirs, recording, start in zip(
        actual, expected, published, recorded(name, "p0"), strict=True
    ):
        assert_follows(mine, theirs, start, "asteria float64, reference float64")
        assert_follows(mine, recording[steps:], start, "reference float64, published float32")


@pytest.mark.parametrize("name", SOAP_CASES)
def test_the_default_runtime_takes_it_too(name: str) -> None:
    actual, expected = continued(name, 13, asteria.RuntimeConfig())
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.isfinite(mine).all()
        assert np.abs(mine[0] - theirs[0]).max() <= 1e-9 * max(1.0, np.abs(theirs[0]).max())
