"""From the configuration of a language model to the names and shapes of its parameters."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from asteria.errors import ConfigError

__all__ = ["MODELS", "NamedShape", "config_shapes", "known_as", "model_config"]

NamedShape: TypeAlias = tuple[str, tuple[int, ...]]

_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def _gpt2(width: int, layers: int) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", **sizes}


def _decoder(kind: str, width: int, inner: int, layers: int, *, vocab: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(768, 12),
    "gpt2-medium": _gpt2(1024, 24),
    "gpt2-large": _gpt2(1280, 36),
    "gpt2-xl": _gpt2(1600, 48),
    "llama-2-7b": _decoder("llama", 4096, 11008, 32, vocab=32000),
    "llama-2-70b": _decoder("llama", 8192, 28672, 80, vocab=32000) | {"num_key_value_heads": 8},
    "llama-3-8b": _decoder("llama", 4096, 14336, 32, vocab=128256) | {"num_key_value_heads": 8},
    "llama-3-70b": _decoder("llama", 8192, 28672, 80, vocab=128256) | {"num_key_value_heads": 8},
    "llama-3.2-1b": _decoder("llama", 2048, 8192, 16, vocab=128256)
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "olmo-2-1b": _decoder("olmo2", 2048, 8192, 16, vocab=100352),
    "olmo-2-7b": _decoder("olmo2", 4096, 11008, 32, vocab=100352),
}
"""Name -> what its authors' ``config.json`` says of its shapes."""


def model_config(name: str) -> Mapping[str, Any]:
    """The configuration of a model in the table; case, ``_`` and an organisation do not matter.

    Raises ConfigError with the nearest names for one that is not there.
    """
    known = name.lower().replace("_", "-").rpartition("/")[-1]
    if known in MODELS:
        return MODELS[known]
    near = difflib.get_close_matches(known, MODELS, n=3, cutoff=0.4)
    raise ConfigError(
        f"a model named {name!r} was asked for, which is not in the table: "
        + (f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + f"There are {', '.join(MODELS)}; for any other give a Hugging Face config.json, or the "
        "model itself on the meta device"
    )


def known_as(name: str, config: Mapping[str, Any]) -> str:
    """``name``, and how its configuration is understood if its ``model_type`` is not known."""
    kind = config.get("model_type")
    if kind in (*_DECODERS, "gpt2"):
        return name
    return f"{name} (model_type {kind!r}, read as {'GPT-2' if _is_gpt2(config) else 'Llama'})"


def _is_gpt2(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "gpt2" or ("n_embd" in config and "n_layer" in config)


def config_shapes(config: Mapping[str, Any]) -> list[NamedShape]:
    """(name, shape) of every parameter, in the order of the model; tied ones once.

    Understands GPT-2 and decoders of Llama's kind (``model_type`` of llama, mistral, qwen2, qwen3,
    olmo2, or any that has their keys). Raises ConfigError that names the keys which are missing or
    are no sizes, and for mixtures of experts.
    """
    found = [key for key in _EXPERTS if config.get(key)]
    if found:
        raise ConfigError(
            f"a configuration of a dense model was needed, found {', '.join(found)}: how experts "
            "are stored differs from model to model; give the model itself on the meta device"
        )
    layout: Callable[[_Sizes], Iterator[NamedShape]] = (
        _gpt2_shapes if _is_gpt2(config) else _decoder_shapes
    )
    sizes = _Sizes(config)
    shapes = list(layout(sizes))
    if sizes.missing:
        raise ConfigError(
            f"a configuration with the sizes of a model was needed, found model_type "
            f"{config.get('model_type')!r} without {', '.join(sorted(sizes.missing))}: only GPT-2 "
            f"and decoders of Llama's kind ({', '.join(_DECODERS)}) are known by their "
            "configuration; give the model itself on the meta device"
        )
    return shapes


class _Sizes:
    """Reads sizes, and remembers which are missing, so that one error can name all of them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.kind = config.get("model_type")
        self.missing: set[str] = set()

    def of(self, *keys: str, default: int | None = None) -> int:
        """The first of the keys that is there; 1 for one that is missing."""
        key = next((key for key in keys if self._config.get(key) is not None), None)
        if key is None:
            if default is None:
                self.missing.add(keys[0])
            return 1 if default is None else default
        value = self._config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key} must be an int >= 1, found {value!r}: correct the config")
        return value

    def says(self, key: str, *, default: bool) -> bool:
        return bool(self._config.get(key, default))


def _gpt2_shapes(sizes: _Sizes) -> Iterator[NamedShape]:
    width, vocab = sizes.of("n_embd"), sizes.of("vocab_size")
    inner = sizes.of("n_inner", default=4 * width)
    yield "transformer.wte.weight", (vocab, width)
    yield "transformer.wpe.weight", (sizes.of("n_positions", "n_ctx"), width)
    # Stored as (inputs, outputs).
    products = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    norms = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}
    for layer in range(sizes.of("n_layer")):
        block = f"transformer.h.{layer}"
        for name, shape in products.items():
            if name in norms:
                yield from _norm(f"{block}.{norms[name]}", width)
            yield f"{block}.{name}.weight", shape
            yield f"{block}.{name}.bias", shape[1:]
    yield from _norm("transformer.ln_f", width)
    if not sizes.says("tie_word_embeddings", default=True):
        yield "lm_head.weight", (vocab, width)


def _norm(name: str, width: int) -> Iterator[NamedShape]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _decoder_shapes(sizes: _Sizes) -> Iterator[NamedShape]:
    width, vocab = sizes.of("hidden_size"), sizes.of("vocab_size")
    inner, heads = sizes.of("intermediate_size"), sizes.of("num_attention_heads")
    each = sizes.of("head_dim", default=max(1, width // heads))
    queries = heads * each
    keys = sizes.of("num_key_value_heads", default=heads) * each
    olmo = sizes.kind == "olmo2"
    qkv_bias = sizes.says("attention_bias", default=sizes.kind == "qwen2")
    o_bias = sizes.says("attention_bias", default=False)
    mlp_bias = sizes.says("mlp_bias", default=False)
    yield "model.embed_tokens.weight", (vocab, width)
    for layer in range(sizes.of("num_hidden_layers")):
        block = f"model.layers.{layer}"
        for name, shape, bias in (
            ("self_attn.q_proj", (queries, width), qkv_bias),
            ("self_attn.k_proj", (keys, width), qkv_bias),
            ("self_attn.v_proj", (keys, width), qkv_bias),
            ("self_attn.o_proj", (width, queries), o_bias),
            ("mlp.gate_proj", (inner, width), mlp_bias),
            ("mlp.up_proj", (inner, width), mlp_bias),
            ("mlp.down_proj", (width, inner), mlp_bias),
        ):
            yield f"{block}.{name}.weight", shape
            if bias:
                yield f"{block}.{name}.bias", shape[:1]
        if olmo or sizes.kind == "qwen3":
            yield f"{block}.self_attn.q_norm.weight", (queries if olmo else each,)
            yield f"{block}.self_attn.k_norm.weight", (keys if olmo else each,)
        first = "post_attention_layernorm" if olmo else "input_layernorm"
        second = "post_feedforward_layernorm" if olmo else "post_attention_layernorm"
        yield f"{block}.{first}.weight", (width,)
        yield f"{block}.{second}.weight", (width,)
    yield "model.norm.weight", (width,)
    if not sizes.says("tie_word_embeddings", default=False):
        yield "lm_head.weight", (vocab, width)
