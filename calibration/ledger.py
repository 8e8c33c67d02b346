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

    def __str__(self) -> str:
        """``12.3 s: gptq 6.0, forward 4.1, ...``, the longest first, what took no tenth of a second left out."""
        stages = sorted(self.seconds.items(), key=lambda stage: -stage[1])
        told = ", ".join(f"{name} {taken:.1f}" for name, taken in stages if taken >= 0.1)
        return f"{sum(self.seconds.values()):.1f} s{': ' if told else ''}{told}"
