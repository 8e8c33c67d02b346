"""What the machine can do at best: how fast it reads memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIZE_BYTES = 1 << 30
RUNS = 5


def read_bandwidth(*, threads: int) -> dict[str, float]:
    """Bytes per second at which each of three kernels reads 1 GiB, the best of five runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    floats = torch.ones(SIZE_BYTES // 4)
    integers = floats.view(torch.int32)
    matrix, vector = floats.view(-1, 4096), torch.ones(4096)
    kernels: dict[str, Callable[[], object]] = {
        "dot product": lambda: torch.dot(floats, floats),  # the same gigabyte twice: it is read once
        "largest of int32": integers.max,
        "matrix by vector": lambda: matrix @ vector,
    }
    rates = {name: SIZE_BYTES / min(_seconds(kernel) for _ in range(RUNS)) for name, kernel in kernels.items()}
    torch.set_num_threads(before)
    return rates


def _seconds(kernel: Callable[[], object]) -> float:
    began = time.perf_counter()
    kernel()
    return time.perf_counter() - began
