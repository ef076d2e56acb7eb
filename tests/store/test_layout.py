"""How fields lie in one piece of memory."""

import math

import pytest
import torch

from asteria.store.layout import FieldSpec, Layout, Life

FIELDS = [FieldSpec("moment", (3, 4)), FieldSpec("root", (3,)), FieldSpec("scale", ())]


def memory(layout: Layout) -> torch.Tensor:
    return torch.zeros(layout.nbytes, dtype=torch.uint8)


@pytest.mark.parametrize("blocks", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_field_is_one_dense_tensor(blocks: int, dtype: torch.dtype) -> None:
    layout = Layout(FIELDS, blocks, dtype)
    fields = layout.views(memory(layout))
    assert list(fields) == ["moment", "root", "scale"]
    for spec in FIELDS:
        field = fields[spec.name]
        assert field.shape == (blocks, *spec.shape)
        assert field.dtype == dtype
        assert field.is_contiguous()
        assert not field.any()


@pytest.mark.parametrize("blocks", [1, 5])
def test_fields_share_no_byte_and_begin_at_cache_lines(blocks: int) -> None:
    layout = Layout(FIELDS, blocks, torch.float32)
    whole = memory(layout)
    fields = layout.views(whole)
    for number, field in enumerate(fields.values(), start=1):
        field.fill_(number)
        assert (field.data_ptr() - whole.data_ptr()) % 64 == 0
    for number, field in enumerate(fields.values(), start=1):
        assert bool((field == number).all())
    used = sum(4 * blocks * math.prod(spec.shape) for spec in FIELDS)
    assert used <= layout.nbytes < used + 64 * len(FIELDS)


def test_a_matrix_by_columns_is_dense_when_transposed() -> None:
    layout = Layout([FieldSpec("basis", (3, 4), by_columns=True)], 2, torch.float32)
    (basis,) = layout.views(memory(layout)).values()
    assert basis.shape == (2, 4, 3)
    assert basis.mT.is_contiguous()


def test_what_is_written_to_the_memory_is_seen_in_the_fields() -> None:
    layout = Layout(FIELDS, 2, torch.float32)
    whole = memory(layout)
    fields = layout.views(whole)
    fields["root"].fill_(7)
    again = layout.views(whole.clone())
    assert again["root"].tolist() == [[7.0] * 3] * 2


def test_fields_live_for_the_step_unless_they_say_otherwise() -> None:
    assert FieldSpec("moment", ()).life is Life.STEP
