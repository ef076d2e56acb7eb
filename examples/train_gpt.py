"""Train a byte-level GPT on real text, once per optimizer, and compare.

    python examples/train_gpt.py                                # AdamW, SOAP and KL-Shampoo
    python examples/train_gpt.py --steps 600 --lr soap=4e-3 klshampoo=4e-3 --out runs/long
    python examples/train_gpt.py --text shakespeare.txt --optimizers adamw soap --out runs/verse

The text is the source of Python's standard library, so nothing is downloaded. Each optimizer gets
the same model, first weights and batches. Checkpoints and ``loss.png`` go to ``--out``; a run that
was killed continues from its last checkpoint and ends with the same bits.
"""

import argparse
import contextlib
import math
import os
import sysconfig
import time
import zlib
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import asteria

OPTIMIZERS = {  # label, color, peak learning rate (the best of benchmarks.convergence)
    "adamw": ("AdamW", "dimgray", 8e-3),
    "soap": ("SOAP", "tab:blue", 2.4e-2),
    "klshampoo": ("KL-Shampoo", "tab:orange", 2.4e-2),
    "klsoap": ("KL-SOAP", "tab:green", 1.2e-2),
}
WEIGHT_DECAY = 0.01  # decoupled, the same for every optimizer and parameter
VOCABULARY = 256  # one token per byte
MODEL = {"context": 128, "width": 128, "layers": 4, "heads": 4}  # 869,504 parameters
BATCH = 16  # windows of ``context`` bytes per step
WINDOWS = 512  # fixed validation windows, evenly spaced over the text that is never trained on
GLANCE = 128  # windows behind each point of the curve: enough to compare, and cheap
EVALUATE_EVERY = 20  # steps
SAVE_EVERY = 50  # steps


# The data: one long row of bytes, its last part kept for validation.
def load_corpus(text: Path | None = None) -> tuple[Tensor, Tensor]:
    """Training and validation bytes of ``text``, or of the standard library without its tests."""
    root, skip = Path(sysconfig.get_path("stdlib")), {"site-packages", "test", "tests", "idle_test"}
    paths = [text] if text else sorted(root.rglob("*.py"))
    chosen = (p for p in paths if p == text or not skip & set(p.relative_to(root).parts))
    content = b"".join(path.read_bytes() for path in chosen)
    corpus = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    cut = int(len(corpus) * 0.95)
    return corpus[:cut], corpus[cut:]


