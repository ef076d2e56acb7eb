"""Updates of chunks on the host that are written down once and done at every step.

The same operations on the same memory, but for the gradients and the learning rate: to find that
out anew takes Python as long as everything else that it does in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from asteria.config.hyperparameters import Hyperparameters
from asteria.linalg.deferred import Program
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.rows import parts_of
from asteria.runtime.weights import Descent, gradients_of

__all__ = ["Passage", "may_be_put_off"]


@dataclass(slots=True)
class Passage:
    """The update of a chunk, written down. For the training thread."""

    hyper: Hyperparameters
    memory: int
    """Which of its scratch's memory it works in."""
    descent: Descent
    gradients: list[Tensor]
    """Of its tiles, in this step; none between steps."""
    program: Program = field(default_factory=Program)

    def fits(self, chunk: Chunk, memory: int) -> bool:
        """Whether it is the chunk's, too, whose window is the one that it was written for."""
        return (
            self.hyper == chunk.hyper
            and self.memory == memory
            and all(map(Tensor.is_contiguous, self.descent.weights))
        )

    def renew(self, chunk: Chunk, update: Update) -> None:
        """Get ready for the step that the chunk is in."""
        self.gradients[:] = gradients_of(chunk)
        scale = chunk.extent.rule.scale(chunk.hyper, chunk.steps + 1)
        self.descent.rate, self.descent.decay = update.lr * scale, update.lr * update.weight_decay

    def end(self) -> None:
        """The step is over: gradients are their owner's."""
        self.gradients.clear()


def may_be_put_off(chunk: Chunk) -> bool:
    """Whether a step's update of the chunk, its state being at home, can be a passage."""
    extent, hyper = chunk.extent, chunk.hyper
    return (
        chunk.begun
        and extent.resident
        and extent.keeps_all
        and extent.device.type == "cpu"
        and extent.rule.can_defer
        and len(chunk.shape.dims) in (0, 2)
        and not (hyper.maximize or hyper.normalize_grads)
        and len(parts_of(chunk)) == 1
        and all(_is_plain(tile.record.parameter, extent.dtype) for tile in chunk.tiles)
        and all(tile.record.sharding is None and tile.plan.is_whole for tile in chunk.tiles)
    )


def _is_plain(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype and weight.is_contiguous()
