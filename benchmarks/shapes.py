"""Tables of real layer shapes: the one place where the benchmarks take their shapes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeTable:
    """The parameters of one model, by role.

    A vector is ``(n,)`` and a weight is ``(rows, columns)`` as the model stores it.
    """

    name: str
    embeddings: tuple[Shape, ...]
    """Embeddings and heads: what grows with the vocabulary and the context, not with the depth."""
    layer: tuple[Shape, ...]
    """All parameters of one layer."""
    layers: int
    """How many such layers there are."""
    rest: tuple[Shape, ...]
    """What follows the last layer, such as the final norm."""
    max_precond_dim: int
    """The limit that a run of this model would set: larger dimensions have no factor."""

    def shapes(self) -> list[Shape]:
        """All parameters, in the model's order."""
        return [*self.embeddings, *self.layer * self.layers, *self.rest]

    def counts(self) -> dict[Shape, int]:
        """How often each shape occurs."""
        return dict(Counter(self.shapes()))

    def parameters(self) -> int:
        """The number of scalar parameters."""
        return count_parameters(self.shapes())


def count_parameters(shapes: Iterable[Shape]) -> int:
    """The number of scalar parameters in ``shapes``."""
    return sum(math.prod(shape) for shape in shapes)


def gpt_nano() -> ShapeTable:
    """The 869,504-parameter byte-level GPT of the examples: width 128, 4 layers, untied head."""
    width, context, vocabulary = 128, 128, 256
    attention = ((width, width),) * 4
    mlp = ((4 * width, width), (width, 4 * width))
    norms = ((width,),) * 2
    return ShapeTable(
        name="gpt-nano",
        embeddings=((vocabulary, width), (context, width), (vocabulary, width)),
        layer=(*attention, *mlp, *norms),
        layers=4,
        rest=((width,),),
        max_precond_dim=10000,
    )


def gpt_micro() -> ShapeTable:
    """A GPT of width 64 with long embeddings: a round of refreshes takes ten times its update."""
    width, context, vocabulary = 64, 512, 1536
    attention = ((width, width),) * 4
    mlp = ((4 * width, width), (width, 4 * width))
    norms = ((width,),) * 2
    return ShapeTable(
        name="gpt-micro",
        embeddings=((vocabulary, width), (context, width), (vocabulary, width)),
        layer=(*attention, *mlp, *norms),
        layers=2,
        rest=((width,),),
        max_precond_dim=10000,
    )


def gpt2() -> ShapeTable:
    """GPT-2 (124M) as published: 12 layers of width 768, fused q/k/v, biases, tied head."""
    width, context, vocabulary = 768, 1024, 50257
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ShapeTable(
        name="gpt2",
        embeddings=((vocabulary, width), (context, width)),
        layer=(*norm, *attention, *norm, *mlp),
        layers=12,
        rest=norm,
        max_precond_dim=2048,
    )


def llama_1b() -> ShapeTable:
    """Llama 3.2 1B: 16 layers of width 2048, 32 heads and 8 key-value heads of 64, tied head."""
    width, hidden, vocabulary = 2048, 8192, 128256
    queries, keys = 32 * 64, 8 * 64
    attention = ((queries, width), (keys, width), (keys, width), (width, queries))
    mlp = ((hidden, width), (hidden, width), (width, hidden))
    norms = ((width,),) * 2
    return ShapeTable(
        name="llama-1b",
        embeddings=((vocabulary, width),),
        layer=(*attention, *mlp, *norms),
        layers=16,
        rest=((width,),),
        max_precond_dim=2048,
    )


TABLES = {table.name: table for table in (gpt_nano(), gpt_micro(), gpt2(), llama_1b())}


def cut(table: ShapeTable, max_parameters: int) -> tuple[ShapeTable, str]:
    """Shrink ``table`` to at most ``max_parameters`` and say what was kept.

    The mix of layer kinds stays: whole layers go first, down to one, then rows of the largest
    embedding. An embedding whose rows had no factor keeps more rows than ``max_precond_dim``, so
    that it is still preconditioned on one side only.

    Raises:
        ValueError: One layer with the smallest embeddings is still larger than
            ``max_parameters``.
    """
    per_layer = count_parameters(table.layer)
    beside_layers = count_parameters((*table.embeddings, *table.rest))
    layers = min(table.layers, max(1, (max_parameters - beside_layers) // per_layer))
    embeddings = list(table.embeddings)
    excess = beside_layers + layers * per_layer - max_parameters
    while excess > 0:
        index, spare_rows = _most_spare_rows(embeddings, table)
        if spare_rows == 0:
            raise ValueError(
                f"{table.name} cannot be cut to {max_parameters:,} parameters: one layer with the "
                f"smallest embeddings has {excess + max_parameters:,}; raise the limit to that"
            )
        rows, *row_shape = embeddings[index]
        row_parameters = math.prod(row_shape)
        dropped_rows = min(spare_rows, math.ceil(excess / row_parameters))
        embeddings[index] = (rows - dropped_rows, *row_shape)
        excess -= dropped_rows * row_parameters
    shrunk = replace(table, embeddings=tuple(embeddings), layers=layers)
    return shrunk, _kept(table, shrunk)


def _most_spare_rows(embeddings: list[Shape], table: ShapeTable) -> tuple[int, int]:
    """Index of the largest embedding that can still lose rows, and how many it can lose."""
    spare_rows = []
    for now, before in zip(embeddings, table.embeddings, strict=True):
        fewest = table.max_precond_dim + 1 if before[0] > table.max_precond_dim else 1
        spare_rows.append(now[0] - fewest)
    candidates = [index for index, spare in enumerate(spare_rows) if spare > 0]
    if not candidates:
        return 0, 0
    largest = max(candidates, key=lambda index: math.prod(embeddings[index]))
    return largest, spare_rows[largest]


def _kept(table: ShapeTable, shrunk: ShapeTable) -> str:
    """One line that tells what of ``table`` is left in ``shrunk``."""
    if shrunk == table:
        return f"all of {table.name}: {table.parameters():,} parameters"
    parts = [f"{shrunk.layers} of {table.layers} layers"]
    for now, before in zip(shrunk.embeddings, table.embeddings, strict=True):
        if now != before:
            parts.append(f"{now[0]:,} of {before[0]:,} rows of the embedding {before}")
    return (
        f"{', '.join(parts)} of {table.name}: "
        f"{shrunk.parameters():,} of {table.parameters():,} parameters"
    )


def factor_dims(shape: Shape, max_precond_dim: int) -> tuple[int, ...]:
    """The dimensions of ``shape`` that have a Kronecker factor; none for a vector."""
    if len(shape) < 2:
        return ()
    return tuple(dim for dim in shape if dim <= max_precond_dim)


def soap_state_bytes(table: ShapeTable, max_precond_dim: int) -> int:
    """Bytes of a float32 SOAP: two moments, and a factor and a basis for each side."""
    sides = sum(
        dim * dim for shape in table.shapes() for dim in factor_dims(shape, max_precond_dim)
    )
    return 4 * (2 * table.parameters() + 2 * sides)


def fit(table: ShapeTable, bytes_allowed: int, *, copies: int, max_precond_dim: int) -> int:
    """The parameters of the largest cut whose weights and SOAP state fit ``copies`` times.

    Raises:
        ValueError: Not even the smallest cut fits.
    """
    limit = table.parameters()
    while True:
        shrunk, _ = cut(table, limit)
        per_copy = 4 * shrunk.parameters() + soap_state_bytes(shrunk, max_precond_dim)
        if copies * per_copy <= bytes_allowed:
            return limit
        limit = shrunk.parameters() * 19 // 20
