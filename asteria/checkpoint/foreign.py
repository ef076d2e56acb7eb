"""State dicts of other optimizers, as ours: torch's Adam family's, and the published SOAP's.

The published SOAP (nikhilvyas/SOAP) keeps both moments in the eigenbases and shaped like the
parameter, ``GG`` and ``Q`` as lists by dim, where a dim above the limit has an empty list.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.checkpoint.manifest import KEY
from asteria.errors import CheckpointError
from asteria.runtime.records import Route

__all__ = ["Origin", "adopted_groups", "adopted_state", "origin_of", "origin_problems"]


class Origin(enum.Enum):
    """Whose a state dict is."""

    OURS = "asteria"
    ADAM = "torch's Adam or AdamW"
    SOAP = "the published SOAP"


_ADAMS_OWN = frozenset(
    {
        "amsgrad",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "decoupled_weight_decay",
    }
)
"""Options that torch's Adam has and we have not: they do not change what a step means here."""


def origin_of(groups: Iterable[Mapping[str, Any]]) -> Origin:
    """Whose state dict has these parameter groups."""
    groups = list(groups)
    if any(KEY in group for group in groups):
        return Origin.OURS
    if any("amsgrad" in group for group in groups):
        return Origin.ADAM
    # It has no option that decides on what is above the limit, ours always have.
    if any("shampoo_beta" in g and not {"large_dims", "data_format"} & g.keys() for g in groups):
        return Origin.SOAP
    return Origin.OURS


def origin_problems(origin: Origin, rule: Algorithm) -> list[str]:
    """Why an optimizer with this rule cannot go on from there."""
    if origin is Origin.SOAP and rule.name != "soap":
        return [f"this is the state of {origin.value}, this optimizer is {rule.name}"]
    return []


def adopted_groups(
    origin: Origin, groups: Iterable[Mapping[str, Any]], own: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups with the options that the foreign ones have, and our ``own`` for the others.

    Both are in the same order, and of the same number.
    """
    adopted = []
    for group, mine in zip(groups, own, strict=True):
        options = {key: value for key, value in group.items() if key not in _ADAMS_OWN}
        beta = options.get("shampoo_beta")
        if origin is Origin.SOAP and isinstance(beta, int | float) and beta < 0:
            options["shampoo_beta"] = None
        adopted.append({**mine, **options})
    return adopted


def adopted_state(
    origin: Origin, entries: Mapping[str, Any], route: Route, shape: torch.Size
) -> dict[str, Any]:
    """One parameter's foreign state as ours, for a parameter of this ``route`` and ``shape``.

    Of Adam's state the moments: the next gradient makes bases, and the moments are carried over.
    (What ``amsgrad`` keeps is left out.) The published SOAP's as it is, factors and bases too.
    Raises CheckpointError that says what does not fit.
    """
    if origin is Origin.OURS:
        return dict(entries)
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entries]
    if origin is Origin.SOAP:
        missing += [key for key in ("GG", "Q", "precondition_frequency") if key not in entries]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} missing in the state of {origin.value}")
    wanted = route.slim_shapes(shape)
    # Zeros for eigenvalues, which the next gradient then tells.
    found: dict[str, Any] = {key: torch.zeros(wanted[key]) for key in wanted}
    found["step"] = entries["step"]
    for name in ("exp_avg", "exp_avg_sq"):
        blocks = _in_blocks(name, entries[name], route, shape)
        found |= {
            key: moment.reshape(wanted[key]) for key, moment in blocks.items() if key in wanted
        }
    if origin is Origin.ADAM:
        return found
    return found | _published_bases(found, entries, route)


def _in_blocks(name: str, moment: object, route: Route, shape: torch.Size) -> dict[str, Tensor]:
    """A moment shaped like its parameter as (blocks, *dims) under each of our keys."""
    if not isinstance(moment, Tensor) or moment.shape != shape:
        given = tuple(moment.shape) if isinstance(moment, Tensor) else type(moment).__name__
        raise CheckpointError(f"{name} is {given}, needs a tensor of shape {tuple(shape)}")
    found = {}
    for suffix, block, _ in route.extents():
        tiles = [tile for tile in route.tiles if tile.shape == block]
        parts = [tile.region(moment).reshape(tile.blocks, *block.dims) for tile in tiles]
        found[name + suffix] = torch.cat(parts)
    return found


def _published_bases(
    moments: dict[str, Any], entries: Mapping[str, Any], route: Route
) -> dict[str, Any]:
    """Factors, bases and counters, and the first moment where a basis of one column is -1."""
    pairs = _pairs(entries)
    if not route.rule.has_bases:
        if any(len(factor) for factor, _ in pairs):
            raise CheckpointError("found a factor (GG), this parameter takes the AdamW rule here")
        return {}
    if len(route.tiles) > 1 or route.tiles[0].blocks > 1:
        raise CheckpointError(
            f"is one block in the state of {Origin.SOAP.value}, here it is "
            f"{sum(tile.blocks for tile in route.tiles)}: give its group batch_dims=0 and "
            'large_dims="one_sided"'
        )
    found: dict[str, Any] = {}
    for sign in (basis for _, basis in pairs if len(basis) == 1):
        # Such a dim has no factor here; its basis, which may be -1, is a sign.
        found["exp_avg"] = found.get("exp_avg", moments["exp_avg"]) * sign.item()
    kept = [pair for pair in pairs if len(pair[0]) != 1]
    block = route.tiles[0].shape
    if [bool(len(factor)) for factor, _ in kept] != list(block.factored):
        raise CheckpointError(
            f"has factors (GG) of sizes {[len(factor) for factor, _ in pairs]}, needs "
            f"{block.factor_sizes()} for dims {block.dims}: max_precond_dim, merge_dims, "
            "precondition_1d and data_format must be those of the saved run"
        )
    for mode, (factor, basis) in enumerate(kept):
        if len(factor):
            found |= {f"factor_{mode}": factor, f"basis_{mode}": basis}
    step, period = entries["step"], entries["precondition_frequency"]
    if not isinstance(step, int) or not isinstance(period, int) or period < 1:
        raise CheckpointError(
            f"step is {step!r:.60} and precondition_frequency {period!r:.60}, needs counts of steps"
        )
    version = torch.full((1,), float(step - step % period), dtype=torch.float32, device="cpu")
    return found | {"born": torch.zeros_like(version[0]), "version": version}


def _pairs(entries: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(factor, basis) of every dim, both empty where there is none."""
    factors, bases = entries["GG"], entries["Q"]
    if isinstance(factors, list) and isinstance(bases, list) and len(factors) == len(bases):
        pairs = list(zip(factors, bases, strict=True))
        if all(_is_pair(*pair) for pair in pairs):
            return pairs
    raise CheckpointError("GG and Q are not lists of equally many square matrices or empty lists")


def _is_pair(factor: object, basis: object) -> bool:
    if isinstance(factor, Tensor) and isinstance(basis, Tensor):
        return factor.dim() == 2 and factor.shape == basis.shape
    return factor == [] and basis == []
