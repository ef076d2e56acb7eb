"""Every integration test finds the libraries as a fresh process would."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate, and with it Trainer, keeps its precision for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
