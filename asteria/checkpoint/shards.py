"""Sharded parameters' state, for what has to see a tensor as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from asteria.distributed.sharded_layout import ShardLayout, is_sharded, local_part

__all__ = ["gathered"]

Entries = Mapping[str, Tensor]


def gathered(entries: Entries) -> tuple[Entries, Callable[[Entries], dict[str, Tensor]]]:
    """One parameter's state as plain tensors, and how to share tensors like these again.

    If it was stepped as a whole, DTensors become whole, on all ranks, which call this together. If
    shards are on their own, which their keys tell, so are the tensors; of what only has the sizes
    of a shard nothing is shared again but the counter of steps.
    """
    sharded = {key: value for key, value in entries.items() if is_sharded(value)}
    if not sharded:
        return entries, dict
    layouts = {key: ShardLayout.of(key, value) for key, value in sharded.items()}
    own = {key.partition("@")[0] for key in entries if "@" in key}
    if not own:
        plain = {
            key: value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
            for key, value in entries.items()
        }
    else:
        plain = {
            key.partition("@")[0]: local_part(value) if key in sharded else value
            for key, value in entries.items()
        }

    def share(found: Entries) -> dict[str, Tensor]:
        shared: dict[str, Tensor] = {}
        for key, value in found.items():
            layout = layouts.get(key)
            if layout is not None:
                part = value if own else value[layout.boxes[layout.here]].clone()
                shared[key] = layout.show(part, layout.shape)
            elif key not in own or key == "step":
                shared[key] = value
        return shared

    return plain, share
