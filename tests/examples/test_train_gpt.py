"""The main job on a tiny model: what it learns from, what it stores and how it continues."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import asteria
from examples import train_gpt

STEPS = 8


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and intervals for runs of a few milliseconds."""
    model = {"context": 8, "width": 8, "layers": 1, "heads": 2}
    monkeypatch.setattr(train_gpt, "MODEL", model)
    monkeypatch.setattr(train_gpt, "BATCH", 2)
    monkeypatch.setattr(train_gpt, "EVALUATE_EVERY", 5)
    monkeypatch.setattr(train_gpt, "SAVE_EVERY", 2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return path


def train(text: Path, out: Path, *more: str) -> None:
    train_gpt.main(["--text", str(text), "--out", str(out), "--steps", str(STEPS), *more])


def checkpoint(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


def test_the_model_has_the_published_number_of_parameters() -> None:
    model = train_gpt.GPT(context=128, width=128, layers=4, heads=4)
    assert sum(p.numel() for p in model.parameters()) == 869_504


def test_the_model_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = train_gpt.GPT(**train_gpt.MODEL)
    inputs = torch.randint(256, (1, 8))
    other = inputs.clone()
    other[0, -1] = (other[0, -1] + 1) % 256
    embedded = [model.tokens(x) + model.positions.weight for x in (inputs, other)]
    first, second = (model.blocks(x) for x in embedded)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


def test_the_standard_library_is_read_without_its_tests() -> None:
    training, validation = train_gpt.load_corpus()
    assert training.dtype == torch.uint8
    assert len(training) > 5_000_000
    assert len(validation) == pytest.approx(len(training) / 19, abs=1)
    content = bytes(training.tolist()) + bytes(validation.tolist())
    assert b"class ArgumentParser" in content
    assert b"class TestArgumentParser" not in content


def test_targets_are_one_byte_ahead_of_inputs(text: Path) -> None:
    training, _ = train_gpt.load_corpus(text)
    inputs, targets = train_gpt.windows(training, torch.tensor([0, 4]), 8)
    assert bytes(inputs[0].tolist()) == b"the quic"
    assert bytes(targets[0].tolist()) == b"he quick"
    assert bytes(inputs[1].tolist()) == b"quick br"


def test_batches_depend_on_the_seed_only() -> None:
    data = torch.zeros(100, dtype=torch.uint8)
    first = train_gpt.batch_starts(data, 5, 4, 8, seed=0)
    torch.rand(3)
    assert torch.equal(first, train_gpt.batch_starts(data, 5, 4, 8, seed=0))
    assert not torch.equal(first, train_gpt.batch_starts(data, 5, 4, 8, seed=1))
    assert int(first.max()) + 8 < len(data)


def test_the_last_validation_window_ends_with_the_text(text: Path) -> None:
    class Spy(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.last = targets[-1]
            return torch.tensor(float(len(targets)))

    _, validation = train_gpt.load_corpus(text)
    spy = Spy()
    loss = train_gpt.evaluate(spy, validation, 8, count=65)
    assert torch.equal(spy.last, validation[-8:].long())
    assert loss == pytest.approx((64 * 64 + 1) / 65)  # windows weigh the same in every part


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    factors = [train_gpt.warmup_cosine(step, 300, 60) for step in range(300)]
    assert factors[0] == pytest.approx(1 / 60)
    assert factors[59] == 1.0
    assert factors[180] == pytest.approx(0.5)
    assert factors[-1] < 1e-3
    assert factors[60:] == sorted(factors[60:], reverse=True)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(3.0, (10.0, 1.0)), (2.5, (15.0, 2.0)), (1.5, (30.0, 5.0)), (1.0, None)],
)
def test_reach_interpolates_between_points(
    target: float, expected: tuple[float, float] | None
) -> None:
    points = [[10, 1.0, 3.0], [20, 3.0, 2.0], [30, 5.0, 1.5], [40, 7.0, 1.7]]
    assert train_gpt.reach(points, target) == (expected and pytest.approx(expected))


def test_bytes_are_those_of_the_state_and_not_of_what_may_be_in_flight() -> None:
    for make, wanted in (
        (torch.optim.AdamW, 4 * (2 * 24 + 1)),
        (asteria.SOAP, 4 * (2 * 24 + 2 * (6**2 + 4**2))),
    ):
        weight = torch.nn.Parameter(torch.ones(6, 4))
        optimizer = make([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert train_gpt.state_bytes(optimizer) == wanted


def test_it_trains_and_shows_a_table_and_a_plot(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(text, tmp_path, "--optimizers", "adamw", "soap", "--lr", "soap=1e-3")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("AdamW ") and f"{STEPS:10d}" in line for line in lines)
    assert any(line.startswith("SOAP ") for line in lines)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = {name: checkpoint(tmp_path / f"{name}.pt") for name in ("adamw", "soap")}
    assert saved["soap"]["run"]["lr"] == 1e-3
    for name in ("adamw", "soap"):
        curves = saved[name]["curves"]
        assert len(curves["loss"]) == STEPS
        assert [step for step, *_ in curves["validation"]] == [5, STEPS]
    assert saved["adamw"]["curves"]["loss"][0] == saved["soap"]["curves"]["loss"][0]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("soap", asteria.SOAP),
        ("klshampoo", asteria.KLShampoo),
        ("klsoap", asteria.KLSOAP),
    ],
)
def test_a_name_stands_for_one_optimizer(name: str, kind: type) -> None:
    optimizer = train_gpt.make_optimizer(name, torch.nn.Linear(2, 2), lr=0.25)
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["weight_decay"] == 0.01


def test_the_period_reaches_the_optimizer(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, "--optimizers", "soap", "adamw", "--period", "3")
    (group,) = checkpoint(tmp_path / "soap.pt")["optimizer"]["param_groups"]
    assert group["precondition_frequency"] == 3


def test_without_adamw_there_is_nothing_to_reach(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(text, tmp_path, "--optimizers", "soap")
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("SOAP "))
    assert row.split()[2:4] == ["-", "-"]


@pytest.mark.parametrize("name", ["adamw", "soap", "klshampoo", "klsoap"])
def test_a_killed_run_continues_and_ends_with_the_same_bits(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(text, tmp_path / "whole", "--optimizers", name, "--period", "3")

    def killed(*args: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(text, tmp_path / "parts", "--optimizers", name, "--period", "3")
    assert len(checkpoint(tmp_path / "parts" / f"{name}.pt")["curves"]["loss"]) == 4
    train(text, tmp_path / "parts", "--optimizers", name, "--period", "3")
    whole, parts = (checkpoint(tmp_path / where / f"{name}.pt") for where in ("whole", "parts"))
    assert whole["curves"]["loss"] == parts["curves"]["loss"]
    assert whole["curves"]["final"] == parts["curves"]["final"]
    assert whole["scheduler"]["last_epoch"] == parts["scheduler"]["last_epoch"] == STEPS
    for key, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][key]), key


def logged(folder: Path) -> dict[str, list[int]]:
    """The steps at which each scalar below ``folder`` was logged."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_though_the_run_was_killed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--optimizers", "adamw", "soap", "--tensorboard", str(tmp_path / "board"))

    def killed(*args: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(text, tmp_path, *more)
    train(text, tmp_path, *more)
    adamw, soap = (logged(tmp_path / "board" / name) for name in ("adamw", "soap"))
    assert adamw == {"loss": list(range(STEPS))}
    assert soap["loss"] == soap["asteria/waits"] == list(range(STEPS))


def test_an_optimizer_is_closed_even_if_its_run_is_killed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def close(optimizer: torch.optim.Optimizer) -> None:
        closed.append(optimizer)

    def killed(*args: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(asteria.SOAP, "close", close, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(text, tmp_path, "--optimizers", "soap")
    assert len(closed) == 1
    train(text, tmp_path, "--optimizers", "soap", "adamw")
    assert len(closed) == 2


def test_a_finished_optimizer_is_not_run_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(text, tmp_path, "--optimizers", "adamw")
    monkeypatch.setattr(train_gpt.GPT, "forward", None)
    train(text, tmp_path, "--optimizers", "adamw")


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--lr", "adamw=0.5"], "lr 0.008, not 0.5"),
        (["--steps", "9"], "steps 8, not 9"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    more: list[str], found: str, text: Path, tmp_path: Path
) -> None:
    train(text, tmp_path, "--optimizers", "adamw")
    before = (tmp_path / "adamw.pt").read_bytes()
    with pytest.raises(SystemExit, match=found):
        train(text, tmp_path, "--optimizers", "adamw", *more)
    assert (tmp_path / "adamw.pt").read_bytes() == before


def test_a_checkpoint_of_another_text_is_refused(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, "--optimizers", "adamw")
    text.write_text("something else entirely\n" * 80)
    with pytest.raises(SystemExit, match=r"adamw\.pt has text \d+, not \d+"):
        train(text, tmp_path, "--optimizers", "adamw")


def test_misuse_is_refused_before_anything_is_trained(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(text, tmp_path / "out", "--lr", "sgd=1")
    assert "--lr knows adamw, soap" in capsys.readouterr().err
    text.write_text("too short")
    with pytest.raises(SystemExit):
        train(text, tmp_path / "out")
    assert "are too few" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
