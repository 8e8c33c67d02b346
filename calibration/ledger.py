"""Where the time of a calibration goes: seconds and floating-point operations, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """Sums up the stages of one run; a stage may come again and again."""

    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    """Multiplications and additions of matrix products and factorizations alone: what a peak of so many FLOP/s is
    compared with."""

    @contextmanager
    def stage(self, name: str, *, flops: float = 0.0) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.flops[name] = self.flops.get(name, 0.0) + flops
