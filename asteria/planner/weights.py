"""The parameters that a plan is made for, from whatever describes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from asteria.errors import ConfigError
from asteria.planner.architectures import MODELS, NamedShape, config_shapes, known_as, model_config
from asteria.runtime.records import state_dtype

__all__ = ["Described", "Weight", "weights_of"]

Described: TypeAlias = (
    nn.Module
    | str
    | os.PathLike[str]
    | Mapping[str, Any]
    | Iterable[tuple[str, Sequence[int]]]
    | Iterable[Sequence[int]]
)
"""A module on any device, "gpt2" and the like, a config.json or its content, or shapes."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter, as far as its state depends on it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype = torch.float32
    """Of the state."""


def weights_of(model: Described) -> tuple[str, list[Weight]]:
    """(what the model is called, its trainable parameters in order). Allocates no tensors.

    Raises ConfigError for an unknown name, a file that cannot be read, a configuration that lacks
    sizes, and for what is none of these. Any thread.
    """
    if isinstance(model, nn.Module):
        return type(model).__name__, _module_weights(model)
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        if str(model) in MODELS or not (path.suffix == ".json" or path.is_dir()):
            return str(model), _named(config_shapes(model_config(str(model))))
        config = _read(path / "config.json" if path.is_dir() else path)
        return known_as(str(model), config), _named(config_shapes(config))
    if isinstance(model, Mapping):
        return known_as("configuration", model), _named(config_shapes(model))
    return "shapes", _shapes(model)


def _module_weights(model: nn.Module) -> list[Weight]:
    weights = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ConfigError(
                f"{name}: its shape is not known before the first forward pass (a lazy module); "
                "run one, or give (name, shape) pairs"
            )
        if parameter.requires_grad:
            weights.append(Weight(name, parameter.shape, state_dtype(parameter)))
    if not weights:
        raise ConfigError(
            f"a model with trainable parameters was needed, found none in {type(model).__name__}: "
            "unfreeze some"
        )
    return weights


def _named(shapes: Iterable[NamedShape]) -> list[Weight]:
    return [Weight(name, torch.Size(shape)) for name, shape in shapes]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a Hugging Face config.json was to be read from {path}, found {error}: give the path "
            "of one, or the name of a model"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: a config.json holds an object, found {type(content).__name__}: give the path "
            "of a Hugging Face config.json"
        )
    return content


def _shapes(given: Iterable[tuple[str, Sequence[int]]] | Iterable[Sequence[int]]) -> list[Weight]:
    wanted = (
        "a model, the name of one, a Hugging Face config.json, shapes or (name, shape) pairs "
        "were needed, found"
    )
    if not isinstance(given, Iterable):
        raise ConfigError(f"{wanted} {type(given).__name__}")
    weights = []
    for number, entry in enumerate(given):
        name, shape = _name_and_shape(number, entry)
        sizes = isinstance(shape, Sequence) and not isinstance(shape, str)
        if not sizes or any(
            isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape
        ):
            raise ConfigError(f"{wanted} {entry!r}: a shape is a sequence of ints >= 0")
        weights.append(Weight(name, torch.Size(shape)))
    if not weights:
        raise ConfigError(f"{wanted} nothing: give at least one shape")
    return weights


def _name_and_shape(number: int, entry: Any) -> tuple[str, Any]:
    if isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str):
        return entry[0], entry[1]
    return f"parameter {number}", entry
