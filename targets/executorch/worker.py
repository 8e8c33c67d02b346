"""The process in which a program runs: ``python -m targets.executorch.worker PROGRAM THREADS DESCRIPTOR``.

A process of its own because native code may abort it, writes its reasons to standard error only, and keeps its thread
pool for good. It answers on the connection of that file descriptor, so whatever native code prints cannot break it:

    load_s                                       once, when the program is loaded
    ("feed", (calls, position, tiles))           a request: the token ids of each call, where the first one starts, and
                                                 the tiles that each of the tokens sees, or the states that stand in
                                                 their place, bool [T, M] or None
    ("look", (program, inputs))                  another: the program that an image goes through, and its inputs; those
                                                 that follow have the image behind those before it
    ("outputs", (shapes, seconds)), then bytes   an answer: what the last call gives, one message of float32 for each
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

from exporter.model.image_ops import in_place
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
    decoder = _decoder(loaded.load_method("forward"))
    connection.send(time.perf_counter() - started)
    while True:
        try:
            request, content = connection.recv()
        except EOFError:
            return
        try:
            outputs, steps_s = decoder.feed(*content) if request == "feed" else decoder.look(runtime, *content)
        except RuntimeError as error:
            connection.send(("error", str(error)))
            continue
        connection.send(("outputs", ([tuple(output.shape) for output in outputs], steps_s)))
        for output in outputs:
            connection.send_bytes(output.contiguous().numpy().data.cast("B"))


def _decoder(method: Any) -> _Decoder:
    """By the inputs behind tokens and position: none, tiles and keys and values, or states and which tokens."""
    others = _input_sizes(method)[2:]
    return _FusingDecoder(method, hidden=others[0][2]) if len(others) == 2 and len(others[1]) == 2 else _Decoder(method)


class _Decoder:
    """A loaded method, and what it is given of images (``targets.executorch.images.SeeingWalk``). Without one: a tile
    of zeros, which nobody sees."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._tiles, self._shown, self._states = 0, False, list[torch.Tensor]()
        _tokens, _start, *largest = _input_sizes(method)
        if largest:
            (_, _, tiles), (one, states, *heads), *_ = largest
            blank = torch.zeros(one, states // tiles, *heads)
            self._tiles, self._states = 1, [blank] * (len(largest) - 1)

    def feed(self, calls: list[list[int]], position: int, tiles: Any) -> tuple[list[torch.Tensor], list[float]]:
        inputs, read = [], 0
        for ids in calls:
            inputs.append((torch.tensor([ids]), torch.tensor([position]), *self._seen(tiles, read, len(ids))))
            position, read = position + len(ids), read + len(ids)
        steps_s = []
        for arguments in inputs:
            started = time.perf_counter()
            outputs = self._method(arguments)
            steps_s.append(time.perf_counter() - started)
        return outputs, steps_s

    def look(self, runtime: Any, program: str, image: list[Any]) -> tuple[list[torch.Tensor], list[float]]:
        loaded = runtime._load_program(program)
        method = loaded.load_method("forward")
        started = time.perf_counter()
        found = method([torch.from_numpy(array) for array in image])
        taken_s = time.perf_counter() - started
        kept = self._states if self._shown else [state[:, :0] for state in self._states]
        self._states = [torch.cat(pair, dim=1) for pair in zip(kept, found, strict=True)]
        self._tiles, self._shown = (self._tiles if self._shown else 0) + image[0].shape[1], True
        return found, [taken_s]

    def _seen(self, tiles: Any, first: int, count: int) -> list[torch.Tensor]:
        if not self._tiles:
            return []
        seen = torch.zeros(count, self._tiles, dtype=torch.bool)
        if tiles is not None:
            seen = torch.from_numpy(tiles[first : first + count])
        return [seen.unsqueeze(0), *self._states]


class _FusingDecoder(_Decoder):
    """One that takes states in the place of tokens (``targets.executorch.images.FusingWalk``)."""

    def __init__(self, method: Any, *, hidden: int) -> None:
        self._method = method
        self._tiles, self._shown, self._states = 0, False, [torch.zeros(1, 0, hidden)]

    def _seen(self, tiles: Any, first: int, count: int) -> list[torch.Tensor]:
        seen = None if tiles is None else torch.from_numpy(tiles[first : first + count])
        return [*in_place(self._states[0], seen, length=count)]


def _input_sizes(method: Any) -> list[tuple[int, ...]]:
    """Of every input of a method, its largest."""
    meta = method.method_meta()
    return [tuple(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())]


def _import_runtime() -> Any:
    with border.toolchain("load its kernels"):
        from executorch.extension.pybindings import _portable_lib as runtime

        for package, pattern in _KERNEL_LIBRARIES.items():
            (library,) = Path(str(resources.files(package))).glob(pattern)
            torch.ops.load_library(library)
    return runtime


if __name__ == "__main__":
    main(*sys.argv[1:])
