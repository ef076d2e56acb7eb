"""Names, configurations, modules and shapes become the parameters they stand for."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asteria import ConfigError, plan
from asteria.planner.architectures import MODELS
from asteria.planner.machine import Machine
from asteria.planner.weights import weights_of

# As their authors count them.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
}


def decoder(kind: str, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": kind,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return config | changes


CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "Mistral 7B": (decoder("mistral"), 7_241_732_096),
    "Qwen2 7B": (
        decoder(
            "qwen2",
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
        7_615_616_512,
    ),
    "Qwen3 8B": (
        decoder(
            "qwen3", intermediate_size=12288, num_hidden_layers=36, head_dim=128, vocab_size=151936
        ),
        8_190_735_360,
    ),
    "an unknown kind with the same keys": (decoder("newest"), 7_241_732_096),
}


def count(model: Any) -> int:
    return sum(math.prod(weight.shape) for weight in weights_of(model)[1])


def test_the_table_is_known() -> None:
    assert MODELS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_of_the_table_has_all_its_parameters(name: str) -> None:
    weights = weights_of(name)[1]
    assert sum(math.prod(weight.shape) for weight in weights) == PARAMETERS[name]
    assert len({weight.name for weight in weights}) == len(weights)


@pytest.mark.parametrize("name", ["LLAMA-3-8B", "meta-llama/Llama_3-8b"])
def test_names_are_read_with_goodwill(name: str) -> None:
    assert count(name) == PARAMETERS["llama-3-8b"]


@pytest.mark.parametrize(("name", "near"), [("gtp2", "gpt2"), ("llama-3-9b", "llama-3-8b")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*did you mean .*{near}.*config.json"):
        plan(name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", [dict, "file", "folder"])
def test_a_configuration(name: str, way: Any, tmp_path: Path) -> None:
    config, parameters = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"file": tmp_path / "config.json", "folder": str(tmp_path)}.get(way, config)
    assert count(given) == parameters


def test_what_is_guessed_is_said() -> None:
    assert "'newest', read as Llama" in weights_of(decoder("newest"))[0]
    assert "read as" not in weights_of(decoder("llama"))[0]


def test_biases_and_tied_heads() -> None:
    plain = count(decoder("llama"))
    assert count(decoder("llama", tie_word_embeddings=True)) == plain - 32000 * 4096
    with_bias = count(decoder("llama", attention_bias=True, mlp_bias=True))
    assert with_bias - plain == 32 * ((2 * 4096 + 2 * 1024) + (2 * 14336 + 4096))
    untied = {**MODELS["gpt2"], "tie_word_embeddings": False, "n_inner": 1000}
    shapes = {w.name: tuple(w.shape) for w in weights_of(untied)[1]}
    assert shapes["lm_head.weight"] == (50257, 768)
    assert shapes["transformer.h.11.mlp.c_fc.weight"] == (768, 1000)


def test_missing_sizes_are_named_all_at_once() -> None:
    config = decoder("t5")
    del config["intermediate_size"], config["num_hidden_layers"]
    with pytest.raises(ConfigError, match=r"'t5' without intermediate_size, num_hidden_layers"):
        plan(config)
    with pytest.raises(ConfigError, match="without n_embd, n_layer, n_positions, vocab_size"):
        plan({"model_type": "gpt2"})


@pytest.mark.parametrize("value", [0, -3, "4096", 40.5, True])
def test_a_size_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=f"hidden_size must be an int >= 1, found {value!r}"):
        plan(decoder("llama", hidden_size=value))


def test_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_local_experts.*meta device"):
        plan(decoder("mixtral", num_local_experts=8))


WRONG_FILES: dict[str, Callable[[Path], object]] = {
    "no file": lambda path: None,
    "no JSON": lambda path: path.write_text("{"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "no object": lambda path: path.write_text("[1, 2]"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_that_cannot_be_read_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    WRONG_FILES[kind](path)
    with pytest.raises(ConfigError, match="config.json") as raised:
        plan(path)
    assert str(path) in str(raised.value)


def test_shapes_with_and_without_names() -> None:
    weights = weights_of([(4, 3), ("b", [5]), ("c", torch.Size([2, 2])), ()])[1]
    assert [(w.name, tuple(w.shape)) for w in weights] == [
        ("parameter 0", (4, 3)),
        ("b", (5,)),
        ("c", (2, 2)),
        ("parameter 3", ()),
    ]


@pytest.mark.parametrize("wrong", [3, None, [], [5], ["ab"], [(4, -1)], [("a", 3)], [(4, 1.5)]])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="were needed"):
        plan(wrong)


def test_a_module_counts_what_it_trains_and_shares_what_is_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = nn.Parameter(torch.zeros(4, 3))
    model.append(nn.Linear(3, 4))
    model[2].weight = model[1].weight
    model[0].bias.requires_grad_(False)
    assert count(model) == 12 + 12 + 4
    with pytest.raises(ConfigError, match="trainable"):
        plan(model.requires_grad_(False))


def test_a_lazy_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch call them new
        lazy = nn.LazyLinear(3)
    with pytest.raises(ConfigError, match="weight: its shape is not known"):
        plan(lazy)


def test_state_of_float64_is_twice_as_large() -> None:
    single = plan(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), machine=Machine())
    double = plan(nn.Linear(64, 64, bias=False, dtype=torch.float64), machine=Machine())
    assert double.memory.state_bytes == 2 * single.memory.state_bytes
