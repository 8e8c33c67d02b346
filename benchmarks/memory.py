"""What a process holds: anonymous memory, which it cannot do without, and mapped pages, which the system may drop."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def resident_bytes(pid: int | None = None) -> tuple[int, int]:
    """Anonymous and mapped resident memory of a process (this one) by now."""
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    anonymous, mapped = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


class Memory:
    """Peaks of anonymous and of mapped memory of a process (this one) while the block runs, looked at every 10 ms."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self.anonymous_bytes = self.mapped_bytes = 0

    def __enter__(self) -> Memory:
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            try:
                anonymous, mapped = resident_bytes(self._pid)
            except (FileNotFoundError, ProcessLookupError, KeyError):  # it has ended
                return
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
            self.mapped_bytes = max(self.mapped_bytes, mapped)
