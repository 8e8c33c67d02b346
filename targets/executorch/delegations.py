"""What is known of each backend that is lowered to but not run here, as data. Imports no toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.spec import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """One backend of ExecuTorch that runs on its own devices only."""

    backend: str
    delegate: str
    """What a program calls it."""
    title: str
    runs_on: str
    """Which devices have it."""
    precisions: tuple[Precision, ...]
    """Of matrices: those that it takes."""
    delegates: int
    """Into how many a model is cut, whatever its size; more are a fault of the lowering."""
    left_over: frozenset[str]
    """Ops that may run outside of them, on ExecuTorch's own kernels."""
    modules: Mapping[str, str]
    """Python modules that the lowering imports, and the command that installs each."""


DELEGATIONS: dict[str, Delegation] = {}
