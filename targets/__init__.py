"""Names of targets -> the modules that serve them, imported only when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from exporter.errors import UsageError

if TYPE_CHECKING:
    from targets.base import Target

NAMES = ("executorch", "onnxruntime", "coreml")


def load(name: str) -> Target:
    """The target called ``name``. Raises UsageError, naming the known ones."""
    if name not in NAMES:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(NAMES)}, all", hint="choose one with --target")
    target: Target = importlib.import_module(f"targets.{name}").TARGET
    return target