def batch_starts(data: Tensor, steps: int, batch: int, context: int, seed: int) -> Tensor:
    """Where every window of every step begins, (steps, batch): the same for all optimizers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(data) - context, (steps, batch), generator=generator)


def windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (len(starts), context); a target is the byte after its input."""
    rows = data[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


# The model: a pre-norm transformer without biases, initialized as torch does it.
class Block(nn.Module):
    """Causal attention, then a GELU layer of four times the width, added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        y = self.norm1(x)
        q, k, v = (
            m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder with learned positions and an untied head."""

    def __init__(self, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` given ``inputs``, both (batch, time)."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.inference_mode()
def evaluate(model: nn.Module, data: Tensor, context: int, count: int = WINDOWS) -> float:
    """Mean loss in nats on ``count`` evenly spaced windows."""
    starts = torch.arange(count) * (len(data) - context - 1) // max(1, count - 1)
    parts = starts.split(64)
    return sum(model(*windows(data, s, context)).item() * len(s) for s in parts) / count


# Training: one loop for every optimizer.
def make_optimizer(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer called ``name``: the one line that a training script changes."""
    options = {"weight_decay": WEIGHT_DECAY} | options
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True, **options)
    kind = {"soap": asteria.SOAP, "klshampoo": asteria.KLShampoo, "klsoap": asteria.KLSOAP}[name]
    return kind(model.parameters(), **options)


def closing(thing: Any) -> contextlib.AbstractContextManager[Any]:
    """Ends the threads of an optimizer with the block; torch's optimizers have none."""
    return contextlib.closing(thing) if hasattr(thing, "close") else contextlib.nullcontext()


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate: a line up over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state; a state dict of ours also shows what may be in flight."""
    if hasattr(optimizer, "describe"):
        return optimizer.describe().state_bytes
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def load(path: Path, run: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Continue ``parts`` from the checkpoint at ``path``, if there is one; returns its curves."""
    if not path.exists():
        return {"loss": [], "step_s": [], "optimizer_s": [], "validation": []}
    saved = torch.load(path, weights_only=True)
    changed = [f"{k} {v}, not {run.get(k)}" for k, v in saved["run"].items() if v != run.get(k)]
    if changed:
        raise SystemExit(f"{path} has {', '.join(changed)}: choose another --out or delete it")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["curves"]


def train(
    run: dict[str, Any], corpus: tuple[Tensor, Tensor], path: Path, logs: Path | None = None
) -> dict[str, Any]:
    """Train what ``run`` describes, from its checkpoint at ``path`` on; returns its curves."""
    torch.manual_seed(run["seed"])
    model, context = GPT(**MODEL), MODEL["context"]
    own = {} if run["optimizer"] == "adamw" else {"precondition_frequency": run["period"]}
    optimizer = make_optimizer(run["optimizer"], model, lr=run["lr"], **own)
    factor = partial(warmup_cosine, steps=run["steps"], warmup=run["warmup"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    curves = load(path, run, parts)
    starts = batch_starts(corpus[0], run["steps"], BATCH, context, run["seed"])
    done, label = len(curves["loss"]), OPTIMIZERS[run["optimizer"]][0]
    bar = tqdm(range(done, run["steps"]), f"{label:10}", run["steps"], initial=done)
    board = None
    if logs:
        from torch.utils.tensorboard import SummaryWriter  # here, because tensorboard is an extra

        board = SummaryWriter(str(logs / run["optimizer"]), purge_step=done)
    with closing(optimizer), closing(board):
        for step in bar:
            begin = time.perf_counter()
            loss = model(*windows(corpus[0], starts[step], context))
            loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            scheduler.step()
            optimizer.zero_grad()
            curves["loss"].append(loss.item())
            curves["step_s"].append(end - begin)
            curves["optimizer_s"].append(end - middle)
            shown = f"loss {loss.item():.3f}, {1e3 * (end - begin):.0f} ms/step"
            bar.set_postfix_str(shown, refresh=False)
            if board:
                scalars = {"loss": loss.item()} | (asteria.logging_dict(optimizer) if own else {})
                for name, value in scalars.items():
                    board.add_scalar(name, value, step)
            last = step + 1 == run["steps"]
            if last or (step + 1) % EVALUATE_EVERY == 0:
                point = evaluate(model, corpus[1], context, GLANCE)
                curves["validation"].append([step + 1, sum(curves["step_s"]), point])
            if last:
                curves["final"] = evaluate(model, corpus[1], context)
                curves["state_bytes"] = state_bytes(optimizer)
            if last or (step + 1) % SAVE_EVERY == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"run": run, "curves": curves, **states}, f"{path}.tmp")
                os.replace(f"{path}.tmp", path)  # a kill leaves the old checkpoint or the new one
    return curves


# What it showed.
def reach(points: list[list[float]], target: float) -> tuple[float, float] | None:
    """Step and seconds at which (step, seconds, loss) points first get down to ``target``."""
    for (step0, second0, loss0), (step1, second1, loss1) in pairwise([*points[:1], *points]):
        if loss1 <= target:
            part = (loss0 - target) / (loss0 - loss1) if loss0 > target else 1.0
            return step0 + part * (step1 - step0), second0 + part * (second1 - second0)
    return None


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One line per optimizer; what a point of the curves has to reach is AdamW's last one."""
    target = results["adamw"]["validation"][-1][2] if "adamw" in results else -math.inf
    print(f"\n{'':12}validation     to AdamW's loss     optimizer     state")
    print(f"{'':12}      loss     steps   seconds       ms/step        MB")
    for name, curves in results.items():
        reached = reach(curves["validation"], target)
        to = f"{reached[0]:10.0f}{reached[1]:10.1f}" if reached else f"{'-':>10}{'-':>10}"
        per_step_s = sum(curves["optimizer_s"]) / len(curves["optimizer_s"])
        cost = f"{1e3 * per_step_s:14.1f}{curves['state_bytes'] / 1e6:10.1f}"
        print(f"{OPTIMIZERS[name][0]:12}{curves['final']:10.3f}{to}{cost}")


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss against steps and against seconds: training smoothed, validation as points."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, curves in results.items():
        label, color, _ = OPTIMIZERS[name]
        smooth = list(accumulate(curves["loss"], lambda mean, loss: 0.85 * mean + 0.15 * loss))
        steps, seconds, losses = zip(*curves["validation"], strict=True)
        panels[0].plot(range(1, len(smooth) + 1), smooth, color=color, alpha=0.35)
        panels[1].plot(list(accumulate(curves["step_s"])), smooth, color=color, alpha=0.35)
        for panel, x in zip(panels, (steps, seconds), strict=True):
            panel.plot(x, losses, "o-", color=color, markersize=3.5, label=label)
    ends = [curves["validation"] for curves in results.values()]
    low, high = min(p[2] for v in ends for p in v), max(v[len(v) // 8][2] for v in ends)
    for panel, unit in zip(panels, ("steps", "seconds of training"), strict=True):
        if "adamw" in results:
            end = results["adamw"]["validation"][-1][2]
            panel.axhline(end, color="dimgray", ls=":", lw=1, label="AdamW's final loss")
        panel.set(xlabel=unit, xlim=0, ylim=(low - 0.15, high + 0.1))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss in nats per byte")
    panels[0].legend(title="points: validation\nlines: training, smoothed", frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Train with each optimizer in turn, then print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "soap", "klshampoo"])
    add("--lr", nargs="+", default=[], metavar="NAME=VALUE")  # peak learning rates
    add("--text", type=Path)  # a file to learn instead of the standard library
    add("--out", type=Path, default=Path("runs"))  # checkpoints and loss.png
    add("--tensorboard", type=Path)  # a folder to log to; needs tensorboard
    add("--steps", type=int, default=300)  # a fifth of them warm-up
    add("--seed", type=int, default=0)  # of the first weights and of the batches
    add("--period", type=int, default=10)  # steps between two refreshes of an eigenbasis
    args = parser.parse_args(argv)
    rates = {name: lr for name, (_, _, lr) in OPTIMIZERS.items()}
    rates |= {name: float(lr) for name, lr in (pair.split("=") for pair in args.lr)}
    if rates.keys() != OPTIMIZERS.keys():
        parser.error(f"--lr knows {', '.join(OPTIMIZERS)}; found {', '.join(args.lr)}")
    corpus = load_corpus(args.text)
    if len(corpus[1]) <= MODEL["context"] + 1:
        parser.error(f"--text: {len(corpus[1])} bytes to validate on are too few, give more text")
    run = MODEL | {"batch": BATCH, "text": zlib.crc32(torch.cat(corpus).numpy().tobytes())}
    run |= {"steps": args.steps, "warmup": max(1, args.steps // 5)}
    run |= {"seed": args.seed, "period": args.period}
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.optimizers:
        this = run | {"optimizer": name, "lr": rates[name]}
        results[name] = train(this, corpus, args.out / f"{name}.pt", args.tensorboard)
    print_table(results)
    plot(results, args.out / "loss.png")
    print(f"\nCurves: {args.out / 'loss.png'}")


if __name__ == "__main__":
    main()
