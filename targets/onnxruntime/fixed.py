"""Graph + WeightStore -> calls of fixed length in ai.onnx ops alone, for backends that compile shapes in.

Attention is spelled out: rotation by tables, a product with the cached and the new keys, a finite mask, softmax, a
product with the values. The cache is an input; only what is new comes out, for the runner to put in its place. Floats
are float16. A linear with codes stands between QuantizeLinear and DequantizeLinear of static steps, which is how a
backend knows an integer product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from exporter.errors import LoweringError
from exporter.model.graph import Constant, Graph, Node, Weight, cache_names
from exporter.model.rope import rope_table
from exporter.model.static import LinearSteps, Step
from exporter.quantized import QuantizedTensor
from exporter.spec import FINAL_NORM, Logits
from exporter.store import WeightStore
from targets.onnxruntime.lower import WRITE_AHEAD_BYTES, genai_name, mapped_errors
from targets.onnxruntime.read import CODES, ROW_SCALES, ROWS, SCALES

OPSET = 23
"""The first with RMSNormalization."""
IR_VERSION = 11
FLOAT, HALF, INT32 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32

MASKED = -10_000.0
"""What is added to the score of a key that is not to be seen: finite, in reach of float16, nothing after softmax."""

PAST, NEW = "past_key_values", "new_key_values"
_ROW_ZERO = 128


def write_fixed(
    graph: Graph,
    store: WeightStore,
    *,
    context: int,
    logits: Logits,
    steps: Mapping[str, LinearSteps],
    paths: Mapping[int, Path],
    data_name: str,
) -> None:
    """Write a graph for calls of each length in ``paths``, all in one folder, with the weights beside them in the file
    ``data_name``, which they share. Raises LoweringError or OSError."""
    stored: dict[str, ir.TensorProtocol] = {}
    for length, path in paths.items():
        with mapped_errors(path, data_name=data_name):
            emitter = FixedEmitter(graph, store, length=length, context=context, logits=logits, steps=steps)
            model = emitter.build()
            if not stored:
                ir.save(model, path, external_data=data_name, max_workers=1, max_in_flight_bytes=WRITE_AHEAD_BYTES)
                written = ir.load(path).graph.initializers.items()
                stored = {name: value.const_value for name, value in written if value.const_value is not None}
            else:
                for name, value in model.graph.initializers.items():
                    value.const_value = stored.get(name, value.const_value)
                ir.save(model, path)


class FixedEmitter:
    """Emits a graph of ``length`` tokens (T) over a cache of ``context`` positions (C).

    Inputs: ``input_ids`` int32 ``[1, T]``; ``position_ids`` int32 ``[T]``; ``attention_mask`` float16
    ``[1, 1, T, C + T]``, 0 or ``MASKED``, over the cache and then the new tokens; ``logits_index`` int32 ``[1]``, the
    token of the call that gets logits, where it has several and not all do; ``past_key_values.N.key`` float16
    ``[1, KV, D, C]``, keys as columns, and ``past_key_values.N.value`` ``[1, KV, C, D]``. Outputs, float16: ``logits``
    ``[1, 1 or T, V]``, ``new_key_values.N.key`` ``[1, KV, D, T]``, ``new_key_values.N.value`` ``[1, KV, T, D]``.

    The value that a node of ``graph`` gives first has that node's name.
    """

    def __init__(
        self,
        graph: Graph,
        store: WeightStore,
        *,
        length: int,
        context: int,
        logits: Logits,
        steps: Mapping[str, LinearSteps],
    ) -> None:
        self._graph = graph
        self._store = store
        self._length = length
        self._context = context
        self._logits = logits
        self._steps = steps
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._in_half: dict[str, ir.Value] = {}
        self._rounded: dict[tuple[ir.Value, Step], ir.Value] = {}
        self._rotations: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[int, ir.Value] = {}
        self._positions = _value("position_ids", INT32, (length,))
        self._mask = _value("attention_mask", HALF, (1, 1, length, context + length))
        several = logits is Logits.LAST and length > 1
        self._logits_index = _value("logits_index", INT32, (1,)) if several else None

    def build(self) -> ir.Model:
        spec, length, context = self._graph.spec, self._length, self._context
        heads, size = spec.num_key_value_heads, spec.head_dim
        input_ids = _value("input_ids", INT32, (1, length))
        inputs = [input_ids, self._positions, self._mask, *([self._logits_index] if self._logits_index else [])]
        past: dict[str, ir.Value] = {}
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (1, 1 if self._logits is Logits.LAST else length, spec.vocab_size)
        }
        for key, value in cache_names(spec.num_hidden_layers):
            past[f"past_{key}"] = _value(genai_name(PAST, key), HALF, (1, heads, size, context))
            past[f"past_{value}"] = _value(genai_name(PAST, value), HALF, (1, heads, context, size))
            shapes |= {f"present_{key}": (1, heads, size, length), f"present_{value}": (1, heads, length, size)}

        outputs = self._graph.run(self._table(), {"ids": input_ids, **past}, _name)
        results = []
        for name, shape in shapes.items():
            result = outputs[name]
            result.name = genai_name(NEW, name.removeprefix("present_")) if name.startswith("present_") else name
            result.dtype, result.shape = HALF, ir.Shape(shape)
            results.append(result)
        onnx_graph = ir.Graph(
            [*inputs, *past.values()],
            results,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=f"{spec.name}, {length} at a time",
        )
        return ir.Model(onnx_graph, ir_version=IR_VERSION, producer_name="llama-export")

    def _table(self) -> dict[str, Callable[..., Any]]:
        return {
            "embedding": self._embedding,
            "linear": self._linear,
            "rms_norm": self._rms_norm,
            "silu": lambda x: self._op("Mul", x, self._op("Sigmoid", x)),
            "mul": lambda a, b: self._op("Mul", a, b),
            "add": lambda a, b: self._op("Add", a, b),
            "attention": self._attention,
        }

    def _embedding(self, ids: ir.Value, weight: Weight) -> ir.Value:
        """Hexagon looks up in a tensor of one scale: so codes ``[V, H]`` offset by 128, and beside them the scale of
        each row ``[V, 1]``."""
        if not self._is_quantized(weight):
            return self._op("Gather", self._floats(weight), ids)
        codes = self._initializer(
            weight.name + ROWS,
            ir.DataType.UINT8,
            weight.shape,
            lambda: self._read(weight).codes.view(torch.uint8) ^ _ROW_ZERO,
        )
        scales = self._initializer(weight.name + ROW_SCALES, HALF, (weight.shape[0], 1), lambda: self._scales(weight))
        plain = self._half(1.0), self._constant(torch.tensor(_ROW_ZERO, dtype=torch.uint8))
        rows = self._op("Gather", self._op("DequantizeLinear", codes, *plain), ids)
        rows = self._op("DequantizeLinear", self._op("QuantizeLinear", rows, *plain), *plain)
        return self._op("Mul", rows, self._op("Gather", scales, ids))

    def _linear(self, x: ir.Value, weight: Weight) -> ir.Value:
        if not self._is_quantized(weight):
            return self._op("MatMul", x, self._op("Transpose", self._floats(weight), perm=[1, 0]))
        rows, columns = weight.shape
        codes = self._initializer(
            weight.name + CODES, ir.DataType.INT8, (columns, rows), lambda: self._read(weight).codes.T
        )
        scales = self._initializer(weight.name + SCALES, HALF, (rows,), lambda: self._scales(weight)[:, 0])
        steps = self._steps[weight.name]
        matrix = self._op("DequantizeLinear", codes, scales, axis=1)
        return self._round(self._op("MatMul", self._round(x, steps.before), matrix), steps.after)

    def _round(self, x: ir.Value, step: Step) -> ir.Value:
        """Quantized and dequantized again; once for all linears that read the same."""
        if (x, step) not in self._rounded:
            by = self._half(step.scale), self._constant(torch.tensor(step.zero, dtype=torch.uint16))
            self._rounded[x, step] = self._op("DequantizeLinear", self._op("QuantizeLinear", x, *by), *by)
        return self._rounded[x, step]

    def _rms_norm(self, x: ir.Value, weight: Weight, eps: float) -> ir.Value:
        if weight.name == FINAL_NORM and self._logits_index is not None:
            x = self._op("Gather", x, self._logits_index, axis=1)  # [1, T, H] -> [1, 1, H]
        return self._op("RMSNormalization", x, self._floats(weight), axis=-1, epsilon=eps)

    def _attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        past_k: ir.Value,
        past_v: ir.Value,
        inv_freq: Constant | None,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
        chunk: int,
    ) -> tuple[ir.Value, ...]:
        """The query heads that share a key are rows of one product, one head below the other."""
        if window or chunk:
            raise LoweringError(
                f"a graph of fixed length sees every key: it has no window ({window}) and no chunk ({chunk})",
                hint="take another target",
            )
        length, size, group = self._length, self._graph.spec.head_dim, heads // kv_heads
        q, k, v = self._split_heads(q, heads), self._split_heads(k, kv_heads), self._split_heads(v, kv_heads)
        if inv_freq is not None:
            q, k = self._rotate(q, inv_freq), self._rotate(k, inv_freq)
        q = self._reshape(self._op("Mul", q, self._cast(self._constant(torch.tensor(scale)))), 1, kv_heads, -1, size)
        new_k = self._op("Transpose", k, perm=[0, 1, 3, 2])  # [1, KV, D, T]
        keys = self._op("Concat", past_k, new_k, axis=3)  # [1, KV, D, C+T]
        values = self._op("Concat", past_v, v, axis=2)  # [1, KV, C+T, D]
        scores = self._op("Add", self._op("MatMul", q, keys), self._mask_of(group))  # [1, KV, H/KV*T, C+T]
        context = self._op("MatMul", self._op("Softmax", scores, axis=-1), values)  # [1, KV, H/KV*T, D]
        context = self._op("Transpose", self._reshape(context, 1, heads, length, size), perm=[0, 2, 1, 3])
        return self._reshape(context, 1, length, heads * size), new_k, v

    def _split_heads(self, x: ir.Value, count: int) -> ir.Value:
        x = self._reshape(x, 1, self._length, count, self._graph.spec.head_dim)
        return self._op("Transpose", x, perm=[0, 2, 1, 3])  # [1, heads, T, D]

    def _rotate(self, x: ir.Value, inv_freq: Constant) -> ir.Value:
        cos, sin = self._rotation(inv_freq)
        half = self._graph.spec.head_dim // 2
        first, second = self._op("Split", x, self._constant(torch.tensor([half, half])), outputs=2, axis=3)
        turned = self._op("Concat", self._op("Neg", second), first, axis=3)
        return self._op("Add", self._op("Mul", x, cos), self._op("Mul", turned, sin))

    def _rotation(self, inv_freq: Constant) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of the positions of the call, ``[T, D]``; once for all layers."""
        if inv_freq.name not in self._rotations:
            cos, sin = rope_table(inv_freq.value, first=0, count=self._context)
            self._rotations[inv_freq.name] = (
                self._looked_up(f"{inv_freq.name}.cos", cos.repeat(1, 2)),
                self._looked_up(f"{inv_freq.name}.sin", sin.repeat(1, 2)),
            )
        return self._rotations[inv_freq.name]

    def _looked_up(self, name: str, table: Tensor) -> ir.Value:
        """The rows of ``table`` ``[C, D]`` at the positions of the call."""
        stored = self._initializer(name, FLOAT, tuple(table.shape), lambda: table)
        return self._op("Gather", self._cast(stored), self._positions)

    def _mask_of(self, group: int) -> ir.Value:
        """The mask for so many query heads of one key, one below the other; once for all layers."""
        if group not in self._masks:
            self._masks[group] = self._op("Concat", *[self._mask] * group, axis=2) if group > 1 else self._mask
        return self._masks[group]

    def _is_quantized(self, weight: Weight) -> bool:
        return self._store.scheme.precision(weight.name).bits is not None

    def _read(self, weight: Weight) -> QuantizedTensor:
        stored = self._store[weight.name]
        assert isinstance(stored, QuantizedTensor)  # the scheme has said so
        return stored

    def _scales(self, weight: Weight) -> Tensor:
        """float16 ``[N, 1]``, exact: they lie on a grid that float16 has (``exporter.quantized.SMALLEST_SCALE``)."""
        return self._read(weight).scales.half()

    def _floats(self, weight: Weight) -> ir.Value:
        """A matrix in float16, or a vector."""

        def read() -> Tensor:
            stored = self._store[weight.name]
            assert isinstance(stored, Tensor)
            return stored

        if len(weight.shape) == 2:
            return self._initializer(weight.name, HALF, weight.shape, read)
        return self._cast(self._initializer(weight.name, FLOAT, weight.shape, read))

    def _cast(self, x: ir.Value) -> ir.Value:
        """In float16 what float16 does not hold exactly and is therefore stored in float32; it is folded at load."""
        assert x.name is not None  # an initializer
        if x.name not in self._in_half:
            self._in_half[x.name] = self._op("Cast", x, to=HALF)
        return self._in_half[x.name]

    def _reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self._op("Reshape", x, self._constant(torch.tensor(shape)))

    def _half(self, number: float) -> ir.Value:
        return self._constant(torch.tensor(number, dtype=torch.float16))

    def _constant(self, content: Tensor) -> ir.Value:
        """A small initializer, named after what it holds."""
        dtype = ir.DataType.from_numpy(content.numpy().dtype)
        numbers = "_".join(map(str, content.flatten().tolist()))
        name = f"constant.{dtype.name.lower()}.{numbers}" + (".list" if content.dim() else "")
        return self._initializer(name, dtype, tuple(content.shape), lambda: content)

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Tensor]
    ) -> ir.Value:
        """A tensor that is read when the file is written; asked for twice, it is still stored once."""
        if name not in self._initializers:
            value = _value(name, dtype, shape)
            value.const_value = ir.LazyTensor(
                lambda: ir.Tensor(read().contiguous().numpy(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
            )
            self._initializers[name] = value
        return self._initializers[name]

    def _op(self, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its only output, or the tuple of them."""
        name = f"{op_type}_{len(self._nodes)}"
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}.{index}"
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)


def _name(node: Node, _: Sequence[Any], results: tuple[ir.Value, ...]) -> None:
    results[0].name = node.name


def _value(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
