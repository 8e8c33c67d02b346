"""Runs graphs of fixed length: any number of tokens in padded calls, with one cache that the runner writes itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import LoweringError
from exporter.spec import Artifact
from targets.base import BaseRunner
from targets.onnxruntime.fixed import MASKED, NEW, PAST

ort.set_default_logger_severity(3)  # as in targets.onnxruntime.runner


@dataclass(slots=True)
class FixedCalls:
    """Sessions of graphs as ``fixed.FixedEmitter`` describes them, by their length, and the cache that they share:
    float, keys as columns ``[1, KV, D, C]`` and values ``[1, KV, C, D]``."""

    sessions: Mapping[int, Any]
    caches: dict[str, NDArray[Any]] = field(init=False)
    context: int = field(init=False)
    _every_row: bool = field(init=False)

    def __post_init__(self) -> None:
        if 1 not in self.sessions:
            raise ValueError(f"lengths are {sorted(self.sessions)}, one of them must be 1")
        inputs = {value.name: value for value in self.sessions[1].get_inputs()}
        self.context = inputs["attention_mask"].shape[-1] - 1
        (logits,) = (value for value in self.sessions[max(self.sessions)].get_outputs() if value.name == "logits")
        self._every_row = logits.shape[1] > 1
        self.caches = {
            name.removeprefix(PAST): np.zeros(value.shape, dtype=_float_of(value))
            for name, value in inputs.items()
            if name.startswith(PAST)
        }

    def feed(self, ids: Sequence[int], *, position: int) -> NDArray[np.float32]:
        """Append ``ids`` after the first ``position`` of the cache; logits ``[1, V]`` or ``[T, V]`` as the graphs have
        them."""
        rows = [results["logits"][0] for results in self.steps(ids, position=position)]
        return np.concatenate(rows if self._every_row else rows[-1:]).astype(np.float32)

    def steps(self, ids: Sequence[int], *, position: int) -> Iterator[dict[str, NDArray[Any]]]:
        """What each call gives for its part of ``ids``, without what was only padding."""
        longest = max(self.sessions)
        for start in range(0, len(ids), longest):
            part = ids[start : start + longest]
            yield self._step(part, position=position + start)

    def _step(self, ids: Sequence[int], *, position: int) -> dict[str, NDArray[Any]]:
        count = len(ids)
        length = 1 if count == 1 else max(self.sessions)
        session = self.sessions[length]
        padded = np.zeros((1, length), dtype=np.int32)
        padded[0, :count] = ids
        feeds = {
            "input_ids": padded,
            "position_ids": np.minimum(np.arange(position, position + length), self.context - 1).astype(np.int32),
            "attention_mask": self._mask(length, position=position),
            "logits_index": np.array([count - 1], dtype=np.int32),
            **{f"{PAST}{name}": cache for name, cache in self.caches.items()},
        }
        wanted = {value.name for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        found = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
        results = dict(zip(names, found, strict=True))
        for name, cache in self.caches.items():
            new = results.pop(f"{NEW}{name}")
            if name.endswith("key"):
                cache[..., position : position + count] = new[..., :count]
            else:
                cache[:, :, position : position + count] = new[:, :, :count]
        return {name: value[:, :count] for name, value in results.items()}

    def _mask(self, length: int, *, position: int) -> NDArray[Any]:
        """Of the cache a token sees what has been fed, and of the call itself what comes before it."""
        dtype = next(iter(self.caches.values())).dtype
        mask = np.full((1, 1, length, self.context + length), MASKED, dtype=dtype)
        mask[..., :position] = 0
        mask[..., self.context :][:, :, *np.tril_indices(length)] = 0
        return mask


class Calls(Protocol):
    """Whoever runs calls of one loaded artifact: this process or another."""

    load_s: float

    def run(self, calls: Sequence[Sequence[int]], *, position: int) -> tuple[NDArray[np.float32], Sequence[float]]:
        """Feed ``calls`` after the first ``position`` tokens; the logits of the last, and the seconds of each."""
        ...

    def close(self) -> None: ...


class CpuCalls:
    """Graphs on ONNX Runtime's own CPU provider, in this process. Raises LoweringError."""

    def __init__(self, models: Mapping[int, bytes], *, folder: Path, threads: int) -> None:
        """``models``: serialized graphs by their length, on weights that lie in ``folder``."""
        started = time.perf_counter()
        self._calls = FixedCalls({length: open_on_cpu(m, folder, threads=threads) for length, m in models.items()})
        self.load_s = time.perf_counter() - started

    def run(self, calls: Sequence[Sequence[int]], *, position: int) -> tuple[NDArray[np.float32], Sequence[float]]:
        try:
            return timed(self._calls, calls, position=position)
        except Exception as error:  # onnxruntime raises a class of its own for each status code, without a common base
            raise LoweringError(f"ONNX Runtime failed while running: {error}", hint="export the model again") from error

    def close(self) -> None:
        del self._calls


