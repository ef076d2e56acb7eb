"""What is known of a machine: checked, kept in a file, found again."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asteria
from asteria.planner.machine import (
    Machine,
    default_path,
    find_machine,
    load_machine,
    local_machine,
    save_machine,
)
from asteria.store.pressure import host_free_bytes

MACHINE = Machine(
    device_bytes=2**34,
    host_bytes=2**35,
    nvme_bytes=2**40,
    cores=12,
    training_threads=3,
    disk_read_bytes_per_s=1e9,
    refresh_s=((64, 0.001), (128, 0.004)),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device_bytes", -1),
        ("host_bytes", 1.5),
        ("cores", 0),
        ("cores", True),
        ("training_threads", -1),
        ("math_threads", None),
        ("link_bytes_per_s", 0),
        ("disk_read_bytes_per_s", float("inf")),
        ("disk_write_bytes_per_s", "fast"),
        ("refresh_s", ()),
        ("refresh_s", ((256, 0.1), (128, 0.2))),
        ("exact_s", ((256, 0.0),)),
        ("exact_s", ((256, 0.1, 3),)),
        ("exact_s", [(256, 0.1)]),
        ("source", 3),
    ],
)
def test_a_field_that_is_none_is_refused(field: str, value: Any) -> None:
    with pytest.raises(asteria.ConfigError, match=rf"Machine\.{field} must be .*, found"):
        Machine(**{field: value})


def test_this_machine() -> None:
    here = local_machine()
    assert here.shares_memory is (here.device_bytes is None)
    assert here.host_bytes is not None
    assert 0 < here.host_bytes <= host_free_bytes() * 1.2
    assert here.cores >= 1
    if not torch.cuda.is_available():
        assert here.training_threads == torch.get_num_threads()
    assert here.nvme_bytes is None


def test_space_on_the_disk_is_that_of_the_folder(tmp_path: Path) -> None:
    assert local_machine(tmp_path).nvme_bytes
    assert local_machine(tmp_path / "nowhere").nvme_bytes is None


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "new" / "machine.json"
    save_machine(MACHINE, path)
    assert load_machine(path) == dataclasses.replace(MACHINE, source=f"measured, {path}")
    assert [p.name for p in path.parent.iterdir()] == ["machine.json"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(asteria.ConfigError, match="give another file"):
        save_machine(MACHINE, tmp_path / "file" / "machine.json")


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "no object": lambda content: [content],
    "another format": lambda content: content | {"format": 99},
    "an unknown field": lambda content: content | {"colour": "red"},
    "a wrong value": lambda content: content | {"cores": -1},
    "a wrong timing": lambda content: content | {"refresh_s": [3]},
}


@pytest.mark.parametrize("kind", [*WRONG, "no JSON", "no file"])
def test_a_file_of_something_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    if kind != "no file":
        save_machine(MACHINE, path)
        content = json.loads(path.read_text())
        text = "{" if kind == "no JSON" else json.dumps(WRONG[kind](content))
        path.write_text(text)
    with pytest.raises(asteria.ConfigError, match="asteria probe") as raised:
        asteria.plan([(4, 3)], machine=path)
    assert str(path) in str(raised.value)


def test_the_default_place_follows_the_environment(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_path() == cache / "asteria" / "machine.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path() == Path.home() / ".cache" / "asteria" / "machine.json"


def test_rates_that_were_probed_are_used_and_memory_is_that_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not measured" in str(asteria.plan([(4, 3)]))
    save_machine(MACHINE, default_path())
    monkeypatch.setattr("asteria.planner.machine.host_free_bytes", lambda: 5 * 2**40)
    monkeypatch.setattr("asteria.planner.machine.reserve_bytes", lambda *_: 2**40)
    found = find_machine(None, tmp_path / "nowhere")
    assert found.host_bytes == 4 * 2**40
    assert found.nvme_bytes is None
    assert found.refresh_s == MACHINE.refresh_s
    assert found.cores == MACHINE.cores
    assert found.device_bytes == local_machine().device_bytes
    assert str(default_path()) in str(asteria.plan([(4, 3)]))


def test_a_machine_or_its_file_is_taken_as_it_is(tmp_path: Path) -> None:
    save_machine(MACHINE, tmp_path / "other.json")
    found = find_machine(str(tmp_path / "other.json"))
    assert dataclasses.replace(found, source=MACHINE.source) == MACHINE
    assert find_machine(MACHINE) is MACHINE
