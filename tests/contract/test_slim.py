"""Checkpoints without bases and factors: small, loadable anywhere, and near the run they left."""

import copy
import io
from typing import Any

import pytest
import torch

import asteria
from asteria import CheckpointError, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, Arm, over_all_arms, over_optimizers
from tests.support.training import (
    MIXED,
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    train,
    weights,
)

STEPS = 7
GROUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one side": {"max_precond_dim": 5},
    "tiles": {"max_precond_dim": 4, "large_dims": "blocks"},
    "merged": {"merge_dims": True, "max_precond_dim": 12},
    "channels last": {"merge_dims": True, "data_format": "channels_last", "max_precond_dim": 8},
    "stacks": {"batch_dims": 1},
}
SHAPES = [(6, 4), (3, 2, 4), (2, 3, 2, 4), (7, 2, 9)]
LEFT_OUT = ("basis", "factor", "shadow", "version", "born")


@over_all_arms
def test_what_is_left_out(arm: Arm) -> None:
    optimizer = arm(parameters(MIXED))
    train(optimizer, range(STEPS))
    whole = optimizer.state_dict()
    before = copy.deepcopy(whole)
    slim = asteria.slim(whole)
    for index, entries in whole["state"].items():
        kept = {key for key in entries if not key.startswith(LEFT_OUT)}
        assert slim["state"][index].keys() == kept
        assert kept >= {"step", "exp_avg"}
        assert_same_bits(entries, before["state"][index])
        for key in kept - {"exp_avg"}:
            assert same_bits(slim["state"][index][key], entries[key])
    for mine, theirs in zip(slim["param_groups"], whole["param_groups"], strict=True):
        assert mine == {**theirs, "asteria": theirs["asteria"] + "/slim"}
    assert asteria.slim(slim)["param_groups"] == slim["param_groups"]
    assert asteria.slim(slim)["state"].keys() == slim["state"].keys()


@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
@over_optimizers
def test_the_first_moment_is_that_of_the_parameters_space(
    name: str, options: dict[str, Any]
) -> None:
    """With equal decays and constant gradients it is a multiple of the gradient in any space."""
    params = parameters(SHAPES, torch.float64)
    if "batch_dims" in options:
        params = params[1:]
    gradients = parameters([tuple(p.shape) for p in params], torch.float64, seed=3)
    known = OPTIMIZERS[name](params).defaults
    options = {key: value for key, value in options.items() if key in known}
    optimizer = OPTIMIZERS[name]([{"params": params, **options}], betas=(0.5, 0.5))
    for _ in range(4):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.detach().clone()
        optimizer.step()
    slim = asteria.slim(optimizer.state_dict())["state"]
    for index, (p, g) in enumerate(zip(params, gradients, strict=True)):
        record = optimizer._records[p]
        scale = 1 - 0.5**record.steps
        for suffix, block, blocks in record.route.extents():
            tiles = [tile for tile in record.route.tiles if tile.shape == block]
            wanted = torch.cat([t.region(g).reshape(t.blocks, *block.dims) for t in tiles])
            given = slim[index]["exp_avg" + suffix].reshape(blocks, *block.dims)
            torch.testing.assert_close(given, scale * wanted.detach(), rtol=1e-9, atol=1e-12)


@over_optimizers
def test_its_file_is_as_small_as_its_tensors(name: str) -> None:
    """Views of larger memory would take all of that with them."""
    optimizer = OPTIMIZERS[name](parameters([(32, 48)] * 2))
    train(optimizer, range(3))
    file = io.BytesIO()
    slim = asteria.slim(optimizer.state_dict())
    torch.save(slim, file)
    held = sum(t.nbytes for entries in slim["state"].values() for t in entries.values())
    assert file.tell() < held + 10_000


def resumed(
    arm: Arm, optimizer: SecondOrderOptimizer, saved: dict[str, Any]
) -> SecondOrderOptimizer:
    twin = arm(clones(p for g in optimizer.param_groups for p in g["params"]))
    twin.load_state_dict(saved)
    return twin