def timed(
    fixed: FixedCalls, calls: Sequence[Sequence[int]], *, position: int
) -> tuple[NDArray[np.float32], list[float]]:
    """``Calls.run`` on sessions of this process."""
    steps_s = []
    for ids in calls:
        started = time.perf_counter()
        logits = fixed.feed(ids, position=position)
        steps_s.append(time.perf_counter() - started)
        position += len(ids)
    return logits, steps_s


class FixedRunner(BaseRunner):
    """One artifact of fixed graphs with one key-value cache, wherever its calls are run."""

    def __init__(self, artifact: Artifact, calls: Calls) -> None:
        super().__init__(artifact)
        self._calls = calls
        self.load_s = calls.load_s

    def feed(self, ids: Sequence[int]) -> Tensor:
        return self._run([list(ids)], ids)

    def feed_each(self, ids: Sequence[int]) -> Tensor:
        return self._run([[token] for token in ids], ids)

    def _run(self, calls: Sequence[Sequence[int]], ids: Sequence[int]) -> Tensor:
        self._check_feed(ids)
        logits, self.steps_s = self._calls.run(calls, position=self._position)
        self._position += len(ids)
        return torch.from_numpy(logits)

    def close(self) -> None:
        self._calls.close()


def open_on_cpu(model: bytes, folder: Path, *, threads: int) -> Any:
    """A session of a serialized graph whose weights lie in ``folder``. Raises LoweringError."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    # Else it makes MatMulNBits of codes that are dequantized and multiplied, which rounds the activations to int8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see above
        raise LoweringError(f"ONNX Runtime cannot load a graph: {error}", hint="export the model again") from error


def in_float32(path: Path) -> bytes:
    """The graph in ``path`` with no activation rounded and nothing else changed: every float16 a float32, and no
    QuantizeLinear."""
    import onnx
    from onnx import TensorProto
    from onnx.helper import make_node

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    wide = {one.name: f"{one.name}.float" for one in graph.initializer if one.data_type == TensorProto.FLOAT16}
    nodes = [make_node("Cast", [name], [cast], to=TensorProto.FLOAT) for name, cast in wide.items()]
    plain: dict[str, str] = {}  # from the name of codes to that of what they stand for
    for node in graph.node:
        inputs = [wide.get(name, name) for name in node.input]
        if node.op_type == "QuantizeLinear":
            plain[node.output[0]] = inputs[0]
            continue
        if node.op_type == "DequantizeLinear" and inputs[0] in plain:
            nodes.append(make_node("Identity", [plain[inputs[0]]], [node.output[0]]))
            continue
        node.input[:] = inputs
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    read = {name for node in nodes for name in node.input}
    initializers = [initializer for initializer in graph.initializer if initializer.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    return model.SerializeToString()


def _float_of(value: Any) -> Any:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
