"""A program executed on this host by ExecuTorch's runtime and XNNPACK, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from exporter.errors import CapacityError, ExportError, LoweringError, MissingToolError
from exporter.model.graph import FUSED, image_names
from exporter.model.image_ops import tiles_of
from exporter.spec import Artifact, Logits
from targets.base import BaseRunner
from targets.executorch import MOST_IMAGES, VISION
from targets.executorch.border import INSTALL, installed_version
from targets.images import check_room

_NATIVE_LINE = re.compile(r"^\[(?P<source>\w+)\.cpp:\d+\] (?P<message>.+)")
_HARMLESS_SOURCES = {"cpuinfo_utils", "threadpool"}
"""Source files of ExecuTorch that report their normal work on standard error."""

_ONE_POOL = {"OMP_NUM_THREADS": "1"}
"""XNNPACK has the threads. The wheel's attention kernel would take as many again from OpenMP, which a phone does
not have; the two pools then wait for each other's cores (2 cores: 4,000 decoded tokens/s with one, 900 with both)."""

_END_TIMEOUT_S = 10

IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
"""Of ``vision.pte``, in the order in which it takes them."""


class ProgramRunner(BaseRunner):
    """One loaded program with one key-value cache; a worker process holds it.

    ``longest``: the tokens that the program takes in one call at most, where that is not its whole context; more are
    fed in pieces.
    Raises MissingToolError where ExecuTorch is not installed, LoweringError where it cannot load the program, and
    CapacityError where the system ended the worker.
    """

    def __init__(self, artifact: Artifact, *, threads: int, longest: int | None = None) -> None:
        installed_version()
        super().__init__(artifact)
        self._longest = longest or artifact.context
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._log_read = 0
        self._connection, worker_end = Pipe()
        arguments = [str(artifact.path), str(threads), str(worker_end.fileno())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "targets.executorch.worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[worker_end.fileno()],
            env={**os.environ, **_ONE_POOL, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
        )
        worker_end.close()
        try:
            self.load_s = self._connection.recv()
        except (EOFError, OSError) as error:
            self._fail("load", error)
        except BaseException:  # interrupted: nobody will call close
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the worker process."""
        return self._process.pid

    def feed(self, ids: Sequence[int]) -> Tensor:
        self._check_feed(ids)
        pieces = [list(ids[first : first + self._longest]) for first in range(0, len(ids), self._longest)]
        if self._artifact.logits is Logits.LAST:
            return self._call(pieces, ids)[0][0]
        rows, steps_s = [], list[float]()
        for piece in pieces:
            rows.append(self._call([piece], piece)[0][0])
            steps_s += self.steps_s
        self.steps_s = steps_s
        return torch.cat(rows)

    def feed_for_all(self, ids: Sequence[int]) -> list[Tensor]:
        """``feed``, for everything that the program gives, which is float32 throughout: the logits first."""
        return self._call([list(ids)], ids)

    def feed_each(self, ids: Sequence[int]) -> Tensor:
        """In the worker, so that no step waits for the way there and back."""
        return self._call([[token] for token in ids], ids)[0][0]

    def _call(self, calls: list[list[int]], ids: Sequence[int], *, tiles: Tensor | None = None) -> list[Tensor]:
        self._check_feed(ids)
        seen = None if tiles is None else tiles.numpy()
        what = f"{self._artifact.path.name} on {len(ids)} tokens at position {self._position}"
        outputs = self._ask("feed", (calls, self._position, seen), what=what)
        self._position += len(ids)
        return outputs

    def _ask(self, request: str, content: object, *, what: str) -> list[Tensor]:
        """What the worker answers (``targets.executorch.worker``). Raises LoweringError where it could not run
        ``what``, or as ``_fail``."""
        self._log_read = self._log_size()
        try:
            self._connection.send((request, content))
            kind, found = self._connection.recv()
            if kind == "error":
                raise LoweringError(
                    f"ExecuTorch could not run {what}: {self._reason() or found}",
                    hint="lower the model again; if it stays so, this is a fault of llama-export: please report it",
                )
            shapes, self.steps_s = found
            outputs = [torch.empty(shape) for shape in shapes]
            for output in outputs:
                self._connection.recv_bytes_into(output.numpy().data.cast("B"))
        except (EOFError, OSError) as error:
            self._fail("run", error)
        return outputs

    def close(self) -> None:
        self._connection.close()  # the worker ends when it sees that
        try:
            self._process.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _fail(self, verb: str, error: Exception) -> NoReturn:
        """The worker is gone: end what is left of it and say why."""
        self._connection.close()
        status = self._process.wait()
        reason = self._reason() or "it said nothing"
        self._log.close()
        raise _error_for(status, verb=verb, reason=reason, path=self._artifact.path) from error

    def _reason(self) -> str:
        """What the worker wrote since the last request: the first fault that native code reports (what follows are its
        consequences), or else the last line."""
        # The worker writes at the offset that both share, which pread leaves alone.
        written = os.pread(self._log.fileno(), self._log_size() - self._log_read, self._log_read)
        lines = [line for line in written.decode(errors="replace").splitlines() if line.strip()]
        native = [match for match in map(_NATIVE_LINE.match, lines) if match]
        faults = [match["message"] for match in native if match["source"] not in _HARMLESS_SOURCES]
        others = [line.strip() for line in lines if not _NATIVE_LINE.match(line)]
        return (faults[:1] or others[-1:] or [""])[0]

    def _log_size(self) -> int:
        return os.fstat(self._log.fileno()).st_size


class SeeingProgramRunner(ProgramRunner):
    """One whose model sees images; the worker keeps what the decoder takes from them."""

    def __init__(self, artifact: Artifact, *, threads: int) -> None:
        super().__init__(artifact, threads=threads)
        self._shown = 0

    def look(self, image: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As ``targets.base.SeeingRunner``. Raises InputError for more images than ``MOST_IMAGES``."""
        images = self._artifact.spec.images
        if images is None:
            return {FUSED[0]: torch.cat([state for tile in tiles_of(image) for state in self._run_vision(tile)], dim=1)}
        check_room(self._shown, most=MOST_IMAGES)
        found = self._run_vision(image)
        self._shown += 1
        keys, values = image_names(len(images.cross_attention_layers))
        states = dict(zip(keys + values, found, strict=True))
        return {name: state.transpose(1, 2) for name, state in states.items()}  # [1, KV, M * N, D]

    def _run_vision(self, image: Mapping[str, Tensor]) -> list[Tensor]:
        path = self._artifact.path.with_name(VISION)
        content = (str(path), [image[name].numpy() for name in IMAGE_INPUTS if name in image])
        return self._ask("look", content, what=f"{path.name} on an image")

    def feed(self, ids: Sequence[int], *, tiles: Tensor | None = None) -> Tensor:
        return self._call([list(ids)], ids, tiles=tiles)[0][0]


def _error_for(status: int, *, verb: str, reason: str, path: Path) -> ExportError:
    if status == -signal.SIGKILL:
        return CapacityError(
            f"the system ended ExecuTorch while it was to {verb} {path.name}, most likely for want of memory",
            hint="free memory, or take a smaller --context or precision",
        )
    if "MissingToolError" in reason or "ImportError" in reason:
        return MissingToolError(f"ExecuTorch's runtime cannot be imported: {reason}", hint=INSTALL)
    ended = f"{signal.Signals(-status).name}: " if status < 0 else ""
    return LoweringError(
        f"ExecuTorch could not {verb} {path.name}: {ended}{reason}",
        hint="lower the model again; if it stays so, this is a fault of llama-export: please report it",
    )
