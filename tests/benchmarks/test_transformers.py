"""The decoders have the shapes of the published models, and train."""

from collections import Counter

import pytest
import torch

from benchmarks.shapes import gpt2, llama_1b
from benchmarks.transformers import SIZES, Decoder


@pytest.mark.parametrize(("name", "table"), [("gpt2", gpt2()), ("llama-1b", llama_1b())])
def test_shapes_are_those_of_the_table(name: str, table: object) -> None:
    """Weights lie the other way round in some models."""
    with torch.device("meta"):
        model = Decoder(SIZES[name])
    assert Counter(tuple(sorted(p.shape)) for p in model.parameters()) == Counter(
        tuple(sorted(shape))
        for shape in table.shapes()  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_decoder_learns_a_sequence_by_heart(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = Decoder(SIZES["tiny"], checkpointed=checkpointed)
    tokens = torch.randint(64, (2, 17))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.no_grad():
        first = float(model(tokens))
    for _ in range(20):
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(model(tokens)) < first / 2


def test_no_token_sees_a_later_one() -> None:
    torch.manual_seed(0)
    model = Decoder(SIZES["tiny"]).layers[0]
    x = torch.randn(1, 5, 16)
    changed = x.clone()
    changed[:, 3:] += 1
    assert torch.equal(model(x)[:, :3], model(changed)[:, :3])
