"""Operating systems that an app has to run on: which one ``--os`` names, and what each target asks of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import targets
from exporter.errors import UsageError
from exporter.spec import Precision
from targets.coreml.systems import SYSTEMS, lacking

_NAMES = {"ios": "iOS", "ipados": "iPadOS", "macos": "macOS", "android": "Android"}

_EXECUTORCH = {"ios": 17, "ipados": 17, "macos": 14}
"""What ExecuTorch's Swift package asks for, as samples/ios takes it. Nothing is said of Android, where a runtime comes
with the app."""

_MACOS_WITH_IOS_18 = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    kind: str
    """ios, ipados, macos or android: the ``os`` of a Device."""
    major: int

    def __str__(self) -> str:
        return f"{_NAMES[self.kind]} {self.major}"

    @property
    def ios(self) -> int:
        """The iOS of the same year; Apple's numbers are alike from 26 on."""
        apart = self.kind == "macos" and self.major <= _MACOS_WITH_IOS_18
        return self.major + 3 if apart else self.major


def parse_system(text: str) -> System:
    """Of ``ios17``, ``iOS 17`` or ``macos-15``. Raises UsageError for another form."""
    found = re.fullmatch(r"(ios|ipados|macos|android)[ -]?(\d{1,2})(?:\.\d+)*", text.strip().lower())
    if found is None:
        raise UsageError(
            f"--os {text!r} is no system; known: {', '.join(_NAMES.values())}, with a version behind",
            hint="for instance --os ios18",
        )
    return System(kind=found[1], major=int(found[2]))


def oldest_system(label: str, kind: str) -> System | None:
    """The oldest system of that kind that runs a bundle of ``label``, where there is one to tell."""
    target, backend = targets.split(label)
    majors: Mapping[str, int] = {}
    if target == "executorch":
        majors = _EXECUTORCH
    elif target == "coreml":
        enough = next(system for system in SYSTEMS if not lacking(system.ios, functions=backend == "ane"))
        majors = {"ios": enough.ios, "ipados": enough.ios, "macos": enough.macos}
    return System(kind=kind, major=majors[kind]) if kind in majors else None


def too_old(label: str, system: System, precisions: Iterable[Precision] = ()) -> str | None:
    """Why a bundle of ``label`` that stores weights in ``precisions`` does not run on ``system``; None if it does."""
    target, backend = targets.split(label)
    oldest = oldest_system(label, system.kind)
    if target == "coreml" and oldest is None:
        return f"{_NAMES[system.kind]} has no Core ML"
    if oldest is None or system.major >= oldest.major:
        return None
    said = f"it needs {oldest} or later"
    if target != "coreml":
        return said
    missing = lacking(system.ios, precisions=precisions, functions=backend == "ane")
    return f"{said}: {system} does not know {', '.join(missing)}"
