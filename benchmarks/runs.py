"""Training runs of the example's task: what one depends on, how it goes, where it is stored."""

import hashlib
import json
import math
import os
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

import asteria
from asteria.linalg import method
from benchmarks.measurement import read_stats
from examples import train_gpt as example

Record = dict[str, Any]
Corpus = tuple[Tensor, Tensor]
NEVER = 10**9  # a period that no run lives to see the end of
RAISE = 3.0  # of a learning rate that is raised again


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The model and the data that all runs of a study share."""

    context: int = example.MODEL["context"]
    width: int = example.MODEL["width"]
    layers: int = example.MODEL["layers"]
    heads: int = example.MODEL["heads"]
    batch: int = example.BATCH
    windows: int = example.WINDOWS  # validation windows of the final loss
    glance: int = example.GLANCE  # validation windows of a point of a curve
    text: int = 0  # checksum of the corpus
    threads: int | None = None  # of torch where it was set: another number, other bits


def set_up(*, quick: bool, threads: int | None = None) -> tuple[Task, Corpus]:
    """The example's task and its data; a ``quick`` one has a tiny model."""
    corpus = example.load_corpus()
    text = zlib.crc32(torch.cat(corpus).numpy().tobytes())
    task = Task(text=text, threads=threads)
    if quick:
        task = replace(task, context=32, width=32, layers=2, heads=2, batch=4, windows=64)
    return task, corpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run: what it depends on beside its task, and so the key of its result."""

    optimizer: str  # as the example calls it: adamw, soap, klshampoo or klsoap
    lr: float  # peak learning rate
    steps: int
    seed: int = 0  # of the first weights and of the batches
    warmup: int = 60  # steps of linear warm-up
    # After the warm-up; a cosine ends at 0, "raised" is constant and RAISE times that from half on.
    schedule: Literal["cosine", "constant", "raised"] = "cosine"
    preset: Literal["default", "reference"] = "default"  # of the RuntimeConfig
    runtime: tuple[tuple[str, Any], ...] = ()  # its fields that differ from the preset
    options: tuple[tuple[str, Any], ...] = (("precondition_frequency", 10),)  # not for AdamW
    frozen_after: int | None = None  # steps, after which no period ends in a refresh any more
    perturbation: float | None = None  # standard deviation of noise on the first weights
    ldlr_iterations: int | None = None  # that an LDLR refresh is worth, where it is not the usual

    def make_model(self, task: Task) -> torch.nn.Module:
        """The model with its first weights."""
        torch.manual_seed(self.seed)
        model = example.GPT(task.context, task.width, task.layers, task.heads)
        if self.perturbation is not None:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight), alpha=self.perturbation)
        return model

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer of this run for ``model``."""
        if self.optimizer == "adamw":
            return example.make_optimizer("adamw", model, lr=self.lr)
        config = asteria.RuntimeConfig
        preset = config.reference() if self.preset == "reference" else config()
        changed = {**dict(self.runtime)}
        if "state_dtype" in changed:  # by its name, as JSON has no dtypes
            changed["state_dtype"] = getattr(torch, changed["state_dtype"])
        runtime = replace(preset, **changed)
        options = dict(self.options)
        return example.make_optimizer(self.optimizer, model, lr=self.lr, runtime=runtime, **options)

    def factor(self, step: int) -> float:
        """Fraction of the peak learning rate at ``step``."""
        if self.schedule != "cosine":
            raised = self.schedule == "raised" and step >= self.steps // 2
            return min(1.0, (step + 1) / self.warmup) * (RAISE if raised else 1.0)
        return example.warmup_cosine(step, self.steps, self.warmup)

    def before(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Change what changes on the way, before ``step`` (from 0)."""
        if step == self.frozen_after:
            for group in optimizer.param_groups:
                group["precondition_frequency"] = NEVER

    def __str__(self) -> str:
        changed = (f"{name}={value}" for name, value in (*self.runtime, *self.options))
        return (
            f"{self.optimizer} {self.preset} {' '.join(changed)}, lr {self.lr:g}, seed {self.seed}"
        )


def execute(run: Run, task: Task, corpus: Corpus, on_step: Callable[[str], None]) -> Record:
    """Train ``run``; one that leaves the finite numbers ends there and has no final loss."""
    model = run.make_model(task)
    optimizer = run.make_optimizer(model)
    iterations = run.ldlr_iterations or method.ITERATIONS
    with example.closing(optimizer), mock.patch.object(method, "ITERATIONS", iterations):
        record = _train(run, task, corpus, (model, optimizer), on_step)
        record["state_bytes"] = example.state_bytes(optimizer)
        record["stats"] = read_stats(optimizer)
    record["threads"] = torch.get_num_threads()
    return record


def _train(
    run: Run,
    task: Task,
    corpus: Corpus,
    parts: tuple[torch.nn.Module, torch.optim.Optimizer],
    on_step: Callable[[str], None],
) -> Record:
    """The steps of ``run`` on its model and optimizer, with their losses and times."""
    model, optimizer = parts
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, run.factor)
    starts = example.batch_starts(corpus[0], run.steps, task.batch, task.context, run.seed)
    record: Record = {"loss": [], "step_s": [], "optimizer_s": [], "validation": [], "final": None}
    for step in range(run.steps):
        run.before(step, optimizer)
        begin = time.perf_counter()
        loss = model(*example.windows(corpus[0], starts[step], task.context))
        loss.backward()
        middle = time.perf_counter()
        try:
            optimizer.step()
        except (asteria.NonFiniteGradientError, asteria.RefreshError):
            break
        end = time.perf_counter()
        scheduler.step()
        optimizer.zero_grad()
        record["loss"].append(loss.item())
        record["step_s"].append(end - begin)
        record["optimizer_s"].append(end - middle)
        if not math.isfinite(loss.item()):
            break
        on_step(f"loss {loss.item():.3f}, {1e3 * (end - begin):.0f} ms/step")
        if step + 1 == run.steps or (step + 1) % example.EVALUATE_EVERY == 0:
            point = example.evaluate(model, corpus[1], task.context, task.glance)
            record["validation"].append([step + 1, sum(record["step_s"]), point])
    else:
        final = example.evaluate(model, corpus[1], task.context, task.windows)
        record["final"] = final if math.isfinite(final) else None
    return record


class Lab:
    """Runs of one task: looks each up in its folder and executes those that are not there."""

    def __init__(self, task: Task, corpus: Corpus, folder: Path, bar: Any) -> None:
        """``bar`` is a tqdm bar over the steps of all runs."""
        self.task, self.corpus, self.folder, self.bar = task, corpus, folder, bar
        files = sorted(Path(asteria.__file__).parent.rglob("*.py"))
        self.source = zlib.crc32(b"".join(file.read_bytes() for file in files))
        self.outdated = 0  # results of another version of asteria
        self.records: dict[Run, Record] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, run: Run) -> Path:
        """Where the result of ``run`` is stored."""
        settings = [asdict(run), asdict(self.task)]
        # What is not set does not count, so that a new field leaves old results valid.
        given = [{k: v for k, v in fields.items() if v is not None} for fields in settings]
        key = json.dumps(given, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:10]
        name = f"{run.optimizer}_{run.preset}_{run.steps}steps_lr{run.lr:g}_seed{run.seed}"
        return self.folder / f"{name}_{digest}.json"

    def __call__(self, run: Run) -> Record:
        """The result of ``run``, stored or new."""
        if run not in self.records:
            path = self.path(run)
            self.records[run] = self._read(run, path) if path.exists() else self._new(run, path)
        return self.records[run]

    def _read(self, run: Run, path: Path) -> Record:
        self.bar.total -= run.steps  # so that the time left is that of new runs
        record: Record = json.loads(path.read_text())
        self.outdated += record["source"] != self.source and run.optimizer != "adamw"
        return record

    def _new(self, run: Run, path: Path) -> Record:
        start = self.bar.n
        self.bar.set_description(str(run))

        def on_step(text: str) -> None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

        record = execute(run, self.task, self.corpus, on_step)
        record |= {"run": asdict(run), "task": asdict(self.task), "source": self.source}
        self.bar.update(start + run.steps - self.bar.n)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        os.replace(temporary, path)  # a kill leaves no half result
        return record

    def summary(self) -> list[Record]:
        """All runs so far, without what there is of every step."""
        long = ("task", "loss", "step_s", "optimizer_s")
        return [
            {"optimizer_ms": optimizer_ms([r])} | {k: v for k, v in r.items() if k not in long}
            for r in self.records.values()
        ]


Runner = Callable[[Run], Record]


def final(record: Record) -> float:
    """Final validation loss; infinite where the run broke off."""
    return math.inf if record["final"] is None else float(record["final"])


def optimizer_ms(records: Sequence[Record]) -> float:
    """Mean milliseconds of ``step()`` over all steps of ``records``."""
    times = [seconds for record in records for seconds in record["optimizer_s"]]
    return 1e3 * statistics.fmean(times) if times else math.nan


def finite(results: Record) -> Record:
    """``results`` as JSON can hold them: null for what is no finite number."""
    copy: Record = json.loads(json.dumps(results), parse_constant=lambda name: None)
    return copy
