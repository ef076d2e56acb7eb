"""What a device has used of electrical energy, where its driver tells."""

from __future__ import annotations

import importlib
from typing import Any


class EnergyMeter:
    """Counts the joules of one NVIDIA device, by NVML; of all that runs there, not of us alone."""

    def __init__(self, index: int, nvml: Any = None) -> None:
        """``index`` of the device as CUDA counts; ``nvml`` for tests, else the package pynvml."""
        self._nvml, self._handle = nvml, None
        self.missing = ""
        """Why there is nothing to read; empty where there is."""
        try:
            if self._nvml is None:
                self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except ModuleNotFoundError:
            self.missing = "pynvml is not installed (pip install nvidia-ml-py)"
        except Exception as error:  # NVML has an exception of its own for every refusal
            self._handle = None
            self.missing = f"the driver does not tell: {error}"

    def joules(self) -> float | None:
        """Since the driver was loaded; None where nobody knows."""
        if self.missing or self._handle is None:
            return None
        millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return float(millijoules) * 1e-3
