"""An interrupt that is not lost.

A signal raises KeyboardInterrupt wherever Python happens to be. Where that is inside native code (safetensors and
coremltools were seen to do so), the code may turn it into an error of its own, or swallow it; where it is inside a
finalizer or the callback of a weak reference, Python prints the traceback and goes on. So the signal is also
remembered, and asked for where an error would otherwise be taken at its word.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

_received = False


def listen() -> None:
    """From now on an interrupt (Ctrl-C) and a request to end (kill) both raise KeyboardInterrupt and are remembered."""
    signal.signal(signal.SIGINT, _remember)
    signal.signal(signal.SIGTERM, _remember)
    sys.unraisablehook = _unraisable


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come."""
    if _received:
        raise KeyboardInterrupt


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _received  # noqa: PLW0603  (a signal belongs to the process)
    _received = True
    raise KeyboardInterrupt


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    """Says nothing of an interrupt that came where nothing can be raised: it is remembered."""
    if not isinstance(args.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(args)
