"""What an optimizer does, as scalars under flat names."""

import dataclasses
from typing import Any

import pytest
import torch

import asteria
from asteria.telemetry.counters import Stats
from tests.support.arms import LR, PERIOD, over_optimizers
from tests.support.asynchronous import build, manual
from tests.support.training import parameters, train

COUNTED = {"failures", "staleness", "tier_bytes", "tier_peak_bytes", "traffic", "network"}
"""Fields of the statistics that are no numbers."""


@over_optimizers
def test_every_number_of_the_statistics_is_there(name: str) -> None:
    optimizer = build(name)
    train(optimizer, range(6))
    stats, scalars = optimizer.stats(), asteria.logging_dict(optimizer)
    names = {field.name for field in dataclasses.fields(Stats)} - COUNTED
    assert scalars.keys() >= {f"asteria/{name}" for name in names}
    assert all(type(value) is float for value in scalars.values())
    assert scalars["asteria/steps"] == 6.0
    assert scalars["asteria/installs"] == stats.installs > 0
    assert scalars["asteria/update_s"] == stats.update_s > 0
    assert scalars["asteria/visible_s"] == stats.visible_s
    assert scalars["asteria/device_bytes"] == stats.tier_bytes["device"] > 0
    assert scalars["asteria/traffic_read_bytes"] == 0.0
    assert scalars["asteria/network_ranks"] == 1.0
    assert scalars["asteria/network_wait_s"] == 0.0


@over_optimizers
def test_staleness_is_that_of_the_updates(name: str) -> None:
    optimizer = build(name)
    assert not any("staleness" in key for key in asteria.logging_dict(optimizer))
    train(optimizer, range(9))
    ages = [
        age
        for by_age in optimizer.stats().staleness.values()
        for age, updates in by_age.items()
        for _ in range(updates)
    ]
    scalars = asteria.logging_dict(optimizer)
    assert scalars["asteria/staleness_mean"] == pytest.approx(sum(ages) / len(ages))
    assert scalars["asteria/staleness_max"] == max(ages) > 1


def test_a_group_is_told_from_others_by_its_number() -> None:
    first, second = parameters([(4, 4), (4, 4)])
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": LR / 2}]
    alone = asteria.logging_dict(asteria.SOAP([first], lr=torch.tensor(LR)))
    both = asteria.logging_dict(asteria.SOAP(groups, lr=LR, precondition_frequency=PERIOD))
    assert alone["asteria/lr"] == LR
    assert (both["asteria/lr/0"], both["asteria/lr/1"]) == (LR, LR / 2)
    assert both["asteria/precondition_frequency/1"] == PERIOD
    assert "asteria/lr" not in both


def test_a_period_that_is_not_chosen_yet_is_left_out() -> None:
    scalars = asteria.logging_dict(build("SOAP", precondition_frequency="auto"))
    assert "asteria/precondition_frequency" not in scalars
    assert scalars["asteria/weight_decay"] == 0.01


def test_it_waits_for_no_worker() -> None:
    optimizer, workers = manual(build("SOAP"))
    while not workers.queue:
        train(optimizer, range(1))
    waited, queued = len(workers.waited_for), len(workers.queue)
    assert asteria.logging_dict(optimizer)["asteria/in_flight"] == queued
    assert (len(workers.waited_for), len(workers.queue)) == (waited, queued)


def test_what_wraps_an_optimizer_is_refused_with_what_to_pass() -> None:
    class Wrapper:
        optimizer = build("SOAP")

    wrong: Any
    for wrong in (Wrapper(), torch.optim.AdamW(parameters()), None):
        with pytest.raises(asteria.ConfigError, match=f"found .*{type(wrong).__name__}") as error:
            asteria.logging_dict(wrong)
        assert ".optimizer" in str(error.value)
