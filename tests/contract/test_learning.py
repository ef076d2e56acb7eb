"""The point of it all: a module with every kind of layer learns, in every dtype."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.arms import ALL_ARMS, ARMS, Arm, over_arms
from tests.support.training import weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Regression(nn.Module):
    """Tokens to a number, through an embedding, a convolution, a norm, experts and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.convolution = nn.Conv1d(6, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.head = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.convolution(self.embedding(tokens).mT).mean(-1)
        x = torch.tanh(self.norm(x) @ self.experts).sum(0)
        result: Tensor = self.scale * self.head(x).squeeze(-1)
        return result


def losses(arm: Arm, dtype: torch.dtype, steps: int, **options: object) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 8, (32, 5), generator=generator)
    target = (tokens.double() - 3.5).sum(-1).div(4).to(dtype)
    model = Regression().to(dtype)
    start = weights(model.parameters())
    optimizer = arm(model.parameters(), lr=0.02, precondition_frequency=5, **options)
    recorded = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(tokens) - target).square().mean()
        loss.backward()
        optimizer.step()
        recorded.append(loss.item())
    moved = [not torch.equal(w, start[k]) for k, w in weights(model.parameters()).items()]
    assert all(moved)
    return recorded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_arms
def test_regression_is_learned(arm: Arm, dtype: torch.dtype) -> None:
    recorded = losses(arm, dtype, 40)
    assert sum(recorded[-5:]) < 0.2 * sum(recorded[:5])


@pytest.mark.parametrize("arm", ALL_ARMS[len(ARMS) :], ids=lambda arm: arm.name)
def test_regression_is_learned_from_other_starts(arm: Arm) -> None:
    recorded = losses(arm, torch.float32, 40)
    assert sum(recorded[-5:]) < 0.2 * sum(recorded[:5])


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_grads": True},
        {"large_dims": "blocks", "max_precond_dim": 4},
        {"max_precond_dim": 1},
        {"weight_decay": 0.1, "betas": (0.5, 0.9)},
    ],
    ids=lambda options: next(iter(options)),
)
@over_arms
def test_regression_is_learned_under_options(arm: Arm, options: dict[str, object]) -> None:
    recorded = losses(arm, torch.float32, 30, **options)
    assert sum(recorded[-5:]) < 0.3 * sum(recorded[:5])
