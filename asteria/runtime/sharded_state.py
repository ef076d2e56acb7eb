"""The state of sharded parameters as state dicts have it, and back.

Exact: every tensor but the counters is a DTensor on the parameter's mesh: moments share its
placements, all others are cut by rows. So keys and shapes are those of the unsharded parameter, and
whatever torch can do with sharded tensors (save, load at another world size, gather) it can do with
them. The owner's state is sent out for it when somebody reads it, which all ranks do together.

Local: a shard's moments are its part of a DTensor like the parameter. What has the sizes of a shard
cannot be cut anew; it is a plain tensor whose key names the shard: ``factor_0@1of4``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from asteria.distributed.sharded_exchange import Kind, Parcel, Transit
from asteria.distributed.sharded_group import group_of
from asteria.distributed.sharded_layout import is_sharded
from asteria.runtime.entries import Entries
from asteria.runtime.records import ParameterRecord, Route, state_dtype
from asteria.runtime.shadows import shadow_shapes

__all__ = ["alike", "handed_over", "saved_whole", "show_shards", "stepped_state"]

_COUNTERS = ("step", "born")
"""What every rank knows by itself."""
_TABLES = ("version",)
"""Small tensors of the owner's that every rank shows as they are."""
_COUNTS = ("step", "born", "version", "lands")
"""How the keys of counters end, which are float32."""
_MOST_DIMS = 8


def show_shards(record: ParameterRecord) -> None:
    """Let ``record.facade`` show the state of a sharded parameter, whoever has it.

    What is in flight only its owner, or the rank with the shard, shows: it has no fixed shape.
    """
    sharding = record.as_sharded
    facade = record.facade if record.facade is not None else Entries()
    record.facade = facade
    facade.clear()
    for key in record.route.entry_shapes(record.shape):
        if sharding.exact:
            facade.put_away(key, _whole_reader(record, key))
        else:
            facade.put_away(_local_key(record, key), _local_reader(record, key))
    for key in record.in_flight if sharding.is_here else ():
        name = key if sharding.exact else _local_key(record, key)
        record.entries.lend(key, facade, name)


def _whole_reader(record: ParameterRecord, key: str) -> Callable[[], Tensor]:
    whose = weakref.ref(record)

    def read() -> Tensor:
        record = whose()
        if record is None:
            raise RuntimeError(f"{key} was asked for, and its optimizer is gone")
        return _spread(record, key)

    return read


def _spread(record: ParameterRecord, key: str) -> Tensor:
    """One tensor of the owner's state to all ranks, which call this together."""
    if key in _COUNTERS:
        return record.entries[key]
    sharding = record.as_sharded
    layout, owner = sharding.layout, sharding.owner
    whole = record.entries[key] if sharding.is_here else None
    shape = record.route.entry_shapes(record.shape)[key]
    together = not shape or key in _TABLES
    everything = tuple(slice(0, size) for size in shape)
    boxes = (everything,) * len(layout.ranks) if together else layout.boxes_of(shape)
    kind = _dtype(key, record), record.device
    parcels = [
        Parcel(
            owner,
            target,
            tuple(s.stop - s.start for s in boxes[target]),
            kind,
            None if whole is None else whole[boxes[target]].to(record.device),
        )
        for target in (range(len(layout.ranks)) if sharding.is_here else [layout.here])
    ]
    transit = _send(record, [kind], parcels, f"reading {key} of {record.name}")
    (part,) = transit.wait().values()
    return part if together else layout.show(part, shape)


def _send(
    record: ParameterRecord, kinds: Sequence[Kind], parcels: Sequence[Parcel], what: str
) -> Transit:
    """Parts of one parameter's state, counted as such."""
    sharding = record.as_sharded
    group, traffic = group_of(sharding.layout.ranks), sharding.traffic
    tally = None if traffic is None else traffic.tally(group, "state")
    return group.exchange.send(kinds, parcels, what, tally)


