"""Everything that Asteria raises.

AsteriaError
├── ConfigError (ValueError)          an argument, option or parameter that cannot be used
├── GradientError (RuntimeError)      a gradient that cannot be used
│   └── NonFiniteGradientError        ... because it holds inf or nan
├── ParameterChangedError             a parameter no longer fits the state that was made for it
├── RefreshError (RuntimeError)       an eigenbasis could not be computed
├── StoreError (RuntimeError)         state could not be moved between tiers
│   ├── StoreFullError                ... because there is no room on a tier
│   └── StoreCorruptError             ... because what came back is not what was written
├── CoherenceError (RuntimeError)     ranks that train the same model lost each other
└── CheckpointError (ValueError)      a state that does not belong to these parameters

A message says what was asked, what was found and what to change.
"""

__all__ = [
    "AsteriaError",
    "CheckpointError",
    "CoherenceError",
    "ConfigError",
    "GradientError",
    "NonFiniteGradientError",
    "ParameterChangedError",
    "RefreshError",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
]


class AsteriaError(Exception):
    """Base of all errors of this package."""


class ConfigError(AsteriaError, ValueError):
    """An argument, option or parameter that cannot be used; nothing was changed."""


class GradientError(AsteriaError, RuntimeError):
    """A gradient that cannot be used; weights and state are as they were."""


class NonFiniteGradientError(GradientError):
    """A gradient holds inf or nan; weights and state are as they were."""


class ParameterChangedError(AsteriaError, RuntimeError):
    """A parameter changed shape, dtype or device since its state was made."""


class RefreshError(AsteriaError, RuntimeError):
    """An eigenbasis could not be computed, in float64 neither."""


class StoreError(AsteriaError, RuntimeError):
    """State could not be moved between tiers."""


class StoreFullError(StoreError):
    """There is no room on a tier; what it holds is as it was."""


class StoreCorruptError(StoreError):
    """What came back from a tier is not what was written."""


class CoherenceError(AsteriaError, RuntimeError):
    """A rank that trains the same model is lost, stuck, or does something else than this one."""


class CheckpointError(AsteriaError, ValueError):
    """A state that does not belong to these parameters, or got lost when it was to be replaced."""