@over_all_arms
def test_the_first_gradient_makes_bases_and_the_update_is_counted(arm: Arm) -> None:
    optimizer = arm(parameters(MIXED))
    train(optimizer, range(STEPS))
    twin = resumed(arm, optimizer, asteria.slim(optimizer.state_dict()))
    before = weights(twin.param_groups[0]["params"])
    steps = [int(e["step"]) for e in twin.state.values()]
    train(twin, [STEPS])
    assert [int(e["step"]) for e in twin.state.values()] == [step + 1 for step in steps]
    for index, (step, entries) in enumerate(zip(steps, twin.state.values(), strict=True)):
        assert not same_bits(before[f"{index}"], twin.param_groups[0]["params"][index])
        if "born" in entries:
            assert int(entries["born"]) == step
            for key in entries:
                if key.startswith("basis"):
                    q = entries[key].double()
                    eye = torch.eye(q.shape[-1], dtype=torch.float64).expand_as(q)
                    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-4)
    train(twin, range(STEPS + 1, STEPS + 30))
    assert all(bool(value.isfinite().all()) for value in everything(twin).values())


@over_all_arms
def test_resuming_from_it_repeats_the_bits(arm: Arm) -> None:
    """Also if it is saved again, whole or slim, before the first gradient has come."""
    optimizer = arm(parameters(MIXED))
    train(optimizer, range(STEPS))
    slim = asteria.slim(optimizer.state_dict())
    once = resumed(arm, optimizer, slim)
    again = resumed(arm, optimizer, once.state_dict())
    third = resumed(arm, optimizer, asteria.slim(again.state_dict()))
    for twin in (once, again, third):
        train(twin, range(STEPS, STEPS + 12))
        assert_same_bits(everything(twin), everything(once))
    fourth = resumed(arm, once, copy.deepcopy(once.state_dict()))
    for twin in (once, fourth):
        train(twin, range(STEPS + 12, STEPS + 24))
    assert_same_bits(everything(fourth), everything(once))


@over_optimizers
def test_factors_are_young_again(name: str) -> None:
    """Their first steps refresh at once, however many steps the run has behind it."""
    optimizer = OPTIMIZERS[name](parameters(), shampoo_beta=0.9, precondition_frequency=50)
    train(optimizer, range(100))
    twin = OPTIMIZERS[name](clones(optimizer.param_groups[0]["params"]), shampoo_beta=0.9)
    twin.load_state_dict(asteria.slim(optimizer.state_dict()))
    versions = []
    for step in range(100, 110):
        train(twin, [step])
        state = twin.state[twin.param_groups[0]["params"][0]]
        versions.append(int(state["version"]) - int(state["born"]))
    assert versions == [0, 2, 3, 3, 5, 5, 5, 8, 8, 8]


@over_optimizers
def test_equal_blocks_whose_factors_differ_in_age_keep_their_own_schedule(name: str) -> None:
    options = {"shampoo_beta": 0.9, "precondition_frequency": 40}
    optimizer = OPTIMIZERS[name](parameters([(4, 4), (4, 4)]), **options)
    train(optimizer, range(90))
    saved = optimizer.state_dict()
    saved["state"][1] = asteria.slim(saved)["state"][1]
    twin = OPTIMIZERS[name](clones(optimizer.param_groups[0]["params"]), **options)
    twin.load_state_dict(saved)
    train(twin, range(90, 96))
    grown, young = (twin.state[p] for p in twin.param_groups[0]["params"])
    assert (int(grown["born"]), int(grown["version"])) == (0, 80)
    assert int(young["version"]) == int(young["born"]) + 5


