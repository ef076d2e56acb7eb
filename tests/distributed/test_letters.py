"""A letter arrives as it was written."""

import math

import pytest
import torch
from torch import Tensor

from asteria.distributed.letters import Letter, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_letter_comes_back(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 4, 5, dtype=dtype)
    columns = torch.randn(2, 5, 5, dtype=dtype).mT
    nothing = torch.zeros(0, 4, dtype=dtype)
    note = {"subject": "Größe", "turned": math.pi, "kept": [["no basis", 3]], "none": None}
    found = unpack(pack(Letter("basis", 2**40, 7, note, [rows, None, columns, nothing])))
    assert (found.kind, found.serial, found.author, found.note) == ("basis", 2**40, 7, note)
    first, none, third, last = found.tensors
    assert none is None
    assert last is not None
    assert last.shape == (0, 4)
    for sent, got in ((rows, first), (columns, third)):
        assert got is not None
        assert torch.equal(got, sent)
        assert got.stride() == sent.stride(), "a basis stays column after column"
        assert got.dtype == dtype
    assert found.tensor_bytes == (60 + 50) * dtype.itemsize


def test_tensors_begin_at_cache_lines() -> None:
    letter = Letter("basis", 1, 0, {}, [torch.ones(3), torch.ones(5)])
    buffer = pack(letter)
    places = [t.data_ptr() - buffer.data_ptr() for t in unpack(buffer).tensors if t is not None]
    assert all(place % 64 == 0 for place in places)
    assert len(buffer) % 64 == 0


def test_what_is_sent_may_be_changed_afterwards() -> None:
    tensor = torch.ones(4)
    buffer = pack(Letter("basis", 1, 0, {}, [tensor]))
    tensor.zero_()
    (got,) = unpack(buffer).tensors
    assert isinstance(got, Tensor)
    assert torch.equal(got, torch.ones(4))


def test_a_note_alone() -> None:
    letter = Letter("vote", 3, 1, {"bits": "0x5"})
    assert unpack(pack(letter)) == Letter("vote", 3, 1, {"bits": "0x5"}, [])
