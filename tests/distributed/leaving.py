"""A program of two ranks that comes to its end, or of which one is lost: arguments rank, file, how.

It closes nothing, as many programs do: neither the optimizer nor the process group.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from asteria import SOAP

STEPS = 20
TIMEOUT_S = 240.0


def main() -> None:
    """Train a replicated and a sharded parameter."""
    rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    plain = nn.Parameter(torch.randn(6, 4))
    shared = nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)]))
    options = {"shampoo_beta": 0.5, "precondition_frequency": 2}
    optimizer = SOAP([plain, shared], lr=0.01, **options)
    for step in range(STEPS):
        if how == "lost" and (rank, step) == (1, STEPS // 2):
            os._exit(7)
        torch.manual_seed(step)
        plain.grad = torch.randn(6, 4)
        shared.grad = DTensor.from_local(torch.randn(3, 4), mesh, [Shard(0)])
        optimizer.step()


if __name__ == "__main__":
    main()
