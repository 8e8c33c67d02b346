"""What a process holds: anonymous memory, which it cannot do without, and mapped pages, which the system may drop."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

_ENDED = (FileNotFoundError, ProcessLookupError, KeyError)
"""What reading the files of a process raises once it has ended; of a zombie, KeyError."""


def resident_bytes(pid: int | None = None) -> tuple[int, int]:
    """Anonymous and mapped resident memory of a process (this one) by now."""
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    anonymous, mapped = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


class Memory:
    """Peaks of anonymous and of mapped memory of a process (this one) while the block runs, looked at every 10 ms."""

    def __init__(self, pid: int | None = None, *, children: bool = False) -> None:
        """``children``: with all programs that it has started."""
        self._pid = pid or os.getpid()
        self._children = children
        self.anonymous_bytes = self.mapped_bytes = 0

    def __enter__(self) -> Memory:
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def look(self) -> None:
        """Take what is held by now into the peaks."""
        anonymous = mapped = 0
        for pid in _family(self._pid) if self._children else [self._pid]:
            try:
                held = resident_bytes(pid)
            except _ENDED:
                continue
            anonymous, mapped = anonymous + held[0], mapped + held[1]
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
        self.mapped_bytes = max(self.mapped_bytes, mapped)

    def _watch(self) -> None:
        self.look()
        while not self._done.wait(0.01):
            self.look()


def _family(pid: int) -> Iterator[int]:
    """A process and all that come from it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = children.read_text(encoding="utf-8").split()
        except _ENDED:
            continue
        for child in pids:
            yield from _family(int(child))
