"""Tiers, budgets, traffic and what is said where there is no room."""

import dataclasses
import re
from typing import Any

import pytest
import torch

import asteria
from asteria.config.runtime import RuntimeConfig, parse_bytes
from asteria.planner.machine import Machine
from asteria.planner.memory import budgets
from asteria.planner.plan import Plan
from asteria.planner.table import readable_bytes
from asteria.runtime import residence
from asteria.runtime.residence import Residence
from asteria.store.lane import DeviceLane

GIB = 2**30
SHAPES = [(f"layers.{n}.weight", (1024, 1024)) for n in range(30)]
"""24 MiB of state each, of which two make an extent."""
STATE_BYTES = 30 * 6 * 4 * 1024**2


def planned(machine: Machine, optimizer: Any = "soap", **config: Any) -> Plan:
    return asteria.plan(
        SHAPES, optimizer=optimizer, machine=machine, runtime=RuntimeConfig(**config)
    )


def test_all_fits_into_memory_without_budgets() -> None:
    plan = planned(Machine(host_bytes=None, host_copy_bytes_per_s=1e9))
    assert plan.fits
    assert plan.memory.bytes_at == {"device": STATE_BYTES, "pinned": 0, "nvme": 0}
    assert plan.memory.window_bytes == plan.traffic.moved_bytes == plan.traffic.link_bytes == 0
    share = (2 + 1) / 10
    both = plan.memory.by_class["bases"] + plan.memory.by_class["factors"]
    assert plan.memory.in_flight_bytes == pytest.approx(share * both, rel=1e-6)
    assert plan.traffic.copied_bytes == both // 10
    assert plan.traffic.copy_s == pytest.approx(both / 10 / 1e9)
    assert plan.suggestions == ()


def test_synchronous_refreshes_are_never_in_flight() -> None:
    plan = planned(Machine(), refresh="sync")
    assert plan.memory.in_flight_bytes == plan.traffic.copied_bytes == 0


def test_what_has_no_room_goes_to_disk_and_is_moved_every_step() -> None:
    machine = Machine(disk_read_bytes_per_s=1e9, disk_write_bytes_per_s=5e8)
    plan = planned(machine, host_budget="512MiB", nvme_path="/scratch")
    at, moved = plan.memory.bytes_at, plan.traffic
    assert plan.fits
    assert at is not None
    assert at["pinned"] == 0
    assert at["device"] + at["nvme"] == STATE_BYTES
    assert at["nvme"] > 0
    room = parse_bytes("512MiB") - plan.memory.window_bytes - plan.memory.working_bytes
    assert at["device"] + plan.memory.in_flight_bytes <= room
    by_class = plan.memory.bytes_at_by_class
    assert by_class is not None
    share = (2 + 1) / 10
    assert plan.memory.waiting_bytes == pytest.approx(share * by_class["nvme"]["bases"], abs=2)
    assert "refreshes that wait on NVMe" in str(plan)
    refreshed = (by_class["nvme"]["bases"] + by_class["nvme"]["factors"]) / 10
    assert moved.disk_read_bytes == pytest.approx(at["nvme"] + refreshed, abs=2)
    assert moved.moved_bytes == pytest.approx(at["nvme"] + moved.disk_write_bytes, abs=2)
    assert moved.link_bytes == 0, "memory is shared"
    seconds = moved.disk_read_bytes / 1e9 + moved.disk_write_bytes / 5e8
    assert moved.disk_s == pytest.approx(seconds)
    for tier, size in at.items():
        assert sum(by_class[tier].values()) == size
    for name, size in plan.memory.by_class.items():
        assert sum(by_class[tier][name] for tier in at) == size


