"""Programs run one at a time, under watch: what goes wrong in one is a sentence, not the end of the benchmark."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from benchmarks.memory import Memory

LEAST_AVAILABLE_BYTES = 1 << 30
"""Memory that a program has to leave to the rest of the machine."""
POLL_S = 0.1


class ProgramError(Exception):
    """Why a program did not do what it was to do, in a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a program wrote to stdout, and its peak memory as far as a look every 0.1 s shows it."""

    output: str
    memory: Memory


def run(command: Sequence[object], *, timeout_s: float) -> Done:
    """Run ``command`` to its end.

    Raises ProgramError with its last line on stderr where it fails, and where it is ended, with all that it has
    started, for its time or for the machine's memory.
    """
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
        )
        memory = Memory(process.pid)
        try:
            _wait(process, memory, timeout_s=timeout_s)
        except BaseException:  # of ours, or an interrupt
            _end(process)
            raise
        if process.returncode:
            raise ProgramError(f"{_ended(process.returncode)}: {_last_line(errors)}")
        output.seek(0)
        return Done(output=output.read(), memory=memory)


def available_bytes() -> int:
    """Memory that programs can still get without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _wait(process: subprocess.Popen[bytes], memory: Memory, *, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            process.wait(POLL_S)
            return
        except subprocess.TimeoutExpired:
            memory.look()
        if time.monotonic() > until:
            raise ProgramError(f"not done after {timeout_s:.0f} s")
        if available_bytes() < LEAST_AVAILABLE_BYTES:
            least = LEAST_AVAILABLE_BYTES / 2**30
            raise ProgramError(f"ended by us: it left the machine less than {least:.0f} GiB of memory")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started, which is of its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