def handed_over(record: ParameterRecord, owner: int) -> dict[str, Tensor]:
    """The state for a new ``owner``, what is in flight too; other ranks keep the counters.

    All ranks call this together, while the old owner still has it.
    """
    sharding = record.as_sharded
    layout, source = sharding.layout, sharding.owner
    entries, group = record.entries, group_of(layout.ranks)
    keys = [*record.route.entry_shapes(record.shape), *shadow_shapes(record.route, 1)]
    found = {key: entries[key] for key in keys if key in (*_COUNTERS, *_TABLES)}
    if owner == source:
        return {key: entries[key].clone() for key in keys} if sharding.is_here else found
    parcels: list[Parcel] = []
    names = [key for key in keys if key not in _COUNTERS]
    dtypes = [_dtype(key, record) for key in names]
    for key, dtype in zip(names, dtypes, strict=True):
        value = entries[key].to(record.device) if sharding.is_here else None
        # Only the owner knows how much is in flight.
        shape = tuple(group.tell(() if value is None else value.shape, source, most=_MOST_DIMS))
        parcels.append(Parcel(source, owner, shape, (dtype, record.device), value))
    taking_part = layout.here in (source, owner)
    kinds = [(dtype, record.device) for dtype in dtypes]
    what = f"handing over the state of {record.name}"
    transit = _send(record, kinds, parcels if taking_part else [], what)
    return found | {names[place]: part for place, part in transit.wait().items()}


def _dtype(key: str, record: ParameterRecord) -> torch.dtype:
    return torch.float32 if key.endswith(_COUNTS) else state_dtype(record.parameter)


def saved_whole(record: ParameterRecord, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved state of an exact parameter as its owner needs it; other ranks keep the counters.

    All ranks call this together.
    """
    sharding = record.as_sharded
    layout, owner = sharding.layout, sharding.owner
    found: dict[str, Tensor] = {}
    parcels: list[Parcel] = []
    senders: list[tuple[str, int]] = []
    kinds = []
    for key, value in saved.items():
        if not is_sharded(value):
            if sharding.is_here or key in (*_COUNTERS, *_TABLES):
                found[key] = value
            continue
        part, boxes = layout.part_of(value).to(record.device), layout.boxes_of(value.shape)
        kinds.append((part.dtype, part.device))
        if sharding.is_here:
            found[key] = torch.empty(value.shape, dtype=part.dtype, device=part.device)
        for source in range(len(layout.ranks)) if sharding.is_here else [layout.here]:
            if layout.replicas[source] == layout.replicas[owner]:
                size = tuple(s.stop - s.start for s in boxes[source])
                own = part if source == layout.here else None
                parcels.append(Parcel(source, owner, size, kinds[-1], own))
                senders.append((key, source))
    transit = _send(record, kinds, parcels, f"loading the state of {record.name}")
    for place, part in transit.wait().items():
        key, source = senders[place]
        found[key][layout.boxes_of(found[key].shape)[source]] = part
    return found


def alike(routes: Mapping[torch.Size, Route]) -> frozenset[str]:
    """Names of what means the same under all of these routes, by shard shape.

    The moments that look like the shard, and the number of their updates: the first gradient does
    not update them under every rule.
    """
    moments = [
        key
        for key in ("exp_avg", "exp_avg_sq")
        if all(way.entry_shapes(shape).get(key) == shape for shape, way in routes.items())
    ]
    rules = {way.rule.name for way in routes.values()}
    return frozenset(moments if len(rules) > 1 else [*moments, "step"])


def _local_key(record: ParameterRecord, key: str) -> str:
    """Under which a shard's own tensor is shown."""
    sharding = record.as_sharded
    if key in sharding.alike:
        return key
    layout = sharding.layout
    return f"{key}@{layout.part}of{layout.parts}"


def _local_reader(record: ParameterRecord, key: str) -> Callable[[], Tensor]:
    whose = weakref.ref(record)

    def read() -> Tensor:
        record = whose()
        if record is None:
            raise RuntimeError(f"{key} was asked for, and its optimizer is gone")
        value, sharding = record.entries[key], record.as_sharded
        layout = sharding.layout
        shown = key in sharding.alike and key != "step"
        return layout.show(value, layout.shape) if shown else value

    return read


def stepped_state(record: ParameterRecord, shown: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state as `show_shards` shows it, or a slim one, under the keys of what is stepped.

    Local moments lose their mesh; tensors of other shards are left out, and eigenvalues that a slim
    state has lost are zero, which the next gradient tells anew.
    """
    if record.sharding is None or record.sharding.exact:
        return shown
    layout = record.sharding.layout
    tag = f"@{layout.part}of{layout.parts}"
    found: dict[str, Tensor] = {}
    for key, value in shown.items():
        if "@" not in key:
            found[key] = layout.part_of(value) if is_sharded(value) else value
        elif key.endswith(tag):
            found[key.removesuffix(tag)] = value
    if found and not any("@" in key for key in shown):
        for key, shape in record.route.slim_shapes(record.shape).items():
            if key not in found and key not in record.sharding.alike:
                found[key] = torch.zeros(shape, dtype=state_dtype(record.parameter))
    return found
