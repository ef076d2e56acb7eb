"""Stacks: one zeroed tensor per field, and windows that are views."""

import dataclasses

import pytest
import torch

from asteria.store.stack import FieldSpec, Stack

FIELDS = [FieldSpec("moment", (3, 4)), FieldSpec("root", (3,)), FieldSpec("scale", ())]
CPU = torch.device("cpu")


def stack(blocks: int = 5, dtype: torch.dtype = torch.float32) -> Stack:
    return Stack(FIELDS, blocks, dtype, CPU)


@pytest.mark.parametrize("blocks", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_field_is_one_zeroed_contiguous_tensor(blocks: int, dtype: torch.dtype) -> None:
    made = stack(blocks, dtype)
    assert (made.blocks, made.dtype, made.device) == (blocks, dtype, CPU)
    assert list(made.fields) == ["moment", "root", "scale"]
    for spec in FIELDS:
        field = made.fields[spec.name]
        assert field.shape == (blocks, *spec.shape)
        assert field.dtype == dtype
        assert field.is_contiguous()
        assert not field.any()


def test_a_window_is_a_view_of_its_blocks_and_no_others() -> None:
    made = stack()
    for tensor in made.fields.values():
        tensor += torch.arange(5.0).view(5, *[1] * (tensor.dim() - 1))
    window = made.window(1, 3)
    assert window.keys() == made.fields.keys()
    for name, view in window.items():
        whole = made.fields[name]
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert view.data_ptr() == whole[1].data_ptr()
        assert view.is_contiguous()
        assert torch.equal(view, whole[1:3])
        view.fill_(-1)
        assert [bool((block == -1).all()) for block in whole] == [False, True, True, False, False]


def test_what_is_written_to_the_stack_is_seen_in_a_window_that_was_there_before() -> None:
    made = stack()
    window = made.window(4, 5)
    made.fields["root"][4] = 7
    assert window["root"].tolist() == [[7.0, 7.0, 7.0]]


def test_an_empty_window() -> None:
    assert {name: tuple(view.shape) for name, view in stack().window(2, 2).items()} == {
        "moment": (0, 3, 4),
        "root": (0, 3),
        "scale": (0,),
    }


def test_stacks_share_nothing() -> None:
    first, second = stack(), stack()
    first.fields["root"].fill_(1)
    assert not second.fields["root"].any()


def test_a_field_is_a_value() -> None:
    assert FieldSpec("a", (2,)) == FieldSpec("a", (2,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        FIELDS[0].name = "b"  # type: ignore[misc]
