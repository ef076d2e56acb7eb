"""Second-order optimizers for PyTorch that anyone can switch on.

Replace ``torch.optim.AdamW`` by `SOAP`, `KLShampoo` or `KLSOAP`; nothing else changes.
"""

from asteria.checkpoint.slim import slim
from asteria.config.runtime import RuntimeConfig
from asteria.errors import (
    AsteriaError,
    CheckpointError,
    CoherenceError,
    ConfigError,
    GradientError,
    NonFiniteGradientError,
    ParameterChangedError,
    RefreshError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
)
from asteria.optim.kl import KLSOAP, KLShampoo
from asteria.optim.logging import logging_dict
from asteria.optim.planning import plan
from asteria.optim.soap import SOAP
from asteria.version import __version__

__all__ = [
    "KLSOAP",
    "SOAP",
    "AsteriaError",
    "CheckpointError",
    "CoherenceError",
    "ConfigError",
    "GradientError",
    "KLShampoo",
    "NonFiniteGradientError",
    "ParameterChangedError",
    "RefreshError",
    "RuntimeConfig",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "__version__",
    "logging_dict",
    "plan",
    "slim",
]
