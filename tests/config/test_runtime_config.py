"""RuntimeConfig: its fields are fixed, its values checked, what is not built yet says so."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

import asteria
from asteria.config.runtime import RuntimeConfig, parse_bytes

DEFAULTS: dict[str, Any] = {
    "refresh": "async",
    "refresh_method": "auto",
    "refresh_on": "auto",
    "staleness": 2,
    "install": "scheduled",
    "start": "fresh",
    "workers": None,
    "max_failures": 10,
    "device_budget": None,
    "host_budget": None,
    "nvme_budget": None,
    "nvme_path": None,
    "state_dtype": torch.float32,
    "factors": "full",
    "nonfinite": "raise",
    "trace": None,
    "shards": "exact",
    "process_group": None,
    "node_size": None,
}

CHOICES: dict[str, list[Any]] = {
    "refresh": ["async", "sync"],
    "refresh_method": ["eigh", "qr", "ldlr", "auto"],
    "refresh_on": ["host", "device", "auto"],
    "install": ["scheduled", "ready"],
    "start": ["fresh", "eigh", "adam"],
    "state_dtype": [torch.float32, torch.bfloat16],
    "factors": ["full", "packed", "rotated"],
    "nonfinite": ["raise", "skip"],
    "shards": ["exact", "local"],
}
"""The values that a field may take."""


def error(**options: Any) -> str:
    with pytest.raises(asteria.ConfigError) as raised:
        RuntimeConfig(**options)
    return str(raised.value)


def test_fields_and_defaults() -> None:
    config = RuntimeConfig()
    assert {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} == DEFAULTS


@pytest.mark.parametrize("name", DEFAULTS)
def test_it_is_frozen(name: str) -> None:
    config = RuntimeConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, DEFAULTS[name])


def test_it_has_no_room_for_unknown_fields() -> None:
    assert not hasattr(RuntimeConfig(), "__dict__")
    with pytest.raises(TypeError, match="stalness"):
        RuntimeConfig(stalness=1)  # type: ignore[call-arg]


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        RuntimeConfig("sync")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values]
)
def test_what_it_knows_is_accepted(name: str, value: Any) -> None:
    assert getattr(RuntimeConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["nonsense", "", None, 3])
def test_an_unknown_choice_is_refused_with_all_options(name: str, value: Any) -> None:
    message = error(**{name: value})
    assert f"RuntimeConfig.{name} must be one of " in message
    assert f"found {value!r}" in message
    for option in CHOICES[name]:
        assert repr(option) in message


def test_a_process_group_is_one_or_alone() -> None:
    assert RuntimeConfig(process_group="alone").process_group == "alone"
    message = error(process_group=object())
    assert "RuntimeConfig.process_group must be a torch.distributed.ProcessGroup" in message


@pytest.mark.parametrize("value", [0, 1, 2, 100])
def test_staleness_counts_steps(value: int) -> None:
    assert RuntimeConfig(staleness=value).staleness == value


@pytest.mark.parametrize("value", [-1, 1.0, "2", None, True])
def test_staleness_is_a_count(value: Any) -> None:
    message = error(staleness=value)
    assert "RuntimeConfig.staleness must be an int >= 0" in message
    assert f"found {value!r}" in message


@pytest.mark.parametrize("name", ["workers", "max_failures"])
def test_workers_and_failures_are_counts(name: str) -> None:
    for value in (1, 7):
        assert getattr(RuntimeConfig(**{name: value}), name) == value
    for wrong in (0, -1, 1.0, "2", True, *([None] if name == "max_failures" else [])):
        message = error(**{name: wrong})
        assert f"RuntimeConfig.{name} must be an int >= 1" in message
        assert f"found {wrong!r}" in message


@pytest.mark.parametrize("name", ["device_budget", "host_budget", "nvme_budget"])
@pytest.mark.parametrize("value", [0, 1024, "8GiB"])
def test_a_budget_is_a_size(name: str, value: int | str) -> None:
    assert getattr(RuntimeConfig(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["device_budget", "host_budget", "nvme_budget"])
@pytest.mark.parametrize("value", ["plenty", "-1GiB", -1, "8 XB"])
def test_a_budget_that_is_no_size_is_refused_by_name(name: str, value: Any) -> None:
    message = error(**{name: value})
    assert message.startswith(f"RuntimeConfig.{name}: a number of bytes ")
    assert repr(value) in message


def test_reference_is_the_control_arm() -> None:
    config = RuntimeConfig.reference()
    changes = {"refresh": "sync", "refresh_method": "qr", "start": "eigh", "staleness": 0}
    wanted = DEFAULTS | changes
    assert {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} == wanted


def test_repr_shows_what_was_changed() -> None:
    assert repr(RuntimeConfig()) == "RuntimeConfig()"
    assert repr(RuntimeConfig(start="adam", staleness=1)) == (
        "RuntimeConfig(staleness=1, start='adam')"
    )


def test_it_is_a_value() -> None:
    config = RuntimeConfig(start="adam")
    same = RuntimeConfig(start="adam")
    assert config == same
    assert hash(config) == hash(same)
    assert config != RuntimeConfig()
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_a_changed_copy_is_checked_too() -> None:
    assert dataclasses.replace(RuntimeConfig(), start="adam").start == "adam"
    with pytest.raises(asteria.ConfigError, match="RuntimeConfig.start"):
        dataclasses.replace(RuntimeConfig(), start="later")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("4096", 4096),
        ("17B", 17),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("500MB", 500 * 10**6),
        ("3MiB", 3 * 2**20),
        ("2GB", 2 * 10**9),
        ("8GiB", 8 * 2**30),
        ("1TB", 10**12),
        ("2TiB", 2**41),
        ("1.5 GB", 1_500_000_000),
        (".5KiB", 512),
        ("0.25GiB", 2**28),
        ("  12 MiB  ", 12 * 2**20),
        ("1.001KB", 1001),
        ("1.005MB", 1_005_000),
    ],
)
def test_parse_bytes(text: int | str, size: int) -> None:
    parsed = parse_bytes(text)
    assert parsed == size
    assert type(parsed) is int


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "8gib", "8 G", "8iB", "1e9", "1,5GB", "1.GB", "eight", "8GiBs", True, None, [8]],
)
def test_parse_bytes_refuses_what_is_no_size(text: Any) -> None:
    with pytest.raises(asteria.ConfigError) as raised:
        parse_bytes(text)
    assert "8GiB" in str(raised.value), "the message shows how a size is written"
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", [-1, "-1", "-5GiB"])
def test_parse_bytes_refuses_negative_sizes(text: int | str) -> None:
    with pytest.raises(asteria.ConfigError, match="number of bytes"):
        parse_bytes(text)
