"""Names of targets and their backends -> what serves them, imported only when asked for.

A *label* names one of both: ``executorch`` for the default backend, ``executorch-portable`` for another. It is the name
of the bundle's folder, and of a row in every report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from exporter.errors import UsageError

if TYPE_CHECKING:
    from targets.base import Target

BACKENDS: dict[str, tuple[str, ...]] = {
    "executorch": ("xnnpack",),
    "onnxruntime": ("cpu",),
    "coreml": ("gpu", "ane"),
}
"""What executes inside each target; the first is the default."""

NAMES = tuple(BACKENDS)


def label(target: str, backend: str) -> str:
    return target if backend == BACKENDS[target][0] else f"{target}-{backend}"


LABELS = tuple(label(target, backend) for target, backends in BACKENDS.items() for backend in backends)


def load(name: str) -> Target:
    """What serves the label ``name``. Raises UsageError, naming the known ones."""
    target, backend = split(name)
    served: Target = importlib.import_module(f"targets.{target}").load(backend)
    return served


def split(name: str) -> tuple[str, str]:
    """Target and backend of a label; a backend may be told even where it is the default. Raises UsageError."""
    target = next((known for known in NAMES if name == known or name.startswith(f"{known}-")), None)
    if target is None:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(NAMES)}, all", hint="choose one with --target")
    backend = name.removeprefix(target).removeprefix("-") or BACKENDS[target][0]
    if backend not in BACKENDS[target]:
        raise UsageError(
            f"target {target} has no backend {backend!r}; known: {', '.join(BACKENDS[target])}",
            hint="choose one with --backend",
        )
    return target, backend