def test_an_accelerator_has_a_tier_of_host_memory_and_a_link() -> None:
    machine = Machine(device_bytes=GIB // 2, host_bytes=4 * GIB, link_bytes_per_s=1e10)
    plan = planned(machine)
    at = plan.memory.bytes_at
    assert at is not None
    assert at["device"] > 0
    assert at["pinned"] > 0
    assert at["nvme"] == 0
    bases, factors = plan.memory.by_class["bases"], plan.memory.by_class["factors"]
    refreshed = (2 * bases + factors) / 10
    assert plan.traffic.link_bytes == pytest.approx(plan.traffic.moved_bytes + refreshed, abs=2)
    assert plan.traffic.link_s > plan.traffic.link_bytes / 2 / 1e10 * 0.99
    still = planned(machine, refresh="sync")
    assert still.traffic.link_bytes == still.traffic.moved_bytes


def said(plan: Plan, pattern: str) -> str:
    """The first group of the pattern in the suggestions."""
    found = re.search(pattern, "\n".join(plan.suggestions))
    assert found, plan.suggestions
    return found[1]


def test_the_budget_that_is_suggested_is_the_least_that_does() -> None:
    plan = planned(Machine(), host_budget="256MiB")
    assert not plan.fits
    assert plan.memory.bytes_at is None
    assert plan.memory.state_bytes == STATE_BYTES
    assert "does not fit into memory 256.0 MiB" in str(plan)
    budget = said(plan, r"raise host_budget to at least (\d+MiB)")
    assert planned(Machine(), host_budget=budget).fits
    assert not planned(Machine(), host_budget=parse_bytes(budget) - 2**20).fits


def test_the_disk_that_is_suggested_is_the_least_that_does() -> None:
    plan = planned(Machine(), host_budget="256MiB")
    space = said(plan, r"give nvme_path: a folder on a disk with (\d+MiB) free")
    disk = {"nvme_path": "/scratch", "host_budget": "256MiB"}
    assert planned(Machine(), **disk, nvme_budget=space).fits
    short = planned(Machine(), **disk, nvme_budget=parse_bytes(space) - 2**20)
    assert not short.fits
    assert said(short, r"raise nvme_budget to at least (\d+MiB)") == space
    small = planned(Machine(nvme_bytes=GIB // 8), **disk)
    assert not small.fits
    assert "it has 128.0 MiB" in "\n".join(small.suggestions)


def test_host_memory_that_is_suggested_for_an_accelerator_does() -> None:
    plan = planned(Machine(device_bytes=GIB // 2), host_budget="64MiB")
    assert not plan.fits
    budget = said(plan, r"raise host_budget to at least (\d+MiB)")
    assert planned(Machine(device_bytes=GIB // 2), host_budget=budget).fits


def test_a_host_that_has_no_more_memory_is_not_asked_for_it() -> None:
    plan = planned(Machine(host_bytes=GIB // 4))
    assert not plan.fits
    assert "a host with free memory of" in plan.suggestions[0]
    assert "this one has 256.0 MiB" in plan.suggestions[0]


def test_smaller_blocks_that_are_suggested_do() -> None:
    shapes = [("wide", (1024, 8192)), ("tall", (8192, 1024))]
    runtime = RuntimeConfig(host_budget="700MiB", refresh="sync")
    plan = asteria.plan(shapes, machine=Machine(), runtime=runtime)
    assert not plan.fits
    side = int(said(plan, r"large_dims='blocks' with max_precond_dim=(\d+)"))
    smaller = asteria.plan(
        shapes, machine=Machine(), runtime=runtime, large_dims="blocks", max_precond_dim=side
    )
    assert smaller.fits


def test_bases_in_bfloat16_are_suggested_where_they_do() -> None:
    hint = "RuntimeConfig(state_dtype=torch.bfloat16)"
    least = planned(Machine(), state_dtype=torch.bfloat16).memory.state_bytes
    narrow = {"state_dtype": torch.bfloat16, "refresh": "sync"}
    for budget, helps in ((least + 1, True), (least - 1, False)):
        plan = planned(Machine(), host_budget=budget, refresh="sync")
        assert not plan.fits
        assert any(hint in text for text in plan.suggestions) == helps
        there = planned(Machine(), host_budget=budget, **narrow)
        assert there.fits == helps
        assert not any(hint in text for text in there.suggestions)
    turning = planned(Machine(), host_budget=least + 1, refresh="sync", factors="rotated")
    assert not turning.fits
    assert not any(hint in text for text in turning.suggestions), "they need bases in full"


@pytest.mark.parametrize("optimizer", ["soap", "klshampoo"])
def test_packed_factors_are_suggested_where_they_do(optimizer: str) -> None:
    hint = "RuntimeConfig(factors='packed')"
    packed: dict[str, Any] = {"factors": "packed", "refresh": "sync"}
    full = planned(Machine(), optimizer)
    least = planned(Machine(), optimizer, **packed).memory.state_bytes
    share = {"soap": 6, "klshampoo": 5}[optimizer]
    assert least == pytest.approx(full.memory.state_bytes * (1 - 1 / share), rel=1e-3)
    for budget, helps in ((least + 1, True), (least - 1, False)):
        plan = planned(Machine(), optimizer, host_budget=budget, refresh="sync")
        assert not plan.fits
        assert any(hint in text for text in plan.suggestions) == helps
        there = planned(Machine(), optimizer, host_budget=budget, **packed)
        assert there.fits == helps
        assert not any("packed" in text for text in there.suggestions)


def test_both_are_suggested_where_neither_does_alone() -> None:
    hint = "RuntimeConfig(factors='packed', state_dtype=torch.bfloat16)"
    both: dict[str, Any] = {"factors": "packed", "state_dtype": torch.bfloat16}
    least = planned(Machine(), **both).memory.state_bytes
    plan = planned(Machine(), host_budget=least + 1, refresh="sync")
    assert [text for text in plan.suggestions if "RuntimeConfig" in text] == [
        f"{hint}: the state then takes {readable_bytes(least)}"
    ]
    assert planned(Machine(), host_budget=least + 1, refresh="sync", **both).fits


def test_a_budget_below_what_a_step_needs_is_told() -> None:
    shapes = [("head", (50000, 768)), ("embed", (50000, 768))]
    runtime = RuntimeConfig(host_budget="256MiB", nvme_path="/scratch")
    plan = asteria.plan(shapes, machine=Machine(), runtime=runtime)
    assert plan.fits
    assert plan.memory.least_bytes > parse_bytes("256MiB")
    assert "the budget will not hold" in plan.warnings[0]
    budget = said(plan, r"raise host_budget to at least (\d+MiB)")
    enough = RuntimeConfig(host_budget=budget, nvme_path="/scratch")
    assert asteria.plan(shapes, machine=Machine(), runtime=enough).warnings == ()
    side = int(said(plan, r"max_precond_dim=(\d+): a step then needs"))
    blocks = {"large_dims": "blocks", "max_precond_dim": side}
    assert asteria.plan(shapes, machine=Machine(), runtime=runtime, **blocks).warnings == ()


class Disk:
    """In place of the NVMe tier, of which budgets need nothing."""

    used_bytes = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass


@pytest.mark.parametrize("nvme", [{}, {"nvme_path": "/n"}, {"nvme_path": "/n", "nvme_budget": 99}])
@pytest.mark.parametrize("host", [{}, {"host_budget": "3MiB"}])
@pytest.mark.parametrize("device", [{}, {"device_budget": "5MiB"}])
@pytest.mark.parametrize("shared", [True, False])
def test_budgets_are_those_of_a_run(
    shared: bool,
    device: dict[str, Any],
    host: dict[str, Any],
    nvme: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residence, "NvmeTier", Disk)
    monkeypatch.setattr(residence, "host_free_bytes", lambda: 8000)
    monkeypatch.setattr(residence, "device_free_bytes", lambda _: 7000)
    monkeypatch.setattr(residence, "reserve_bytes", lambda *_: 0)
    config = RuntimeConfig(**device, **host, **nvme)
    real = Residence(config, is_host=lambda _: shared, lane=lambda where: DeviceLane(where))
    where = torch.device("cpu")
    real.door(where)
    machine = Machine(device_bytes=None if shared else 7000, host_bytes=8000)
    found, planned_for = real._budgets(where), budgets(config, machine, real._working_bytes)
    if shared and not host and not nvme:
        # A run goes on beyond what is free, into swap; a plan says that it does not fit.
        assert (planned_for.device_bytes, found.device_bytes) == (8000, None)
    else:
        assert planned_for == found


def test_a_plan_for_programs_has_plain_values_only() -> None:
    plan = planned(Machine(), host_budget="512MiB", nvme_path="/scratch")

    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(map(plain, value.values()))
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, int | float | str)

    content = plan.to_dict()
    assert plain(content)
    assert content["memory"]["bytes_at"] == plan.memory.bytes_at
    assert content.keys() == {field.name for field in dataclasses.fields(Plan)}
