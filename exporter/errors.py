"""Every error raised on purpose, and the exit code each one means.

    ExportError
    ├── UsageError          2  the command line cannot be carried out as written
    ├── InputError          3  a checkpoint, text or bundle is not what it should be
    ├── MissingToolError    4  a toolchain is not installed (the hint names the command that installs it)
    │   └── HostError       4  this host cannot execute that artifact at all
    ├── CapacityError       5  it will not fit: memory, disk, device
    ├── LoweringError       6  a toolchain refused the graph, or the artifact could not be written
    ├── ParityError         7  the artifact does not answer as the model does
    └── BudgetError         8  quality, latency or size is outside its budget

An error says in one sentence what was found and what was wanted; ``hint`` says what to do next. Foreign exceptions are
mapped to these once, at the border of the folder that calls the foreign code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

INTERRUPTED = 130
UNFORESEEN = 1
"""A fault of ours."""


class ExportError(Exception):
    """One sentence for the user, a hint, and an exit code."""

    exit_code: ClassVar[int]

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ExportError):
    exit_code = 2


class InputError(ExportError):
    exit_code = 3


class MissingToolError(ExportError):
    exit_code = 4


class HostError(MissingToolError):
    """This host cannot execute the artifact, so that nothing can be proven about it here."""


class CapacityError(ExportError):
    exit_code = 5


class LoweringError(ExportError):
    exit_code = 6


class ParityError(ExportError):
    exit_code = 7


class BudgetError(ExportError):
    exit_code = 8


def gravest(codes: Iterable[int]) -> int:
    """The exit code of a run with several outcomes: the earlier the stage that failed, the graver (0 if none did)."""
    return min((code for code in codes if code), default=0)
