"""Gradients and Kronecker factors of a real training run, for studies of refreshes.

    python -m benchmarks.factor_stream tests/fixtures/factor_stream.npz

trains the example's GPT at width 64 and writes 30 steps of two weights: the fixture of the tests.
``benchmarks/refresh_numerics.py`` records a larger run. SOAP trains, refreshed at every step.

For a weight W (m, n) the file has ``W/gradients`` (steps, m, n) in float16, times the power of two
``W/scale`` beside it, and ``W/left`` (m, m) and ``W/right`` (n, n), the lower triangles of the
factors (float32) that the first of the gradients is added to.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import asteria
from examples import train_gpt as example

BETA = 0.95
WEIGHTS = ("blocks.1.v.weight", "blocks.1.down.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """What one weight saw: gradients (steps, m, n) and the factors before them, float32."""

    gradients: Tensor
    left: Tensor
    """(m, m)."""
    right: Tensor
    """(n, n)."""

    def factors(self, side: str, beta: float = BETA) -> Iterator[Tensor]:
        """The factor (1, k, k) of ``"left"`` or ``"right"`` after each gradient, in float32."""
        factor = (self.left if side == "left" else self.right).clone()
        for gradient in self.gradients:
            x = gradient if side == "left" else gradient.mT
            factor = torch.addmm(factor, x, x.mT, beta=beta, alpha=1 - beta)
            yield factor.unsqueeze(0)


def record(
    weights: Sequence[str],
    *,
    width: int,
    first: int,
    count: int,
    steps: int = 300,
    lr: float = 6e-3,
) -> dict[str, Stream]:
    """Train a GPT of this width and two layers; keep ``count`` steps from ``first`` (at least 1).

    ``steps`` is the length of the schedule, whose warm-up is a fifth of it. On one thread, as the
    trajectory depends on the number of threads.
    """
    torch.manual_seed(0)
    data, _ = example.load_corpus()
    context, batch = min(width, 128), 16
    model = example.GPT(context, width, 2, max(2, width // 32))
    runtime = asteria.RuntimeConfig(refresh="sync")
    options = {"lr": lr, "precondition_frequency": 1, "shampoo_beta": BETA, "runtime": runtime}
    optimizer = example.make_optimizer("soap", model, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: example.warmup_cosine(step, steps, steps // 5)
    )
    starts = example.batch_starts(data, first + count, batch, context, seed=0)
    parameters = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for step in tqdm(range(first + count), desc=f"width {width}", unit="step"):
        model(*example.windows(data, starts[step], context)).backward()
        for name in weights if step >= first else ():
            if step == first:
                state = optimizer.state[parameters[name]]
                factors[name] = (state["factor_0"].clone(), state["factor_1"].clone())
            gradient = parameters[name].grad
            if gradient is not None:
                found[name].append(gradient.clone())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        name: Stream(gradients=torch.stack(kept), left=factors[name][0], right=factors[name][1])
        for name, kept in found.items()
    }


def save(streams: dict[str, Stream], path: Path) -> None:
    """Write all streams into one compressed file."""
    arrays: dict[str, np.ndarray] = {}
    for name, stream in streams.items():
        scale = 2.0 ** math.floor(math.log2(stream.gradients.abs().max().item()))
        arrays[f"{name}/gradients"] = (stream.gradients / scale).numpy().astype(np.float16)
        arrays[f"{name}/scale"] = np.float32(scale)
        arrays[f"{name}/left"] = stream.left.tril().numpy()
        arrays[f"{name}/right"] = stream.right.tril().numpy()
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, Stream]:
    """Read what `save` has written."""
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    names = [key.removesuffix("/gradients") for key in arrays if key.endswith("/gradients")]
    return {
        name: Stream(
            gradients=arrays[f"{name}/gradients"].float() * arrays[f"{name}/scale"],
            left=_whole(arrays[f"{name}/left"]),
            right=_whole(arrays[f"{name}/right"]),
        )
        for name in names
    }


def _whole(triangle: Tensor) -> Tensor:
    return triangle + triangle.tril(-1).mT


def main(argv: list[str] | None = None) -> None:
    """Record the fixture of the tests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="file to write, .npz")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    save(record(WEIGHTS, width=64, first=20, count=30), args.path)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
