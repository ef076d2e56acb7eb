"""A model whose gradients are integers, whatever its weights, and runs of it on several ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import asteria
from asteria.distributed.sharded_layout import ShardLayout

Arrays = dict[str, npt.NDArray[np.generic]]
Parts = dict[str, tuple[tuple[slice, ...], npt.NDArray[np.generic]]]
"""By name of the parameter: a region of it, and its values there."""

WIDTH = 12
LIMIT = 32
"""Dims above it have no factor."""
BATCH = 8
"""Examples of a step, on all ranks together."""
PERIOD = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SOAP": {},
    "KLShampoo": {"start": "adam"},
    "KLSOAP": {"start": "eigh", "staleness": 3},
}
"""And the runtime that each of them has here, if none is given. Young factors have no staleness."""


class Fan(nn.Module):
    """Branches side by side: each has integer input and output gradients, so its own are integers.

    An embedding above the limit, matrices with and without equals, dims that 2 and 4 ranks do not
    divide, a dim below the number of ranks, a stack of experts, vectors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, rows) for rows in (24, 24, 7, 3))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=True)
        self.experts = nn.Parameter(torch.empty(3, 32, 33))
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The loss, a sum over examples, given (b,) and (b, WIDTH) integers."""
        loss = _weighted(self.table(tokens))
        for layer in self.layers:
            loss = loss + _weighted(layer(x))
        loss = loss + _weighted(x * self.norm.weight + self.norm.bias)
        wide = x.repeat(1, 3)[:, :32]
        return loss + _weighted(torch.einsum("bi,eij->bej", wide, self.experts))


def _weighted(output: Tensor) -> Tensor:
    """Its sum with the weights 1, 2, 3, 1, 2, ..."""
    weights = torch.arange(output[0].numel()) % 3 + 1
    return (output.flatten(1) * weights).sum()


def batch(step: int, examples: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Input of a step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (BATCH,), generator=generator)
    x = torch.randint(-4, 5, (BATCH, WIDTH), generator=generator).float()
    return tokens[examples], x[examples]


def build(name: str, params: Iterable[Any], runtime: Mapping[str, Any], **options: Any) -> Any:
    """An optimizer with options that make short runs telling."""
    telling = {
        "lr": 2.0**-6,
        "weight_decay": 2.0**-7,
        "precondition_frequency": PERIOD,
        "max_precond_dim": LIMIT,
    }
    config = asteria.RuntimeConfig(**runtime)
    return getattr(asteria, name)(params, **(telling | options), runtime=config)


class Run:
    """A model and its optimizer, whole or shared by all ranks of the default group."""

    def __init__(
        self,
        name: str,
        mesh_shape: Sequence[int] = (),
        *,
        runtime: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model = Fan()
        self.mesh: DeviceMesh | None = None
        if mesh_shape:
            names = ("replicas", "shards")[-len(mesh_shape) :]
            self.mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
            fully_shard(self.model.layers[0], mesh=self.mesh)
            fully_shard(self.model, mesh=self.mesh)
        given = OPTIMIZERS[name] if runtime is None else runtime
        self.optimizer = build(name, self.model.named_parameters(), given, **options)

    @property
    def examples(self) -> slice:
        """This rank's share of a batch."""
        if self.mesh is None:
            return slice(None)
        share = BATCH // self.mesh.size()
        return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)

    def backward(self, step: int) -> None:
        """Gradients of a step, whatever the number of ranks, of whose gradients FSDP has the mean.

        Quarters, so that all bits are there.
        """
        self.optimizer.zero_grad()
        ranks = 1 if self.mesh is None else self.mesh.size()
        (self.model(*batch(step, self.examples)) * (ranks / 4)).backward()

    def train(self, steps: Iterable[int]) -> None:
        """These steps."""
        for step in steps:
            self.backward(step)
            self.optimizer.step()

    def arrays(self) -> Arrays:
        """The weights of a whole model."""
        return {n: p.detach().numpy().copy() for n, p in self.model.named_parameters()}

    def parts(self) -> Parts:
        """This rank's weights, and where they are in the whole."""
        found: Parts = {}
        for name, parameter in self.model.named_parameters():
            layout = ShardLayout.of(name, parameter)
            local = parameter.to_local().detach()  # type: ignore[attr-defined]
            found[name] = layout.boxes[layout.here], local.numpy().copy()
        return found


def whole(name: str, steps: int, **given: Any) -> Arrays:
    """The weights of an unsharded run on the same batches."""
    run = Run(name, **given)
    run.train(range(steps))
    return run.arrays()


def differing(parts: Parts, wanted: Arrays) -> list[str]:
    """Names of those whose bits are not the ones wanted."""
    assert parts.keys() == wanted.keys()
    return [
        name
        for name, (box, values) in parts.items()
        if values.tobytes() != np.ascontiguousarray(wanted[name][box]).tobytes()
    ]
