"""The machine: what it is, and how fast it reads memory at best."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

SIZE_BYTES = 1 << 30
RUNS = 5
PACKAGES = ("torch", "onnxruntime", "executorch", "coremltools", "onnxruntime-genai")


def describe() -> dict[str, str]:
    """Processor, cores, memory, system and the versions of what is measured with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB",
        "system": system,
        **versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


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
