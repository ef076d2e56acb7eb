"""The routing of an optimizer as a table."""

import textwrap

import pytest
import torch

import asteria
from asteria.optim.description import Description, ParameterDescription


def row(name: str = "p", state_bytes: int = 0) -> ParameterDescription:
    return ParameterDescription(
        name=name,
        shape=(3,),
        dtype="float32",
        rule="adamw",
        blocks=(),
        factors=(),
        state_bytes=state_bytes,
    )


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def mixed() -> list[tuple[str, torch.nn.Parameter]]:
    return [
        ("embedding", parameter(40, 8, dtype=torch.bfloat16)),
        ("experts", parameter(3, 32, 32)),
        ("scale", parameter()),
        ("bias", parameter(8, dtype=torch.float64)),
    ]


def test_the_table() -> None:
    optimizer = asteria.SOAP(mixed(), max_precond_dim=32)
    assert str(optimizer.describe()) == textwrap.dedent("""\
        parameter  shape    dtype     rule   blocks     factors  state
        embedding  40x8     bfloat16  soap   1 x 40x8   8        3.0 KiB
        experts    3x32x32  float32   soap   3 x 32x32  32, 32   72.0 KiB
        scale      scalar   float32   adamw  -          -        8 B
        bias       8        float64   adamw  -          -        128 B
        total                                                    75.1 KiB""")


def test_several_block_shapes_of_a_parameter_stand_in_one_row() -> None:
    optimizer = asteria.SOAP([("head", parameter(25, 4))], max_precond_dim=10, large_dims="blocks")
    (head,) = optimizer.describe().rows
    assert head.blocks == ((1, (9, 4)), (2, (8, 4)))
    assert head.factors == ((9, 4), (8, 4))
    assert "1 x 9x4 + 2 x 8x4  9, 4 + 8, 4" in str(optimizer.describe())


@pytest.mark.parametrize("kind", [asteria.SOAP, asteria.KLShampoo, asteria.KLSOAP])
def test_rows_are_typed_and_their_bytes_are_those_of_the_state(
    kind: type[asteria.SOAP] | type[asteria.KLShampoo] | type[asteria.KLSOAP],
) -> None:
    optimizer = kind(mixed(), max_precond_dim=32)
    before = optimizer.describe()
    for _, one in mixed():
        assert tuple(one.shape) in {described.shape for described in before.rows}
    for one in optimizer.param_groups[0]["params"]:
        one.grad = torch.ones_like(one)
    optimizer.step()
    assert optimizer.describe() == before, "the same before and after the first step"
    for one, described in zip(optimizer.param_groups[0]["params"], before.rows, strict=True):
        state = optimizer.state[one]
        counted = (
            key for key in state if not key.startswith(("step", "born", "version", "shadow"))
        )
        entries = [state[key] for key in counted]
        held = sum(entry.numel() * entry.element_size() for entry in entries)
        assert held == described.state_bytes, described.name
    assert before.state_bytes == sum(described.state_bytes for described in before.rows)
    expected = {"embedding": kind.rule.name, "experts": kind.rule.name}
    assert {described.name: described.rule for described in before.rows} == {
        "embedding": expected["embedding"],
        "experts": expected["experts"],
        "scale": "adamw",
        "bias": "adamw",
    }


def test_parameters_without_a_name_are_told_by_place_and_group() -> None:
    groups = [{"params": [parameter(2), parameter(2)]}, {"params": [parameter(2)]}]
    names = [described.name for described in asteria.SOAP(groups).describe().rows]
    assert names == [
        "parameter 0 of group 0",
        "parameter 1 of group 0",
        "parameter 0 of group 1",
    ]


def test_a_group_of_its_own_options_is_described_by_them() -> None:
    groups = [
        {"params": [parameter(8, 8)], "max_precond_dim": 4},
        {"params": [parameter(8, 8)]},
        {"params": [parameter(6, 8, 8)], "batch_dims": 1},
    ]
    rows = asteria.SOAP(groups).describe().rows
    assert [described.rule for described in rows] == ["adamw", "soap", "soap"]
    assert [described.blocks for described in rows] == [(), ((1, (8, 8)),), ((6, (8, 8)),)]


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (7 * 2**40, "7.0 TiB"),
        (2**54, "16384.0 TiB"),
    ],
)
def test_bytes_are_readable(size: int, shown: str) -> None:
    description = Description((row(state_bytes=size),))
    assert [line.split("  ")[-1].strip() for line in str(description).splitlines()[1:]] == [
        shown,
        shown,
    ]


def test_columns_are_as_wide_as_they_must_be() -> None:
    lines = str(Description((row("a"), row("a_long_name")))).splitlines()
    assert len({line.index("float32") for line in lines[1:3]}) == 1
    assert not any(line.endswith(" ") for line in lines)
    assert len(lines) == 4


def test_no_parameters() -> None:
    assert Description(()).state_bytes == 0
    assert len(str(Description(())).splitlines()) == 2
