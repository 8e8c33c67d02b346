"""Every value that a ``model.onnx`` computes and our graph has a name for: the file itself, looked into while it runs.

The file's own names say nothing, so each value is found by what surely marks it: the weight it was multiplied with, the
cache it was written to, or the values it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import torch

from exporter.errors import LoweringError
from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.reference import FULL_PRECISION
from exporter.spec import Artifact
from targets.base import Observation
from targets.onnxruntime.fixed_runner import FixedCalls, in_float32, open_on_cpu
from targets.onnxruntime.read import JOINT
from targets.onnxruntime.runner import without_activation_rounding

if TYPE_CHECKING:
    import onnx

_LINEARS = ("MatMulNBits", "FusedMatMul", "MatMul", "MatMulIntegerToFloat")
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


class Taps:
    """Where the values of our graph lie in a file: ``found[value]`` is a name there, and the rows of the last axis that
    are meant, where several products are one. A value that has no counterpart is absent."""

    def __init__(self, model: onnx.ModelProto, graph: Graph) -> None:
        self._nodes = list(model.graph.node)
        self._graph = graph
        self._weights = {initializer.name for initializer in model.graph.initializer}
        self.found: dict[Value, tuple[str, slice]] = {}
        for node in graph.nodes:
            for index, tap in enumerate(self._tap(node)):
                if tap is not None:
                    self.found[Value(node.name, index)] = tap

    def _tap(self, node: Node) -> list[tuple[str, slice] | None]:
        whole = slice(None)
        match node.op:
            case "embedding":
                (norm,) = [n for n in self._graph.nodes if n.op == "rms_norm" and Value(node.name) in n.arguments]
                file_norm = self._by_weight(_NORMS, norm.arguments[1])
                return [(file_norm.input[0], whole) if file_norm else None]
            case "rms_norm":
                file_norm = self._by_weight(_NORMS, node.arguments[1])
                return [(file_norm.output[0], whole) if file_norm else None]
            case "linear":
                return [self._linear(node.arguments[1])]
            case "attention":
                return self._attention(node)
        inputs = [self.found.get(argument) for argument in node.arguments if isinstance(argument, Value)]
        if None in inputs:
            return [None]
        name = self._elementwise(node.op, {tap[0] for tap in inputs if tap})
        return [(name, whole) if name else None]

    def _by_weight(self, kinds: Sequence[str], weight: object) -> onnx.NodeProto | None:
        assert isinstance(weight, Weight)  # VOCABULARY
        return next((n for n in self._nodes if n.op_type in kinds and weight.name in n.input), None)

    def _linear(self, weight: object) -> tuple[str, slice] | None:
        assert isinstance(weight, Weight)  # VOCABULARY
        shapes = self._graph.spec.weights()
        for node in self._nodes:
            if node.op_type not in _LINEARS:
                continue
            for name in map(self._as_stored, node.input):
                names = name.removesuffix(".codes").split(JOINT)
                stored = self._graph.spec.stored_name(weight.name)
                if stored not in names or name not in self._weights:
                    continue
                output = node.output[0]
                if node.op_type == "MatMulIntegerToFloat":  # times the step of each token
                    (output,) = (n.output[0] for n in self._nodes if n.op_type == "Mul" and output in n.input)
                start = sum(shapes[one][0] for one in names[: names.index(stored)])
                return output, slice(start, start + weight.shape[0])
        return None

    def _as_stored(self, name: str) -> str:
        """The weight that ``name`` is a cast or the transpose of; ``name`` where there is none."""
        changes = (n.input[0] for n in self._nodes if n.op_type in ("Cast", "Transpose") and n.output[0] == name)
        before = None if name in self._weights else next(changes, None)
        return self._as_stored(before) if before is not None else name

    def _attention(self, node: Node) -> list[tuple[str, slice] | None]:
        past = f"past_key_values.{node.layer}.key"
        kind = "GroupQueryAttention"
        file_node = next((n for n in self._nodes if n.op_type == kind and past in n.input), None)
        context = (file_node.output[0], slice(None)) if file_node else None
        return [context, *((f"present.{node.layer}.{kind}", slice(None)) for kind in ("key", "value"))]

    def _padded(self, names: set[str]) -> set[str]:
        return {node.output[0] for node in self._nodes if node.op_type == "Pad" and node.input[0] in names}

    def _elementwise(self, op: str, inputs: set[str]) -> str | None:
        for node in self._nodes:
            read = set(node.input)
            if op == "add" and node.op_type == "SkipSimplifiedLayerNormalization" and inputs <= set(node.input[:2]):
                return node.output[3] if len(node.output) > 3 else None
            if op == "add" and node.op_type == "Add" and inputs == read:
                return node.output[0]
            if op == "mul" and node.op_type == "Mul" and inputs == read:
                return node.output[0]
            if op == "spread" and node.op_type == "Gather" and read & self._padded(inputs):
                return node.output[0]
            if op == "silu" and node.op_type == "Mul" and inputs < read:
                (gate,) = read - inputs
                if any(n.op_type == "Sigmoid" and n.output[0] == gate and set(n.input) == inputs for n in self._nodes):
                    return node.output[0]
        return None


def observe(artifact: Artifact, graph: Graph, calls: Sequence[Sequence[int]], *, threads: int) -> Observation:
    """Every value of ``Taps`` in the file with no activation rounded. Raises LoweringError."""
    taps = Taps(_structure(artifact.path), graph).found
    names = list(dict.fromkeys(name for name, _ in taps.values()))
    session = _open(artifact.path, names, threads=threads)
    spec = graph.spec
    empty = np.zeros((1, spec.num_key_value_heads, 0, spec.head_dim), dtype=np.float32)
    caches = {f"{layer}.{kind}": empty for layer in range(spec.num_hidden_layers) for kind in ("key", "value")}
    wanted = [*names, *(f"present.{cache}" for cache in caches if f"present.{cache}" not in names)]
    seen = []
    position = 0
    for ids in calls:
        position += len(ids)
        feeds = {f"past_key_values.{cache}": content for cache, content in caches.items()}
        feeds["input_ids"] = np.array([list(ids)], dtype=np.int64)
        feeds["attention_mask"] = np.ones((1, position), dtype=np.int64)
        try:
            found = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        except Exception as error:  # onnxruntime has a class for each status code, without a common base
            raise LoweringError(f"ONNX Runtime failed while running: {error}", hint="export the model again") from error
        tensors = {name: torch.from_numpy(found[name]) for name in names}
        seen.append({value: tensors[name][..., rows] for value, (name, rows) in taps.items()})
        caches = {cache: found[f"present.{cache}"] for cache in caches}
        if any(cache.shape[2] != position for cache in caches.values()):
            break  # the kernel takes only caches of one length
    return Observation(arithmetic=FULL_PRECISION, calls=seen)


def observe_fixed(
    paths: Mapping[int, Path], graph: Graph, calls: Sequence[Sequence[int]], *, threads: int
) -> Observation:
    """What every node gives first, in graphs of fixed length by their length, in float32 throughout: there, a value has
    its node's name. Raises LoweringError."""
    names = {node.name: "logits" if node is graph.head else node.name for node in graph.nodes}
    sessions = {
        length: open_on_cpu(_with_outputs(in_float32(path), names.values()), path.parent, threads=threads)
        for length, path in paths.items()
    }
    fixed, seen, position = FixedCalls(sessions), [], 0
    for ids in calls:
        try:
            steps = list(fixed.steps(ids, position=position))
        except Exception as error:  # onnxruntime has a class for each status code, without a common base
            raise LoweringError(f"ONNX Runtime failed while running: {error}", hint="export the model again") from error
        position += len(ids)
        values = {}
        for node, name in names.items():
            parts = [torch.from_numpy(step[name]) for step in steps]
            # Of what is computed for the last token alone, that of the last call is meant.
            each_token = sum(part.shape[1] for part in parts) == len(ids)
            values[Value(node)] = torch.cat(parts, dim=1) if each_token else parts[-1]
        seen.append(values)
    return Observation(arithmetic=FULL_PRECISION, calls=seen)


def _with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """A serialized graph that gives the values called ``names`` as well."""
    import onnx
    from onnx.helper import make_empty_tensor_value_info

    opened = onnx.load_from_string(model)
    outputs = {output.name for output in opened.graph.output}
    opened.graph.output.extend(make_empty_tensor_value_info(name) for name in names if name not in outputs)
    return opened.SerializeToString()


def _open(path: Path, names: Sequence[str], *, threads: int) -> ort.InferenceSession:
    """A session of the file that gives the values called ``names`` as well as its outputs."""
    model = _with_outputs(without_activation_rounding(path), names)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see above
        raise LoweringError(
            f"ONNX Runtime cannot show the values of {path.name}: {error}", hint="export the model again"
        ) from error


def _structure(path: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(path, load_external_data=False)
