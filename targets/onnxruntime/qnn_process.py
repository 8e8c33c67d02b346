"""The other end of ``qnn_worker``: starts it, and tells what became of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from exporter.errors import CapacityError, ExportError, LoweringError
from targets.onnxruntime.fixed_runner import Calls

_END_TIMEOUT_S = 10
_FAULT = re.compile(r"(?:\[E:onnxruntime|Exception|Error\b|FAIL)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def compile_graphs(folder: Path, graphs: Mapping[str, str], options: Mapping[str, str]) -> None:
    """Compile each graph, a path below ``folder``, to the file there that it is mapped to, with a binary beside it.

    Raises LoweringError, or CapacityError where the system ended the compiler.
    """
    # Paths are told as they are seen from the folder: what is compiled is named after a digest of the path.
    request = {"graphs": list(graphs.items()), "options": dict(options)}
    with tempfile.TemporaryDirectory(prefix="llama-export-") as scratch, tempfile.TemporaryFile() as log:
        command = _command("compile", str(_write(Path(scratch), request)))
        done = subprocess.run(command, cwd=folder, env=_environment(), check=False, **_to(log))
        if done.returncode:
            raise _error(done.returncode, log, verb="compile", name=", ".join(graphs))


class QnnCalls(Calls):
    """Compiled graphs, loaded by a worker process. Raises as ``compile_graphs``."""

    def __init__(self, graphs: Mapping[int, Path], options: Mapping[str, str]) -> None:
        """``graphs``: by their length."""
        self._name = ", ".join(path.name for path in graphs.values())
        self._folder = tempfile.TemporaryDirectory(prefix="llama-export-")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._connection, worker_end = Pipe()
        request = _write(
            Path(self._folder.name),
            {"graphs": {length: str(path) for length, path in graphs.items()}, "options": dict(options)},
        )
        self._process = subprocess.Popen(
            _command("run", str(worker_end.fileno()), str(request)),
            env=_environment(),
            pass_fds=[worker_end.fileno()],
            **_to(self._log),
        )
        worker_end.close()
        try:
            self.load_s = self._connection.recv()
        except (EOFError, OSError) as error:
            self._fail("load", error)
        except BaseException:  # interrupted: nobody will call close
            self.close()
            raise

    def run(self, calls: Sequence[Sequence[int]], *, position: int) -> tuple[NDArray[np.float32], Sequence[float]]:
        try:
            self._connection.send(([list(ids) for ids in calls], position))
            kind, *content = self._connection.recv()
        except (EOFError, OSError) as error:
            self._fail("run", error)
        if kind == "error":
            raise LoweringError(f"QNN failed while running {self._name}: {content[0]}", hint="export the model again")
        logits, steps_s = content
        return logits, steps_s

    def close(self) -> None:
        self._connection.close()  # the worker ends when it sees that
        try:
            self._process.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _fail(self, verb: str, error: Exception) -> NoReturn:
        self._connection.close()
        reason = _error(self._process.wait(), self._log, verb=verb, name=self._name)
        self._log.close()
        self._folder.cleanup()
        raise reason from error


def _write(folder: Path, request: Mapping[str, Any]) -> Path:
    path = folder / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    return path


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "targets.onnxruntime.qnn_worker", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}


def _to(log: IO[bytes]) -> dict[str, Any]:
    return {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}


def _error(status: int, log: IO[bytes], *, verb: str, name: str) -> ExportError:
    if status == -signal.SIGKILL:
        return CapacityError(
            f"the system ended QNN while it was to {verb} {name}, most likely for want of memory",
            hint="free memory, or take a smaller --context or model",
        )
    written = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
    lines = [_COLOUR.sub("", line).strip() for line in written.splitlines() if line.strip()]
    faults = [line for line in lines if _FAULT.search(line)]
    reason = (faults[-1:] or lines[-1:] or ["it said nothing"])[0]
    ended = f"{signal.Signals(-status).name}: " if status < 0 else ""
    return LoweringError(
        f"QNN could not {verb} {name}: {ended}{reason}",
        hint="if `pip show onnxruntime-qnn` gives 2.7.0, this is a fault of llama-export: please report it",
    )
