"""How long steps take and how much of that is waiting for data. Reported as the slowest rank's.

Host clocks only: nothing waits for the device, so a single step's time is when its work was queued, and the median over
a window is what the device sustains.
"""

import time

import torch

from recap_ds.distributed.reduce import max_over_ranks
from recap_ds.distributed.runtime import peak_memory_bytes

NAMES = ("time/step_p50_seconds", "time/step_p95_seconds", "time/data_wait_seconds", "memory/peak_bytes")


class StepTimes:
    """Collects between two log lines."""

    def __init__(self, device: torch.device):
        self._device = device
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._samples = 0

    def start(self) -> None:
        self._started = time.perf_counter()
        if not self._steps:
            # Here and not at the last summary: evaluation and saving come in between.
            self._window_started = self._started

    def data_ready(self) -> None:
        self._waits.append(time.perf_counter() - self._started)

    def stop(self, num_samples: int) -> None:
        self._steps.append(time.perf_counter() - self._started)
        self._samples += num_samples

    def summarise(self) -> dict[str, float]:
        """Figures since the last call. Collective: every rank must call."""
        steps = torch.tensor(self._steps, dtype=torch.float64)
        middle, high = steps.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        wait = sum(self._waits) / len(self._waits)
        local = torch.tensor([middle, high, wait, float(peak_memory_bytes())], dtype=torch.float64)
        slowest = max_over_ranks(local.to(self._device)).tolist()
        speed = self._samples / (time.perf_counter() - self._window_started)
        self._steps, self._waits, self._samples = [], [], 0
        return {**dict(zip(NAMES, slowest, strict=True)), "time/samples_per_second": speed}