def test_through_state_dicts_by_name() -> None:
    optimizer = asteria.SOAP(parameters())
    train(optimizer, range(STEPS))
    whole = optimizer.state_dict()
    names = ["a", "b", "c"]
    named = {
        "state": {names[index]: entries for index, entries in whole["state"].items()},
        "param_groups": [{**whole["param_groups"][0], "params": names}],
    }
    for index, name in enumerate(names):
        mine, theirs = asteria.slim(named)["state"][name], asteria.slim(whole)["state"][index]
        assert_same_bits(mine, theirs)


OTHERS_FLAT = {"state.a.step": torch.tensor(1.0), "param_groups.a.lr": 0.1}


@pytest.mark.parametrize(
    "given",
    [
        {},
        [],
        None,
        {"state.0.weight.step": 1.0},
        OTHERS_FLAT,
        torch.optim.AdamW(parameters()).state_dict(),
    ],
    ids=["empty", "list", "none", "flat", "flat of another", "adamw"],
)
def test_what_is_no_state_dict_of_ours_is_refused(given: Any) -> None:
    with pytest.raises(CheckpointError, match="state dict"):
        asteria.slim(given)


def flattened(state_dict: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """As torch.distributed.checkpoint does it."""
    flat = {
        f"state.{names[index]}.{key}": value
        for index, entries in state_dict["state"].items()
        for key, value in entries.items()
    }
    (group,) = state_dict["param_groups"]
    options = {key: value for key, value in group.items() if key != "params"}
    return flat | {f"param_groups.{n}.{key}": v for n in names for key, v in options.items()}


NAMES = ["layer.weight", "layer", "layer.weight.basis_0", "step", "a.0", "a.0.1"]
"""Names that are the beginning of others, or look like keys of a state."""


@pytest.mark.parametrize("options", [{}, GROUPS["tiles"]], ids=["plain", "tiles"])
@over_optimizers
def test_flattened_state_dicts_are_made_slim_like_others(
    name: str, options: dict[str, Any]
) -> None:
    optimizer = OPTIMIZERS[name](parameters([(7, 4), (5,), (4, 4), (), (6, 5), (4, 4)]), **options)
    train(optimizer, range(STEPS))
    whole = optimizer.state_dict()
    assert any("." in key for key in whole["state"][0]) == bool(options)
    flat = flattened(whole, NAMES)
    found, wanted = asteria.slim(flat), flattened(asteria.slim(whole), NAMES)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert same_bits(found[key], value) if torch.is_tensor(value) else found[key] == value
    assert flat.keys() == flattened(whole, NAMES).keys()


def test_what_a_loader_adds_to_it_is_not_taken() -> None:
    """torch's functions put what the loader has where the file has nothing."""
    optimizer, other = (asteria.SOAP(parameters()) for _ in range(2))
    train(optimizer, range(STEPS))
    train(other, range(3))
    slim = asteria.slim(optimizer.state_dict())
    own = other.state_dict()["state"]
    mixed = {**slim, "state": {key: own[key] | slim["state"][key] for key in own}}
    twins = [asteria.SOAP(clones(optimizer.param_groups[0]["params"])) for _ in range(2)]
    for twin, saved in zip(twins, (slim, mixed), strict=True):
        twin.load_state_dict(saved)
        assert twin.param_groups[0]["asteria"] == "soap/1"
        train(twin, range(STEPS, STEPS + 3))
    assert_same_bits(everything(twins[1]), everything(twins[0]))


def test_sync_and_async_take_it_alike() -> None:
    optimizer = asteria.SOAP(parameters())
    train(optimizer, range(STEPS))
    slim = asteria.slim(optimizer.state_dict())
    for runtime in (RuntimeConfig(refresh="sync"), RuntimeConfig.reference(), RuntimeConfig()):
        twin = asteria.SOAP(clones(optimizer.param_groups[0]["params"]), runtime=runtime)
        twin.load_state_dict(slim)
        train(twin, range(STEPS, STEPS + 5))
        assert all(bool(value.isfinite().all()) for value in everything(twin).values())
