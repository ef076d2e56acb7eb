"""Updates of chunks on the host that are written down once and asked for at every step.

The same operations on the same memory, but for the gradients and the learning rate: to find that
out anew takes Python as long as everything else that it does in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asteria.config.hyperparameters import Hyperparameters
from asteria.linalg.deferred import Program, do
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.weights import descend_, gradients_of

__all__ = ["Passage", "is_plain"]


@dataclass(frozen=True, slots=True)
class Passage:
    """What the update of a chunk does, in views of its state. For the training thread."""

    hyper: Hyperparameters
    memory: int
    """Which of its scratch's memory it works in, so that outgrown memory is not kept for it."""
    gathered: list[Tensor]
    """Where the gradients of its tiles are copied to."""
    before: Program
    """From there to the direction."""
    weights: list[Tensor]
    changes: list[Tensor]
    """Their parts of the direction; overwritten."""
    after: Program
    """What is added to the factors."""

    def fits(self, chunk: Chunk, memory: int) -> bool:
        """Whether it is the chunk's, too, which has the same views of the state."""
        return (
            self.hyper == chunk.hyper
            and self.memory == memory
            and len(self.weights) == len(chunk.tiles)  # empty ones have no place among the blocks
            and all(map(Tensor.is_contiguous, self.weights))
        )

    def ask(self, chunk: Chunk, update: Update) -> None:
        """`do` it for the step that the chunk is in."""
        do(torch._foreach_copy_, self.gathered, gradients_of(chunk))
        self.before.again()
        scale = chunk.extent.rule.scale(chunk.hyper, chunk.steps + 1)
        rate, decay = update.lr * scale, update.lr * update.weight_decay
        descend_(self.weights, self.changes, rate, decay, None)
        self.after.again()


def is_plain(chunk: Chunk) -> bool:
    """Whether an update of the chunk that can be deferred can be a passage, too.

    Its parameters are as the operations want them. A lone gradient may be used where it is.
    """
    return len(chunk.tiles) > 1 and all(
        tile.plan.is_whole
        and tile.record.sharding is None
        and tile.record.dtype == chunk.extent.dtype
        and tile.record.parameter.is_contiguous()
        for tile in chunk.tiles
    )
