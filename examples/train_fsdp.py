"""Train a byte-level GPT whose weights are sharded over processes (FSDP2), with SOAP.

    torchrun --nproc-per-node 2 examples/train_fsdp.py
    torchrun --nproc-per-node 4 examples/train_fsdp.py --replicas 2  # HSDP: 2 copies of 2 shards

The optimizer is called as without shards, and computes the same: each weight has an owner among the
ranks, which gathers its gradient and sends the update back. A run that was stopped continues from
its last checkpoint, on any number of processes. Model and text are those of train_gpt.py.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_gpt import GPT, batch_starts, load_corpus, windows

import asteria

MODEL = {"context": 128, "width": 128, "layers": 4, "heads": 4}
BATCH = 16  # windows of a step, on all ranks together
LR = 3e-3  # constant, hence below the best peak of benchmarks.convergence
WEIGHT_DECAY = 0.01
CLIP = 1.0  # largest norm of all gradients together


def make_mesh(replicas: int) -> DeviceMesh:
    """All processes in a row, or in rows that have a copy of the weights each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = int(os.environ["WORLD_SIZE"])
    if replicas == 1:
        return init_device_mesh(device, (world,))
    shape = (replicas, world // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicas", "shards"))


def build(mesh: DeviceMesh) -> tuple[GPT, asteria.SOAP]:
    """The same first weights on any number of processes, and the optimizer."""
    torch.manual_seed(0)
    model = GPT(**MODEL).to(mesh.device_type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, asteria.SOAP(model.named_parameters(), lr=LR, weight_decay=WEIGHT_DECAY)


def save(folder: Path, step: int, model: GPT, optimizer: asteria.SOAP) -> None:
    """Every rank writes its part."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"step-{step}")


def resume(folder: Path, model: GPT, optimizer: asteria.SOAP) -> int:
    """Take the last complete checkpoint, of any number of processes; returns its step, or 0."""
    steps = [int(path.parent.name[5:]) for path in folder.glob("step-*/.metadata")]
    if not steps:
        return 0
    weights, state = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder / f"step-{max(steps)}")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
    )
    return max(steps)


def train(args: argparse.Namespace, mesh: DeviceMesh) -> None:
    """From the last checkpoint on; rank 0 prints the loss."""
    corpus, context = load_corpus(args.text)[0], MODEL["context"]
    model, optimizer = build(mesh)
    done = resume(args.out, model, optimizer)
    starts = batch_starts(corpus, args.steps, BATCH, context, seed=0)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(done, args.steps):
        inputs, targets = windows(corpus, starts[step][rank::world], context)
        loss = model(inputs.to(mesh.device_type), targets.to(mesh.device_type))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        mean: Tensor = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.out, step + 1, model, optimizer)
    if rank == 0:
        print(optimizer.describe())
    optimizer.close()


def main() -> None:
    """Train on the processes that torchrun has started."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=100)
    add("--replicas", type=int, default=1)  # copies of the weights; must divide the processes
    add("--save-every", type=int, default=50)  # steps
    add("--text", type=Path)  # a file to learn instead of the standard library
    add("--out", type=Path, default=Path("runs/fsdp"))  # checkpoints
    args = parser.parse_args()
    if BATCH % int(os.environ["WORLD_SIZE"]):
        parser.error(f"a batch has {BATCH} windows, which the processes must share evenly")
    mesh = make_mesh(args.replicas)
    try:
        train(args, mesh)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
