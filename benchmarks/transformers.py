"""Decoders with the shapes of published models, to train on random tokens.

The benchmarks that need a real forward and backward pass take theirs from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What decides on the shapes of a decoder."""

    name: str
    width: int
    layers: int
    heads: int
    key_heads: int
    """Heads of keys and values; fewer than ``heads`` share them."""
    hidden: int
    vocabulary: int
    context: int
    gated: bool
    """As in Llama: a gated MLP, no biases, RMS norms; else as in GPT-2: fused q, k, v, biases."""


SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            width=16,
            layers=2,
            heads=2,
            key_heads=2,
            hidden=64,
            vocabulary=64,
            context=16,
            gated=False,
        ),
        Size(
            name="gpt2",
            width=768,
            layers=12,
            heads=12,
            key_heads=12,
            hidden=3072,
            vocabulary=50257,
            context=1024,
            gated=False,
        ),
        Size(
            name="gpt2-medium",
            width=1024,
            layers=24,
            heads=16,
            key_heads=16,
            hidden=4096,
            vocabulary=50257,
            context=1024,
            gated=False,
        ),
        Size(
            name="gpt2-large",
            width=1280,
            layers=36,
            heads=20,
            key_heads=20,
            hidden=5120,
            vocabulary=50257,
            context=1024,
            gated=False,
        ),
        Size(
            name="gpt2-xl",
            width=1600,
            layers=48,
            heads=25,
            key_heads=25,
            hidden=6400,
            vocabulary=50257,
            context=1024,
            gated=False,
        ),
        Size(
            name="llama-1b",
            width=2048,
            layers=16,
            heads=32,
            key_heads=8,
            hidden=8192,
            vocabulary=128256,
            context=2048,
            gated=True,
        ),
    )
}


class Layer(nn.Module):
    """Causal attention and an MLP, each added to the residual stream."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        biases, head = not size.gated, size.width // size.heads
        parts = [size.width, size.key_heads * head, size.key_heads * head]
        if size.gated:
            self.qkv = nn.ModuleList(nn.Linear(size.width, n, bias=False) for n in parts)
        else:
            self.qkv = nn.ModuleList([nn.Linear(size.width, sum(parts))])
        self.out = nn.Linear(size.width, size.width, bias=biases)
        self.up = nn.Linear(size.width, size.hidden, bias=biases)
        self.gate = nn.Linear(size.width, size.hidden, bias=False) if size.gated else None
        self.down = nn.Linear(size.hidden, size.width, bias=biases)
        self.norm1, self.norm2 = _norm(size), _norm(size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        heads, keys = self.size.heads, self.size.key_heads
        y = torch.cat([part(self.norm1(x)) for part in self.qkv], dim=-1)
        q, k, v = (
            y.unflatten(-1, (heads + 2 * keys, -1)).transpose(1, 2).split([heads, keys, keys], 1)
        )
        k, v = (each.repeat_interleave(heads // keys, 1) for each in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        hidden = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        mapped: Tensor = x + self.down(hidden)
        return mapped


class Decoder(nn.Module):
    """A decoder whose head is its embedding; GPT-2's has learned positions, Llama's none here."""

    def __init__(self, size: Size, *, checkpointed: bool = False) -> None:
        """``checkpointed``: activations of a layer are computed again in the backward pass."""
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = None if size.gated else nn.Embedding(size.context, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = _norm(size)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of each token of (batch, time) after those before it."""
        x = self.tokens(tokens[:, :-1])
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _norm(size: Size) -> nn.Module:
    return nn.RMSNorm(size.width) if size.gated else nn.LayerNorm(size.width)
