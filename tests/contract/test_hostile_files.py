"""Files that were cut, changed or made to do harm: an error and nothing loaded, or all of it."""

import io
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from asteria import CheckpointError
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import over_optimizers
from tests.support.asynchronous import GROWN, build
from tests.support.training import assert_same_bits, everything, train


def written(optimizer: SecondOrderOptimizer) -> bytes:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def grown(name: str) -> tuple[SecondOrderOptimizer, bytes]:
    """An optimizer, and a file of another one's state with refreshes in flight."""
    source, target = build(name), build(name)
    train(source, range(GROWN + 4))
    train(target, range(3))
    return target, written(source)


def loads(optimizer: SecondOrderOptimizer, content: bytes) -> bool:
    """Whether a file is taken; what cannot be read is torch's to tell, all else is ours."""
    try:
        saved = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return False
    try:
        optimizer.load_state_dict(saved)
    except CheckpointError:
        return False
    return True


def described(optimizer: SecondOrderOptimizer) -> Any:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return everything(optimizer), groups


def assert_as_before(optimizer: SecondOrderOptimizer, before: Any) -> None:
    now = described(optimizer)
    assert_same_bits(now[0], before[0])
    assert now[1] == before[1]


@over_optimizers
def test_a_file_that_was_cut(name: str) -> None:
    optimizer, content = grown(name)
    before = described(optimizer)
    for kept in (0, 1, 100, len(content) // 2, len(content) - 1000, len(content) - 1):
        assert not loads(optimizer, content[:kept])
        assert_as_before(optimizer, before)
    assert loads(optimizer, content)


@over_optimizers
def test_a_bit_that_was_flipped(name: str) -> None:
    """Most in the part that says what is where. torch checks no sums, so a number may change."""
    optimizer, content = grown(name)
    before = described(optimizer)
    pristine = optimizer.state_dict()
    pristine["state"] = {
        key: {n: t.clone() for n, t in e.items()} for key, e in pristine["state"].items()
    }
    start = content.index(b"data.pkl")
    size = zipfile.ZipFile(io.BytesIO(content)).getinfo("archive/data.pkl").file_size
    chance = random.Random(name)
    places = [start + chance.randrange(size + 100) for _ in range(300)]
    places += [chance.randrange(len(content)) for _ in range(60)]
    refused = 0
    for place in places:
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << chance.randrange(8)
        if loads(optimizer, bytes(spoilt)):
            assert len(optimizer.state) > 0
            optimizer.load_state_dict(pristine)
        else:
            refused += 1
        assert_as_before(optimizer, before)
    assert refused > 100


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("where", ["top", "group", "state"])
@over_optimizers
def test_a_pickle_that_would_act(name: str, where: str, tmp_path: Path) -> None:
    optimizer = build(name)
    train(optimizer, range(3))
    before = described(optimizer)
    saved, folder = optimizer.state_dict(), tmp_path / "harm"
    places = {"top": saved, "group": saved["param_groups"][0], "state": saved["state"][0]}
    places[where]["exp_avg"] = Harmful(folder)
    file = io.BytesIO()
    torch.save(saved, file)
    assert not loads(optimizer, file.getvalue())
    assert not folder.exists()
    assert_as_before(optimizer, before)
    file.seek(0)
    torch.load(file, weights_only=False)
    assert folder.exists(), "it would have"


STRANGE: list[Any] = [
    None,
    7,
    "state",
    [],
    {"state": [], "param_groups": []},
    {"state": {}, "param_groups": {}},
    {"state": {}, "param_groups": [7]},
    {"state": {}, "param_groups": [{"lr": 0.1}]},
    {"state": {}, "param_groups": [{"params": 7}]},
    {"state": {}, "param_groups": [{"params": [0, [], 2, 3]}]},
    {"state": {0: 7}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    {"state": {0: [7]}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    {"state": {0: {7: 8}}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    {"state": {(): {"step": 8}}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    {"state": {}, "param_groups": [{"params": [0, 0, 2, 3]}]},
    {"state": {}, "param_groups": [{7: 8, "params": [0, 1, 2, 3]}]},
    {"state": {0: {"step": 1.0}}, "param_groups": [{"params": [0, 1, 2, 3], "amsgrad": 1}]},
]


@pytest.mark.parametrize("saved", STRANGE, ids=repr)
@over_optimizers
def test_what_has_another_form(name: str, saved: Any) -> None:
    optimizer = build(name)
    train(optimizer, range(3))
    before = described(optimizer)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        optimizer.load_state_dict(saved)
    assert_as_before(optimizer, before)
