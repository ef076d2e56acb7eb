"""A dict of tensors, some of which are elsewhere, is a dict to everybody who uses it as one."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from asteria.runtime.entries import Entries

PLAIN = {"near": torch.tensor([1.0]), "a": torch.tensor([2.0]), "b": torch.tensor([3.0])}


class Source:
    """A tensor that is elsewhere."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.reads = 0

    def __call__(self) -> Tensor:
        self.reads += 1
        return self.value.clone()


@pytest.fixture
def sources() -> dict[str, Source]:
    return {key: Source(PLAIN[key]) for key in ("a", "b")}


@pytest.fixture
def entries(sources: dict[str, Source]) -> Entries:
    made = Entries({"near": PLAIN["near"], "a": torch.zeros(7)})
    for key, source in sources.items():
        made.put_away(key, source)
    return made


def flat(values: object) -> dict[str, float]:
    assert isinstance(values, dict)
    return {key: float(value) for key, value in values.items()}


WAYS: dict[str, Callable[[Entries], object]] = {
    "dict": dict,
    "unpacked": lambda e: {**e},
    "copy method": lambda e: e.copy(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda e: pickle.loads(pickle.dumps(e)),
    "keys": lambda e: {key: e[key] for key in e.keys()},
    "items": lambda e: dict(e.items()),
    "zip": lambda e: dict(zip(e, e.values(), strict=True)),
    "get": lambda e: {key: e.get(key) for key in e},
    "same type": lambda e: type(e)(dict(e.items())),
    "update": lambda e: _updated({}, e),
    "constructor": lambda e: Entries(e),
    "keywords": lambda e: dict(**e),
    "or": lambda e: e | {},
    "ror": lambda e: {} | e,
}


def _updated(target: dict[str, Tensor], e: Entries) -> dict[str, Tensor]:
    target.update(e)
    return target


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_look_through_it_gives_all_tensors(entries: Entries, way: str) -> None:
    assert flat(WAYS[way](entries)) == {"near": 1.0, "a": 2.0, "b": 3.0}


@pytest.mark.parametrize("way", ["dict", "copy method", "copy", "deepcopy", "pickle"])
def test_a_copy_is_a_plain_dict(entries: Entries, way: str) -> None:
    assert type(WAYS[way](entries)) is dict


def test_what_is_near_is_the_tensor_itself_and_what_is_away_a_new_one(entries: Entries) -> None:
    assert entries["near"] is PLAIN["near"]
    assert entries["a"] is not entries["a"]


def test_nothing_is_read_before_it_is_asked_for(
    entries: Entries, sources: dict[str, Source]
) -> None:
    assert len(entries) == 3
    assert list(entries) == ["near", "a", "b"]
    assert "a" in entries
    assert "c" not in entries
    assert bool(entries)
    assert entries.is_away("a")
    assert not entries.is_away("near")
    assert not any(source.reads for source in sources.values())
    assert float(entries["a"]) == 2.0
    assert [source.reads for source in sources.values()] == [1, 0]


def test_missing_keys_are_missing(entries: Entries) -> None:
    with pytest.raises(KeyError):
        entries["c"]
    with pytest.raises(KeyError):
        del entries["c"]
    with pytest.raises(KeyError):
        entries.pop("c")
    assert entries.get("c") is None
    assert entries.pop("c", 5) == 5


def test_what_is_put_there_takes_the_place_of_what_is_away(entries: Entries) -> None:
    mine = torch.tensor([9.0])
    entries["a"] = mine
    assert entries["a"] is mine
    assert not entries.is_away("a")
    assert len(entries) == 3


def test_entries_can_be_removed(entries: Entries) -> None:
    del entries["a"]
    assert float(entries.pop("b")) == 3.0
    assert list(entries) == ["near"]
    entries.put_away("a", Source(PLAIN["a"]))
    entries.clear()
    assert not entries
    assert list(entries.items()) == []


def test_views_follow_what_is_there(entries: Entries) -> None:
    keys, values = entries.items(), entries.values()
    assert (len(keys), len(values)) == (3, 3)
    del entries["a"]
    assert [key for key, _ in keys] == ["near", "b"]
    assert [float(value) for value in values] == [1.0, 3.0]


def test_it_equals_a_dict_of_the_same_tensors() -> None:
    entries = Entries(near=PLAIN["near"])
    entries.put_away("a", lambda: PLAIN["a"])
    assert entries == {"near": PLAIN["near"], "a": PLAIN["a"]}
    with pytest.raises(TypeError):
        hash(entries)


BROKEN: dict[str, Callable[[Entries], object]] = {
    "setdefault": lambda e: (e.setdefault("a", torch.zeros(1)), dict(e))[1],
    "update": lambda e: (e.update(near=PLAIN["near"], a=PLAIN["a"]), dict(e))[1],
    "reversed": lambda e: {key: e[key] for key in reversed(e)},
    "popitem": lambda e: dict([e.popitem() for _ in range(3)]),
}


@pytest.mark.parametrize("way", BROKEN)
def test_other_methods_of_a_dict_do_so_too(entries: Entries, way: str) -> None:
    assert flat(BROKEN[way](entries)) == {"near": 1.0, "a": 2.0, "b": 3.0}
    assert len(entries) in (0, 3)


def test_an_update_takes_the_place_of_what_is_away(entries: Entries) -> None:
    entries.update(a=torch.tensor([9.0]))
    assert float(entries["a"]) == 9.0


def test_it_differs_from_a_dict_of_other_tensors(entries: Entries) -> None:
    assert entries != {"near": PLAIN["near"]}
