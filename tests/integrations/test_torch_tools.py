"""What torch itself puts around a model or an optimizer."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.profiler import ProfilerActivity, profile

from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.telemetry import phases
from tests.integrations.settings import OPTIONS, STEPS, build, network, rows
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.training import Bits, assert_same_bits, everything, weights

Batch = tuple[Tensor, ...]

pytestmark = [
    # torch's own, when its compiler and its distributed optimizers are imported.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def backward(model: nn.Module, batch: Batch) -> None:
    """Gradients of the mean squared error."""
    x, y = batch
    nn.functional.mse_loss(model(x), y).backward()


def plain_run(name: str) -> tuple[nn.Module, SecondOrderOptimizer]:
    """A model and its optimizer after the plain loop."""
    model = network()
    optimizer = build(name, model.parameters())
    for batch in rows(STEPS):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    return model, optimizer


BETA = 0.75
AVERAGES = {
    "SWA": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(BETA)},
}


@pytest.mark.parametrize("average", AVERAGES)
@over_optimizers
def test_averaged_weights_are_those_of_the_steps(name: str, average: str) -> None:
    """Averaging reads the weights and disturbs nobody."""
    model = network()
    optimizer = build(name, model.parameters())
    averaged = AveragedModel(model, **AVERAGES[average])
    wanted: list[Tensor] = []
    for step, batch in enumerate(rows(STEPS)):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        averaged.update_parameters(model)
        now = [p.detach().double() for p in model.parameters()]
        share = 1 - BETA if average == "EMA" else 1 / (step + 1)
        wanted = [w + share * (p - w) for w, p in zip(wanted or now, now, strict=True)]
    for actual, expected in zip(averaged.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    assert_same_bits(everything(optimizer), everything(plain_run(name)[1]))


@over_optimizers
def test_stochastic_weight_averaging_from_end_to_end(name: str) -> None:
    """SWALR, the average, and its batch statistics, as in torch's documentation."""
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(copy.deepcopy(layer) for layer in layers))
    optimizer = build(name, model.parameters())
    schedule, averaged = SWALR(optimizer, swa_lr=2.0**-8, anneal_epochs=4), AveragedModel(model)
    losses = []
    for epoch in range(6):
        for x, y in rows(8):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch >= 2:
            averaged.update_parameters(model)
            schedule.step()
    update_bn(rows(8), averaged)
    averaged.eval()
    with torch.no_grad():
        final = [nn.functional.mse_loss(averaged(x), y).item() for x, y in rows(8)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0**-8)
    assert sum(final) < 0.9 * sum(losses[:8])


