"""The table that contract tests run over: every optimizer, under each of its runtimes."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest

from asteria import KLSOAP, SOAP, KLShampoo, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer

OPTIMIZERS: dict[str, type[SecondOrderOptimizer]] = {
    "SOAP": SOAP,
    "KLShampoo": KLShampoo,
    "KLSOAP": KLSOAP,
}
RUNTIMES = {"default": RuntimeConfig(), "reference": RuntimeConfig.reference()}
OTHER_STARTS = {
    "adam": RuntimeConfig(start="adam"),
    "eigh": RuntimeConfig(start="eigh", refresh_method="eigh"),
}

PERIOD = 3
"""The precondition frequency, so that a few steps see several refreshes."""
LR = 2.0**-6


class Arm(NamedTuple):
    """One optimizer under one runtime; calling it builds one."""

    name: str
    optimizer: type[SecondOrderOptimizer]
    runtime: RuntimeConfig

    def __call__(self, params: Iterable[Any], **options: Any) -> SecondOrderOptimizer:
        """The optimizer with options that make short runs telling, unless given otherwise."""
        telling = {"lr": LR, "precondition_frequency": PERIOD, "runtime": self.runtime}
        return self.optimizer(params, **(telling | options))

    @property
    def skips_first_update(self) -> bool:
        """Whether the first gradient only builds the bases, as the published code has it."""
        return self.runtime.start == "eigh"


ARMS = [
    Arm(f"{name}-{runtime}", OPTIMIZERS[name], RUNTIMES[runtime])
    for name in OPTIMIZERS
    for runtime in RUNTIMES
]
ARMS_OF_ALL_STARTS = ARMS + [
    Arm(f"{name}-{start}", OPTIMIZERS[name], OTHER_STARTS[start])
    for name in OPTIMIZERS
    for start in OTHER_STARTS
]

over_arms = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
over_arms_of_all_starts = pytest.mark.parametrize(
    "arm", ARMS_OF_ALL_STARTS, ids=lambda arm: arm.name
)
over_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
