"""What the configuration says of stored state: its rule, and eigenbases in fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockState
from asteria.algorithms.soap import SOAP
from asteria.config.runtime import RuntimeConfig
from asteria.errors import ConfigError
from asteria.linalg.scratch import Scratch

__all__ = ["as_stored", "rule_for", "widened"]


def rule_for(rule: Algorithm, config: RuntimeConfig) -> Algorithm:
    """The rule, with its state stored as ``config`` wants it.

    Raises ConfigError if it cannot be.
    """
    if config.factors == "rotated" and not isinstance(rule, SOAP):
        raise ConfigError(
            f'RuntimeConfig.factors="rotated" was asked for with {rule.name}, whose factors '
            'take in more than projected gradients; use factors="full", or SOAP'
        )
    narrow = None if config.state_dtype == torch.float32 else config.state_dtype
    asked = narrow, config.factors
    return rule if asked == (rule.bases_in, rule.factors) else rule.storing(*asked)


def widened(state: BlockState, dtype: torch.dtype, scratch: Scratch | None = None) -> BlockState:
    """The fields, all in ``dtype``: copies of bases that are stored in less.

    The copies, in ``scratch`` if there is one, are to be read only. For the training thread.
    """
    narrow = {name: t for name, t in state.items() if t.dtype != dtype}
    if not narrow:
        return state
    copies = {}
    for name, basis in narrow.items():
        if scratch is None:
            copies[name] = basis.to(dtype)
        else:
            rows = scratch.take(name, tuple(basis.mT.shape), dtype, basis.device)
            copies[name] = rows.copy_(basis.mT).mT  # column after column, as bases lie
    return {**state, **copies}


def as_stored(fresh: list[Tensor | None], state: BlockState) -> list[Tensor | None]:
    """New bases of each mode as ``state`` is going to store them; moments go with these."""
    return [
        None if basis is None else basis.to(state[f"basis_{mode}"].dtype).to(basis.dtype)
        for mode, basis in enumerate(fresh)
    ]