def follows_compiled(name: str, backend: str) -> None:
    """The run of a compiled model is that of its gradients."""
    model, replayed = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer, plain = (build(name, m.parameters()) for m in (compiled, replayed))
    for batch in rows(STEPS):
        optimizer.zero_grad()
        backward(compiled, batch)
        for p, q in zip(model.parameters(), replayed.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    assert_same_bits(everything(optimizer), everything(plain))
    assert not torch.equal(model[0].weight, network()[0].weight)


@over_optimizers
def test_compiled_models(name: str) -> None:
    follows_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_model_of_the_default_compiler() -> None:
    follows_compiled("SOAP", "inductor")


@over_optimizers
def test_the_profiler_shows_every_step(name: str) -> None:
    model = network()
    optimizer = build(name, model.parameters())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in rows(4):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls[f"Optimizer.step#{name}.step"] == 4
    assert calls[f"Optimizer.zero_grad#{name}.zero_grad"] == 4


PHASES = {"update", "first_bases", "refresh", "launch", "wait", "install", "acquire"}


def test_the_profiler_names_the_phases_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    runtime = RuntimeConfig(host_budget=0, nvme_path=tmp_path)
    optimizer = build("SOAP", model.parameters(), runtime=runtime)

    def train(steps: int) -> None:
        for batch in rows(steps):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train(24)
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert {key.partition(".")[2] for key in calls if key.startswith("asteria.")} == PHASES
    assert calls["asteria.wait"] == 24
    assert calls["asteria.update"] >= 24

    def unused(*_: object) -> None:
        raise AssertionError("nobody looks")

    monkeypatch.setattr(phases, "record_function", unused)
    train(3)
    optimizer.close()


class Lookahead(torch.optim.Optimizer):
    """Around another optimizer: every so many steps its weights are pulled back half way.

    Zhang et al., Lookahead Optimizer: k steps forward, 1 step back (arXiv 1907.08610).
    """

    def __init__(self, inner: torch.optim.Optimizer, every_steps: int) -> None:
        self.inner, self.every_steps, self.taken = inner, every_steps, 0
        super().__init__(inner.param_groups, inner.defaults)
        for p in self.all():
            self.state[p]["slow"] = p.detach().clone()

    def all(self) -> Iterator[nn.Parameter]:
        return (p for group in self.inner.param_groups for p in group["params"])

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.taken += 1
        if self.taken % self.every_steps == 0:
            for p in self.all():
                self.state[p]["slow"].lerp_(p.detach(), 0.5)
                p.data.copy_(self.state[p]["slow"])
        return loss


@over_optimizers
def test_an_optimizer_around_it_may_move_the_weights(name: str) -> None:
    model, by_hand = network(), network()
    wrapper = Lookahead(build(name, model.parameters()), 5)
    optimizer = build(name, by_hand.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (wrapper, optimizer)]
    slow = [p.detach().clone() for p in by_hand.parameters()]
    for number, batch in enumerate(rows(STEPS), start=1):
        for net, stepped in ((model, wrapper), (by_hand, optimizer)):
            stepped.zero_grad()
            backward(net, batch)
            stepped.step()
        for schedule in schedules:
            schedule.step()
        if number % 5 == 0:
            with torch.no_grad():
                for p, s in zip(by_hand.parameters(), slow, strict=True):
                    p.copy_(s.lerp_(p, 0.5))
    assert_same_bits(weights(model.parameters()), weights(by_hand.parameters()))


@over_optimizers
def test_steps_may_be_made_inside_the_backward_pass(name: str) -> None:
    """One optimizer for each parameter, whose gradient is gone as soon as it has been used."""

    def run(*, inside: bool) -> Bits:
        model = network()
        own = {p: build(name, [p]) for p in model.parameters()}

        def step(p: nn.Parameter) -> None:
            own[p].step()
            own[p].zero_grad()

        for p in own if inside else ():
            p.register_post_accumulate_grad_hook(step)
        for batch in rows(STEPS):
            backward(model, batch)
            if inside:
                assert all(p.grad is None for p in own)
            else:
                for p in own:
                    step(p)
        return weights(model.parameters())

    assert_same_bits(run(inside=True), run(inside=False))


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@over_optimizers
def test_zero_redundancy_optimizer_of_one_process(name: str) -> None:
    # Its import warns of torch.jit, which only a test may let pass.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    models = [network(), network()]
    saved, resumed = (
        ZeroRedundancyOptimizer(m.parameters(), optimizer_class=OPTIMIZERS[name], **OPTIONS)
        for m in models
    )
    for step, batch in enumerate(rows(STEPS)):
        if step == STEPS // 2:
            saved.consolidate_state_dict()
            models[1].load_state_dict(models[0].state_dict())
            resumed.load_state_dict(saved.state_dict())
        model, optimizer = (models[0], saved) if step < STEPS // 2 else (models[1], resumed)
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert_same_bits(weights(models[1].parameters()), weights(plain_run(name)[0].parameters()))


@pytest.mark.parametrize("whole", [False, True], ids=["step", "loop"])
@over_optimizers
def test_the_step_may_stand_in_what_is_compiled(name: str, whole: bool) -> None:
    model = network()
    optimizer = build(name, model.parameters())

    def train(batch: Batch) -> None:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    loop = train
    if whole:
        loop = torch.compile(train, backend="eager")
    else:
        optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
    for batch in rows(STEPS):
        loop(batch)
    assert_same_bits(everything(optimizer), everything(plain_run(name)[1]))
