from __future__ import annotations

import math

import pytest

from benchmarks.shapes import TABLES, cut, factor_dims, fit, soap_state_bytes

ALL = list(TABLES.values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt-nano", 869_504),
        ("gpt-micro", 328_000),
        ("gpt2", 124_439_808),
        ("llama-1b", 1_235_814_400),
    ],
)
def test_the_totals_are_those_of_the_models(name: str, parameters: int) -> None:
    assert TABLES[name].parameters() == parameters


def test_gpt_nano_holds_the_shapes_of_the_example() -> None:
    assert TABLES["gpt-nano"].counts() == {
        (256, 128): 2,
        (128, 128): 17,
        (512, 128): 4,
        (128, 512): 4,
        (128,): 9,
    }


def test_gpt2_holds_twelve_layers_with_biases() -> None:
    assert TABLES["gpt2"].counts() == {
        (50257, 768): 1,
        (1024, 768): 1,
        (768, 2304): 12,
        (768, 768): 12,
        (768, 3072): 12,
        (3072, 768): 12,
        (2304,): 12,
        (3072,): 12,
        (768,): 12 * 6 + 2,
    }


def test_llama_holds_eight_key_value_heads_and_one_tied_embedding() -> None:
    assert TABLES["llama-1b"].counts() == {
        (128256, 2048): 1,
        (2048, 2048): 32,
        (512, 2048): 32,
        (8192, 2048): 32,
        (2048, 8192): 16,
        (2048,): 33,
    }


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_a_cut_above_the_total_keeps_everything(table) -> None:
    shrunk, kept = cut(table, table.parameters())
    assert shrunk == table
    assert kept == f"all of {table.name}: {table.parameters():,} parameters"


def test_a_cut_drops_whole_layers_first() -> None:
    table = TABLES["gpt2"]
    per_layer = sum(math.prod(shape) for shape in table.layer)
    limit = table.parameters() - 3 * per_layer
    assert cut(table, limit)[0].layers == 9
    assert cut(table, limit - 1)[0].layers == 8
    assert cut(table, limit - 1)[0].embeddings == table.embeddings


def test_a_cut_keeps_one_layer_and_then_drops_rows_of_the_largest_embedding() -> None:
    table = TABLES["llama-1b"]
    shrunk, kept = cut(table, 100_000_000)
    assert shrunk.layers == 1
    assert shrunk.layer == table.layer
    rows, width = shrunk.embeddings[0]
    assert width == 2048
    assert shrunk.parameters() <= 100_000_000 < shrunk.parameters() + width
    assert kept == (
        f"1 of 16 layers, {rows:,} of 128,256 rows of the embedding (128256, 2048) of llama-1b: "
        f"{shrunk.parameters():,} of 1,235,814,400 parameters"
    )


@pytest.mark.parametrize(("name", "limit"), [("gpt2", 10_000_000), ("llama-1b", 66_000_000)])
def test_a_cut_embedding_stays_one_sided(name: str, limit: int) -> None:
    table = TABLES[name]
    shrunk, _ = cut(table, limit)
    assert shrunk.embeddings != table.embeddings
    for before, after in zip(table.embeddings, shrunk.embeddings, strict=True):
        dims_before = factor_dims(before, table.max_precond_dim)
        assert len(factor_dims(after, table.max_precond_dim)) == len(dims_before)


def test_a_cut_goes_on_with_the_next_embedding() -> None:
    table = TABLES["gpt-nano"]
    shrunk, _ = cut(table, 200_000)
    assert 200_000 - 128 < shrunk.parameters() <= 200_000
    assert all(rows >= 1 for rows, _ in shrunk.embeddings)


def test_a_cut_below_one_layer_is_refused_with_the_smallest_size() -> None:
    table = TABLES["llama-1b"]
    with pytest.raises(ValueError, match="cannot be cut to 1,000,000 parameters") as caught:
        cut(table, 1_000_000)
    smallest = int(str(caught.value).split()[-6].replace(",", "").rstrip(";"))
    assert cut(table, smallest)[0].parameters() == smallest


def test_only_small_dimensions_of_matrices_have_factors() -> None:
    assert factor_dims((128,), 1000) == ()
    assert factor_dims((128, 512), 512) == (128, 512)
    assert factor_dims((128, 512), 511) == (128,)
    assert factor_dims((600, 512), 511) == ()


def test_soap_state_counts_moments_factors_and_bases() -> None:
    table, _ = cut(TABLES["gpt-nano"], 200_000)
    sides = sum(
        dim**2 for shape in table.shapes() if len(shape) == 2 for dim in shape if dim <= 200
    )
    assert soap_state_bytes(table, 200) == 4 * (2 * table.parameters() + 2 * sides)


@pytest.mark.parametrize("gib", [1, 4, 1000])
def test_fit_keeps_the_copies_below_the_allowed_bytes(gib: int) -> None:
    table, allowed_bytes = TABLES["gpt2"], gib * 2**30
    limit = fit(table, allowed_bytes, copies=3, max_precond_dim=2048)
    shrunk, _ = cut(table, limit)
    taken_bytes = 3 * (4 * shrunk.parameters() + soap_state_bytes(shrunk, 2048))
    assert taken_bytes <= allowed_bytes
    assert (shrunk == table) == (gib == 1000)


def test_fit_refuses_what_nothing_fits_into() -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        fit(TABLES["gpt2"], 1000, copies=1, max_precond_dim=2048)
