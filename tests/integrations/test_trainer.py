"""Hugging Face's Trainer, with a random GPT-2 and nothing downloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from tests.integrations.settings import (
    ACCUMULATED,
    BATCH,
    MAX_NORM,
    OPTIONS,
    SAVED,
    STEPS,
    build,
    has_flights,
)
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.training import Bits, assert_same_bits, weights

WARMUP = 4
SIZES = {"vocab_size": 24, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class TinyGPT(GPT2LMHeadModel):
    """GPT-2, tied head and dropout included, whose loss is the mean over a batch."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        # Without further arguments Trainer averages the losses of accumulated batches.
        return super().forward(input_ids=input_ids, labels=labels)


def language_model() -> TinyGPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyGPT(GPT2Config(**SIZES, **SPECIAL))


class Text(IterableDataset[dict[str, Tensor]]):
    """Random tokens, in an order that no sampler changes."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(24, (STEPS * ACCUMULATED * BATCH, 8), generator=generator)
        return ({"input_ids": row, "labels": row} for row in tokens)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=MAX_NORM,
        learning_rate=OPTIONS["lr"],
        weight_decay=0.25,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        save_steps=SAVED,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def by_class(name: str, folder: Path, **options: Any) -> Trainer:
    """A Trainer that makes the optimizer."""
    return Trainer(
        model=language_model(),
        args=arguments(folder, **options),
        train_dataset=Text(),
        optimizer_cls_and_kwargs=(OPTIMIZERS[name], dict(OPTIONS)),
    )


def by_optimizer(name: str, folder: Path, **options: Any) -> Trainer:
    """A Trainer that is given the optimizer, in the groups that it would make itself."""
    model = language_model()
    return Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Text(),
        optimizers=(build(name, groups(model)), None),
    )


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not."""
    named = list(model.named_parameters())
    decayed = [p for key, p in named if "ln_" not in key and "bias" not in key]
    others = [p for key, p in named if "ln_" in key or "bias" in key]
    return [
        {"params": decayed, "weight_decay": 0.25},
        {"params": others, "weight_decay": 0.0},
    ]


def plain_loop(name: str, seed: int, *, bf16: bool = False) -> Bits:
    """Weights after the same loop by hand."""
    model = language_model().train()
    optimizer = build(name, groups(model))
    scheduler = get_scheduler("linear", optimizer, WARMUP, STEPS)
    torch.manual_seed(seed)  # of the dropout
    for number, batch in enumerate(DataLoader(Text(), batch_size=BATCH), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        (loss / ACCUMULATED).backward()
        if number % ACCUMULATED == 0:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return weights(model.parameters())


@pytest.mark.parametrize("make", [by_class, by_optimizer])
@over_optimizers
def test_it_ends_with_the_bits_of_the_plain_loop(name: str, make: Any, tmp_path: Path) -> None:
    trainer = make(name, tmp_path, save_strategy="no")
    trainer.train()
    assert_same_bits(weights(trainer.model.parameters()), plain_loop(name, trainer.args.seed))
    assert trainer.optimizer.optimizer.stats().steps == STEPS


def test_bf16_is_that_of_autocast(tmp_path: Path) -> None:
    trainer = by_class("SOAP", tmp_path, save_strategy="no", bf16=True)
    trainer.train()
    plain = plain_loop("SOAP", trainer.args.seed, bf16=True)
    assert_same_bits(weights(trainer.model.parameters()), plain)


@over_optimizers
def test_a_checkpoint_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = by_class(name, tmp_path)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    assert has_flights(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    resumed = by_class(name, tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.optimizer.optimizer.stats().steps == STEPS - SAVED
    assert_same_bits(weights(resumed.model.parameters()), weights(whole.model.parameters()))
