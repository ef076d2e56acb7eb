"""A tensor whose values are elsewhere is a tensor to everybody, and in memory for few."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asteria.errors import StoreError, StoreFullError
from asteria.store.distant import Distant, Opened, Source, Values, plain

VALUE = torch.arange(6.0).view(2, 3)


class Place:
    """Where values are, which counts how often they are read."""

    def __init__(self, value: Tensor = VALUE, *, lasts: bool = True, room: int = 0) -> None:
        """``room`` is how many replacements it takes."""
        self.value = value
        self.lasts = lasts
        self.room = room
        self.reads = 0

    def read(self) -> Tensor:
        self.reads += 1
        return self.value.clone()

    def replaced(self, value: Tensor) -> Source | None:
        if self.room < 0:
            raise StoreFullError("no room")
        return Place(value.clone(), room=self.room - 1) if self.room else None


class Broken(Place):
    def read(self) -> Tensor:
        raise StoreError("the disk is gone")


def distant(place: Place) -> Distant:
    return Distant(Values(place, place.value.shape, place.value.dtype))


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda t: t.shape,
    "size": lambda t: t.size(0),
    "length": len,
    "dtype": lambda t: t.dtype,
    "device": lambda t: (t.device, t.is_cpu, t.is_cuda),
    "numbers": lambda t: (t.numel(), t.nbytes, t.element_size(), t.itemsize, t.dim()),
    "strides": lambda t: (t.stride(), t.is_contiguous()),
    "floating": lambda t: (t.is_floating_point(), t.is_complex(), t.layout),
    "storage": lambda t: (t.untyped_storage().size(), t.untyped_storage().nbytes()),
    "autograd": lambda t: (t.requires_grad, t.grad, t.is_leaf),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_it_is_like_is_told_without_reading(look: str) -> None:
    place = Place()
    assert LOOKS[look](distant(place)) == LOOKS[look](VALUE)
    assert place.reads == 0


def test_writers_of_older_torch_ask_for_elements() -> None:
    place = Place()
    assert distant(place).storage().size() == VALUE.numel()
    assert place.reads == 0


def test_whoever_has_it_detached_and_on_the_host_has_not_read_it() -> None:
    place = Place()
    aliases = [distant(place).detach(), distant(place).cpu(), distant(place).to("cpu")]
    assert all(isinstance(alias, Distant) for alias in aliases)
    assert place.reads == 0
    assert all(torch.equal(alias, VALUE) for alias in aliases)


TAKES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda t: t + 1,
    "clone": lambda t: t.clone(),
    "cast": lambda t: t.to(torch.float64),
    "sum": lambda t: t.sum(),
    "cat": lambda t: torch.cat([t, VALUE]),
    "stack": lambda t: torch.stack((t, t)),
    "foreach": lambda t: torch._foreach_add([t], 1)[0],
    "target": lambda t: torch.zeros(2, 3).copy_(t),
    "like": lambda t: torch.zeros_like(t),
    "list": lambda t: torch.tensor(t.tolist()),
}


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_who_computes_with_it_gets_plain_tensors_and_it_stays_away(take: str, mode: Any) -> None:
    place = Place()
    tensor = distant(place)
    with mode():
        found = TAKES[take](tensor)
        assert type(found) is Tensor
        assert torch.equal(found, TAKES[take](VALUE))
    assert place.reads > 0
    # There a cast is the operation that may return what it was given.
    assert tensor.is_held == (take == "cast" and mode is torch.inference_mode)


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "index": lambda t: t[0],
    "view": lambda t: t.view(3, 2),
    "narrow": lambda t: t.narrow(1, 0, 2),
    "reshape": lambda t: t.reshape(-1),
    "split": lambda t: t.split(1)[1],
    "numpy": lambda t: torch.from_numpy(t.numpy()),
    "array": lambda t: torch.from_numpy(np.asarray(t)),
    "storage": lambda t: torch.tensor(t.untyped_storage().tolist()),
    "add": lambda t: t.add_(1),
    "zero": lambda t: t.zero_(),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_who_takes_a_part_or_writes_has_it_in_memory(hold: str) -> None:
    place, wanted = Place(), VALUE.clone()
    tensor = distant(place)
    found, expected = HOLDS[hold](tensor), HOLDS[hold](wanted)
    assert torch.equal(found, expected)
    assert torch.equal(tensor, wanted)
    assert tensor.is_held
    assert place.reads == 1


def test_a_part_is_a_view_and_an_alias_is_the_same() -> None:
    tensor = distant(Place())
    alias = tensor.detach()
    tensor[0].zero_()
    alias[1, 2] = 9.0
    wanted = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 9.0]])
    assert torch.equal(tensor, wanted)
    assert torch.equal(alias, wanted)
    assert tensor.data_ptr() == alias.data_ptr() == tensor[0].data_ptr()


def test_memory_is_row_major_as_its_strides_say() -> None:
    place = Place(torch.arange(6.0).view(3, 2).mT)
    tensor = distant(place)
    storage = tensor._typed_storage()
    memory = torch.empty(0).set_(storage._untyped_storage, 0, tensor.size(), tensor.stride())
    assert torch.equal(memory, place.value)


def test_what_is_overwritten_at_once_goes_where_it_was() -> None:
    place = Place(room=1)
    tensor = distant(place)
    tensor.detach().copy_(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert place.reads == 0
    assert not tensor.is_held
    wanted = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    assert torch.equal(tensor, wanted)
    tensor.copy_(VALUE)
    assert tensor.is_held, "there is no more room"
    tensor.copy_(tensor + 1)
    assert torch.equal(tensor, VALUE + 1)


def test_without_room_it_takes_memory() -> None:
    place = Place(room=-1)
    tensor = distant(place)
    tensor.copy_(VALUE + 1)
    assert tensor.is_held
    assert torch.equal(tensor, VALUE + 1)
    assert place.reads == 0


SAVES: dict[str, Callable[[object, io.BytesIO], None]] = {
    "torch.save": torch.save,
    "pickle": lambda value, file: pickle.dump(value, file),
}


@pytest.mark.parametrize("way", SAVES)
def test_it_is_saved_as_a_plain_tensor(way: str) -> None:
    tensor, file = distant(Place()), io.BytesIO()
    SAVES[way]({"a": tensor}, file)
    file.seek(0)
    load = pickle.load if way == "pickle" else lambda f: torch.load(f, weights_only=True)
    found = load(file)["a"]
    assert type(found) is Tensor
    assert torch.equal(found, VALUE)
    assert not tensor.is_held


def test_it_is_saved_from_host_memory() -> None:
    """On a device, which the meta device stands for here, all of them may have no room at once."""
    tensor = Distant(Values(Place(), VALUE.shape, VALUE.dtype, torch.device("meta")))
    found = pickle.loads(pickle.dumps(tensor))
    assert found.device.type == "cpu"
    assert torch.equal(found, VALUE)


def test_a_copy_is_apart_and_reads_for_itself() -> None:
    place = Place()
    tensor = distant(place)
    twin = copy.deepcopy(tensor)
    assert isinstance(twin, Distant)
    assert place.reads == 0
    twin.zero_()
    assert torch.equal(tensor, VALUE)
    assert not twin.any()
    third = copy.deepcopy(twin)
    third.add_(1)
    assert not twin.any()


def test_a_copy_of_what_does_not_last_is_made_at_once() -> None:
    place = Place(lasts=False)
    tensor = distant(place)
    twin = copy.deepcopy(tensor)
    place.value = VALUE + 1
    assert torch.equal(twin, VALUE)
    assert torch.equal(tensor, VALUE + 1)


def test_copies_are_told_of_and_keep_what_the_original_keeps() -> None:
    told: list[Values] = []
    ties: dict[str, Any] = {"tell": told.append, "keeps": object()}
    tensor = Distant(Values(Place(), (2, 3), torch.float32, **ties))
    twin = copy.deepcopy(tensor)
    assert told == [tensor._origin, twin._origin]
    assert twin._origin._keeps is tensor._origin._keeps


@pytest.mark.parametrize("use", ["add", "index", "saved", "numpy"])
def test_what_cannot_be_read_is_an_error(use: str) -> None:
    tensor = distant(Broken())
    ways: dict[str, Callable[[], object]] = {
        "add": lambda: tensor + 1,
        "index": lambda: tensor[0],
        "saved": lambda: torch.save(tensor, io.BytesIO()),
        "numpy": lambda: tensor.numpy(),
    }
    with pytest.raises(StoreError, match="gone"):
        ways[use]()


def test_it_looks_like_its_values() -> None:
    assert repr(distant(Place())) == repr(VALUE)


def test_what_is_plain_stays_what_it_is() -> None:
    assert plain(VALUE) is VALUE
    assert type(plain(distant(Place()))) is Tensor


def test_tensors_by_name_are_read_once() -> None:
    place = Place()
    opened = Opened({"a": distant(place), "b": VALUE})
    assert "a" in opened
    assert "c" not in opened
    assert place.reads == 0
    assert opened["a"] is opened["a"]
    assert opened["b"] is VALUE
    assert place.reads == 1
