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
    check_known(name)
    target: Target = importlib.import_module(f"targets.{name}").TARGET
    return target


def check_known(name: str) -> None:
    """Raises UsageError for a name that is none of a target."""
    if name not in NAMES:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(NAMES)}, all", hint="choose one with --target")
