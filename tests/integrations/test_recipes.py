"""The recipes of the README run as they stand there."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asteria
from tests.architecture.sources import ROOT
from tests.integrations.settings import network, rows
from tests.integrations.test_trainer import Text, language_model

STEPS = 4

pytestmark = [
    # Lightning's own: about torch.utils._pytree, and about what a small run lacks.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # torch's, where there is no accelerator.
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true"),
]


def recipe(library: str) -> str:
    """The one block of the README that imports ``library``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (found,) = (block for block in blocks if re.match(rf"(from|import) {library}\b", block))
    assert len(found.splitlines()) <= 20
    return str(found)


def run(library: str, **names: Any) -> dict[str, Any]:
    """The names that there are after the recipe, which finds ``names``."""
    scope = {"asteria": asteria, "steps": STEPS, **names}
    exec(recipe(library), scope)
    return scope


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_transformers() -> None:
    model = language_model()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    trainer = run("transformers", model=model, dataset=Text())["trainer"]
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, asteria.SOAP)
    assert optimizer.stats().steps == STEPS
    assert optimizer.defaults["lr"] == 3e-3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight.cpu(), before)


def test_accelerate(tmp_path: Path) -> None:
    loss = nn.functional.mse_loss
    scope = run("accelerate", model=network(), loader=rows(2 * STEPS), loss_function=loss)
    assert isinstance(scope["optimizer"].optimizer, asteria.SOAP)
    assert scope["optimizer"].optimizer.stats().steps == STEPS
    assert (tmp_path / "runs" / "optimizer.bin").exists()


def test_lightning() -> None:
    seen: list[float] = []

    def loss_function(predicted: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(predicted, targets)
        seen.append(loss.item())
        return loss

    model = network()
    before = model[0].weight.detach().clone()
    scope = run("lightning", model=model, loader=rows(STEPS), loss_function=loss_function)
    assert scope["trainer"].callback_metrics["asteria/steps"] == STEPS
    assert len(seen) == STEPS
    assert all(map(math.isfinite, seen))
    assert not torch.equal(model[0].weight.cpu(), before)


def test_a_checkpoint(tmp_path: Path) -> None:
    model = network()
    optimizer = asteria.SOAP(model.parameters())
    run("os", model=model, optimizer=optimizer, torch=torch, path=tmp_path / "checkpoint")
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
