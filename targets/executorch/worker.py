"""The process in which a program runs: ``python -m targets.executorch.worker PROGRAM THREADS DESCRIPTOR``.

A process of its own because native code may abort it, writes its reasons to standard error only, and keeps its thread
pool for good. It answers on the connection of that file descriptor, so whatever native code prints cannot break it:

    load_s                                       once, when the program is loaded
    (calls, position)                            a request: the token ids of each call, and where the first one starts
    ("outputs", (shapes, seconds)), then bytes   its answer: what the last call gives, one message of float32 for each
                                                 shape, the logits first; and the time of each call
    ("error", message)                           or what went wrong; the program stays loaded

It ends when the other end of the connection is closed.
"""

from __future__ import annotations

import sys
import time
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from targets.executorch import border

_KERNEL_LIBRARIES = {
    "executorch.extension.llm.custom_ops": "libcustom_ops_aot_lib.*",
    "executorch.kernels.quantized": "libquantized_ops_aot_lib.*",
}
"""Loading one registers its kernels with the runtime. Their Python modules would do so too, and so would
``portable_lib`` give the runtime, but those import torch's compiler as well: four seconds, not needed to run."""


def main(program: str, threads: str, descriptor: str) -> None:
    connection = Connection(int(descriptor))
    runtime = _import_runtime()
    runtime._unsafe_reset_threadpool(int(threads))
    started = time.perf_counter()
    loaded = runtime._load_program(program)
    method = loaded.load_method("forward")
    connection.send(time.perf_counter() - started)
    while True:
        try:
            calls, position = connection.recv()
        except EOFError:
            return
        _answer(connection, method, calls, position)


def _answer(connection: Connection, method: Any, calls: list[list[int]], position: int) -> None:
    inputs = []
    for ids in calls:
        inputs.append((torch.tensor([ids]), torch.tensor([position])))
        position += len(ids)
    steps_s = []
    try:
        for arguments in inputs:
            started = time.perf_counter()
            outputs = method(arguments)
            steps_s.append(time.perf_counter() - started)
    except RuntimeError as error:
        connection.send(("error", str(error)))
        return
    connection.send(("outputs", ([tuple(output.shape) for output in outputs], steps_s)))
    for output in outputs:
        connection.send_bytes(output.contiguous().numpy().data.cast("B"))


def _import_runtime() -> Any:
    with border.toolchain("load its kernels"):
        from executorch.extension.pybindings import _portable_lib as runtime

        for package, pattern in _KERNEL_LIBRARIES.items():
            (library,) = Path(str(resources.files(package))).glob(pattern)
            torch.ops.load_library(library)
    return runtime


if __name__ == "__main__":
    main(*sys.argv[1:])
