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
OTHER_RUNTIMES = {
    "sync": RuntimeConfig(refresh="sync"),
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
    def is_asynchronous(self) -> bool:
        """Whether refreshes are computed by workers and installed later."""
        return self.runtime.refresh == "async"

    @property
    def skips_first_update(self) -> bool:
        """Whether the first gradient only builds the bases, as the published code has it."""
        return self.runtime.start == "eigh"


ARMS = [
    Arm(f"{name}-{runtime}", OPTIMIZERS[name], RUNTIMES[runtime])
    for name in OPTIMIZERS
    for runtime in RUNTIMES
]
ALL_ARMS = ARMS + [
    Arm(f"{name}-{runtime}", OPTIMIZERS[name], OTHER_RUNTIMES[runtime])
    for name in OPTIMIZERS
    for runtime in OTHER_RUNTIMES
]

ALONE_ARMS = [arm for arm in ALL_ARMS if arm.runtime.refresh == "sync"]
"""Those under which the schedule of a parameter does not depend on which others there are;
asynchronous refreshes of all parameters take turns."""

over_arms = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
over_all_arms = pytest.mark.parametrize("arm", ALL_ARMS, ids=lambda arm: arm.name)
over_alone_arms = pytest.mark.parametrize("arm", ALONE_ARMS, ids=lambda arm: arm.name)
over_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
