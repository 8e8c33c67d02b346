"""Backends of ExecuTorch that this host does not run: some it lowers for, of the others it says what is lacking."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from exporter.errors import HostError, MissingToolError, UsageError
from exporter.spec import Activations, Arithmetic, Artifact, ModelSpec, Plan, Precision, Prefer, Report, WeightScheme
from targets.executorch import FILE_NAME, ExecuTorchTarget
from targets.executorch.delegations import DELEGATIONS, PROBES, Delegation, Probe

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner, Target


class DelegatedTarget(ExecuTorchTarget):
    """A program with delegates for a backend that runs on devices of its own: lowered and audited here."""

    format: ClassVar[str] = ".pte, an ExecuTorch program of single steps with delegates"

    def __init__(self, delegation: Delegation) -> None:
        self.delegation = delegation
        self.backend = delegation.backend

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, a program takes one token at a time"
        for name, shape in spec.weights().items():
            if len(shape) == 2 and (reason := self._refuse_matrix(name, shape[1], plan.scheme)):
                return reason
        return None

    def _refuse_matrix(self, name: str, columns: int, scheme: WeightScheme) -> str | None:
        return None
