"""Graph + WeightStore -> ``model.onnx``: a table from our ops to ONNX Runtime's, in the form onnxruntime-genai loads.

Linears become MatMulNBits, or products of int8 by int8 where prefill is preferred, attention GroupQueryAttention with
its rotary embedding built in and a cache that past and present share. Weights are drawn from the store one at a time
while the external data file is written.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.errors import ExportError, LoweringError
from exporter.model.graph import EXPERT, Constant, Graph, Value, Weight, cache_names
from exporter.model.ops import FLOOR, places, temperatures
from exporter.model.rope import rope_table
from exporter.model.static import with_static_caches
from exporter.quantized import QuantizedTensor, pack_int4
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD, SMALLEST_ABSMAX, Logits, Plan, Prefer, activation_block
from exporter.store import WeightStore
from targets.onnxruntime.read import JOINT

OPSET = 21
MICROSOFT = "com.microsoft"
IR_VERSION = 10
FLOAT, INT64, INT8 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT8
_ZERO_POINT = {4: 8, 8: 128}
"""MatMulNBits stores unsigned codes; without a zero-point input it subtracts these."""

_MIDDLE = np.uint8(128)
"""Where int8 activations have their zero. They are uint8, since ONNX Runtime takes some 40 times as long for int8 by
int8 on x86 (measured with 1.31)."""

WRITE_AHEAD_BYTES = 128 << 20


def lower(
    graph: Graph, store: WeightStore, plan: Plan, *, path: Path, data_name: str, emitter: type[Emitter] | None = None
) -> None:
    """Write ``path`` and, beside it, its weights in the file ``data_name``. Raises LoweringError or OSError."""
    if plan.kv_cache:
        graph = with_static_caches(graph, store.read_cache_ranges())
    with mapped_errors(path, data_name=data_name):
        model = (emitter or Emitter)(graph, store, plan).build()
        ir.save(model, path, external_data=data_name, max_workers=1, max_in_flight_bytes=WRITE_AHEAD_BYTES)


@contextmanager
def mapped_errors(path: Path, *, data_name: str) -> Iterator[None]:
    """Around the writing of ``path`` with its weights in ``data_name``: what fails is a LoweringError or an OSError."""
    try:
        yield
    except ExportError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy tells a short write ("32768 requested and 8192 written") without a number.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.with_name(data_name))) from error
    except Exception as error:  # onnx_ir and protobuf raise errors of their own, without a common base
        raise LoweringError(
            f"onnx_ir could not write {path.name}: {type(error).__name__}: {error}",
            hint="this is a fault of llama-export: please report it with the model's config.json",
        ) from error


class Emitter:
    """Collects nodes and initializers while the graph is walked; a value is an ``ir.Value`` all the way."""

    accuracy_level: ClassVar[int] = 4
    """How MatMulNBits is asked to multiply: 4 allows activations in int8, 0 asks for floats."""

    def __init__(self, graph: Graph, store: WeightStore, plan: Plan) -> None:
        self._graph = graph
        self._store = store
        self._plan = plan
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._attention_lengths: tuple[ir.Value, ir.Value] | None = None
        self._inputs: tuple[ir.Value, ir.Value] | None = None
        self._once: dict[Any, ir.Value] = {}
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._zero_points: ir.Value | None = None
        self._packed: dict[str, tuple[Weight, ...]] = {}

    def build(self) -> ir.Model:
        spec, caches = self._graph.spec, cache_names(self._graph.spec.num_hidden_layers)
        input_ids = _value("input_ids", INT64, ("batch_size", "sequence_length"))
        attention_mask = _value("attention_mask", INT64, ("batch_size", "total_sequence_length"))
        cached = INT8 if self._plan.kv_cache else FLOAT
        past_shape = ("batch_size", spec.num_key_value_heads, "past_sequence_length", spec.head_dim)
        present_shape = ("batch_size", spec.num_key_value_heads, "total_sequence_length", spec.head_dim)
        past = {
            f"past_{name}": _value(genai_name("past_key_values", name), cached, past_shape) for name in _flat(caches)
        }

        self._inputs = input_ids, attention_mask
        self._attention_lengths = self._lengths(attention_mask)
        self._packed = self._packed_products()
        others = self._other_inputs()
        outputs = self._graph.run(self._table(), {"ids": input_ids, **past, **others})

        logits = outputs["logits"]
        logits.name, logits.dtype = "logits", FLOAT
        logits_length = 1 if self._plan.logits is Logits.LAST else "sequence_length"
        logits.shape = ir.Shape(("batch_size", logits_length, spec.vocab_size))
        presents = []
        for name in _flat(caches):
            present = outputs[f"present_{name}"]
            present.name, present.dtype = genai_name("present", name), cached
            present.shape = ir.Shape(present_shape)
            presents.append(present)
        return self._model([input_ids, attention_mask, *past.values(), *others.values()], [logits, *presents])

    def _other_inputs(self) -> dict[str, ir.Value]:
        """By our names, in the order in which the file has them."""
        return {}

    def _model(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        fuse_residual_norms(self._nodes)
        onnx_graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=self._graph.spec.name,
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
            "head_norm": self._head_norm,
            "temper": self._temper,
            "route": self._route,
            "gate": self._gate,
            "spread": self._spread,
            EXPERT: self._expert,
        }

    def _embedding(self, ids: ir.Value, weight: Weight) -> ir.Value:
        """Gather rows of codes and dequantize those alone, so that a tied head and the embedding share one tensor."""
        if not self._store.scheme.precision(weight.name).bits:
            return self._rows(ids, self._dense(weight))
        codes, scales, zeros, bits, block = self._codes(weight)
        rows = self._op("Gather", codes, ids)  # uint8 [1, T, K/b, b*bits/8]
        if bits == 4:
            rows = self._unpack_int4(rows)  # uint8 [1, T, K/b, b]
        middle = self._constant(float(_ZERO_POINT[bits]))
        if zeros is not None:
            points = self._op("Unsqueeze", self._op("Gather", zeros, ids), self._constant([2]))  # uint8 [1, T, 1, z]
            if bits == 4:
                points = self._unpack_int4(points)
            count = [0, 0, weight.shape[1] // block, 1]
            middle = self._op("Reshape", self._to_float(points), self._constant(count))
        centred = self._op("Sub", self._to_float(rows), middle)
        row_scales = self._op("Unsqueeze", self._op("Gather", scales, ids), self._constant([-1]))  # [1, T, K/b, 1]
        return self._op("Reshape", self._op("Mul", centred, row_scales), self._constant([0, 0, weight.shape[1]]))

    def _rows(self, ids: ir.Value, weight: ir.Value) -> ir.Value:
        return self._to_float(self._op("Gather", weight, ids))

    def _unpack_int4(self, packed: ir.Value) -> ir.Value:
        low = self._op("BitwiseAnd", packed, self._constant(np.uint8(15)))
        high = self._op("BitShift", packed, self._constant(np.uint8(4)), direction="RIGHT")
        last = self._constant([-1])
        pairs = self._op("Concat", self._op("Unsqueeze", low, last), self._op("Unsqueeze", high, last), axis=-1)
        return self._op("Reshape", pairs, self._constant([0, 0, 0, -1]))

    def _packed_products(self) -> dict[str, tuple[Weight, ...]]:
        """Of each weight that gives queries, keys or values: all three, where they read one value and have codes of one
        kind. They are multiplied at once, as their rows one below the other, for ``_attention`` to take apart."""
        products: dict[Any, tuple[Any, ...]] = {
            Value(node.name): node.arguments for node in self._graph.nodes if node.op == "linear"
        }
        packed: dict[str, tuple[Weight, ...]] = {}
        for node in self._graph.nodes:
            if node.op != "attention" or not all(value in products for value in node.arguments[:3]):
                continue
            inputs, weights = zip(*(products[value] for value in node.arguments[:3]), strict=True)
            kinds = {self._kind(weight) for weight in weights}
            if len(set(inputs)) == 1 and len(kinds) == 1 and None not in kinds:
                packed |= dict.fromkeys((weight.name for weight in weights), weights)
        return packed

    def _kind(self, weight: Weight) -> tuple[int, int, bool] | None:
        """Bits and group size of a weight that is a MatMulNBits, and whether it has zero points."""
        scheme = self._store.scheme
        bits = scheme.precision(weight.name).bits
        if not bits or self._multiplies_integers(weight):
            return None
        return bits, scheme.groups(weight.name, columns=weight.shape[1]), self._has_zeros(weight)

    def _has_zeros(self, weight: Weight) -> bool:
        kept = self._store.scheme.kept_kind(weight.name)
        return kept is not None and kept.zero_points

    def _multiplies_integers(self, weight: Weight) -> bool:
        return self._plan.prefer is Prefer.PREFILL and weight.name not in (EMBEDDING, HEAD)

    def _linear(self, x: ir.Value, weight: Weight) -> ir.Value | None:
        """Of weights that are multiplied at once, all that the first gives, and nothing of the others."""
        rows, columns = weight.shape
        if not self._store.scheme.precision(weight.name).bits:
            return self._product(x, self._to_float(self._dense(weight)))
        if self._multiplies_integers(weight):
            return self._integer_product(x, weight)
        at_once = self._packed.get(weight.name, (weight,))
        if weight is not at_once[0]:
            return None
        rows = sum(one.shape[0] for one in at_once)
        codes, scales, zeros, bits, block = self._codes(*at_once)
        return self._op(
            "MatMulNBits",
            *(x, codes, scales, *([] if zeros is None else [zeros])),
            domain=MICROSOFT,
            **{"N": rows, "K": columns, "bits": bits, "block_size": block, "accuracy_level": self.accuracy_level},
        )

    def _product(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """``x`` ``[B, T, K]`` times a weight ``[N, K]`` of floats."""
        product: ir.Value = self._op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)
        return product

    def _integer_product(self, x: ir.Value, weight: Weight) -> ir.Value:
        rows, columns = weight.shape
        codes = self._initializer(f"{weight.name}.codes", INT8, (columns, rows), lambda: self._read(weight).codes.T)
        scales = self._initializer(f"{weight.name}.scales", FLOAT, (rows,), lambda: self._read(weight).scales[:, 0])
        rounded, steps = self._round_tokens(x, columns=columns)
        one, middle = self._constant(1.0), self._constant(_MIDDLE)
        product = self._op("MatMulIntegerToFloat", rounded, codes, one, scales, middle, domain=MICROSOFT)
        return self._op("Mul", product, steps)

    def _round_tokens(self, x: ir.Value, *, columns: int) -> tuple[ir.Value, ir.Value]:
        """``x`` ``[B, T, K]`` as uint8 ``[B, T, K]`` with its zero at 128, and the step of each token, float
        ``[B, T, 1]``; once for all linears that have the same input."""
        if x not in self._rounded:
            last = self._constant([-1])
            highest = self._op("ReduceMax", x, last, keepdims=1)
            lowest = self._op("ReduceMin", x, last, keepdims=1)
            largest = self._op("Max", highest, self._op("Neg", lowest), self._constant(SMALLEST_ABSMAX))
            steps = self._op("Div", largest, self._constant(127.0))
            # QuantizeLinear takes one scale per row in a vector.
            flat_steps = self._op("Reshape", steps, last)  # [B * T]
            if self._zero_points is None:  # all tokens of a call pass every layer, and all of an expert its linears
                middle = ir.tensor(np.array([_MIDDLE]))
                self._zero_points = self._op("ConstantOfShape", self._op("Shape", flat_steps), value=middle)
            flat_x = self._op("Reshape", x, self._constant([-1, columns]))  # [B * T, K]
            rounded = self._op("QuantizeLinear", flat_x, flat_steps, self._zero_points, axis=0)
            self._rounded[x] = self._op("Reshape", rounded, self._op("Shape", x), allowzero=1), steps
        return self._rounded[x]

    def _rms_norm(self, x: ir.Value, weight: Weight, eps: float) -> ir.Value:
        if weight.name == FINAL_NORM and self._plan.logits is Logits.LAST:
            end = self._constant([np.iinfo(np.int64).max])
            x = self._op("Slice", x, self._constant([-1]), end, self._constant([1]))  # [1, T, H] -> [1, 1, H]
        return self._op("SimplifiedLayerNormalization", x, self._dense(weight), axis=-1, epsilon=eps, stash_type=1)

    def _attention(
        self,
        q: ir.Value,
        k: ir.Value | None,
        v: ir.Value | None,
        past_k: ir.Value,
        past_v: ir.Value,
        inv_freq: Constant | None,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
        chunk: int,
        key_scales: Constant | None = None,
        value_scales: Constant | None = None,
    ) -> tuple[ir.Value, ...]:
        """GroupQueryAttention takes ``q`` for all three where it gets no ``k`` and ``v``. Its cache is int8 where
        scales are given (``exporter.model.static.with_static_caches``)."""
        assert self._attention_lengths is not None  # set before the walk
        tables = self._rope_tables(inv_freq) if inv_freq else (None, None)
        bias = self._chunk_bias(chunk) if 0 < chunk < self._plan.context else None
        scales: tuple[ir.Value | None, ...] = (None, bias) if bias else ()
        kinds: dict[str, str | int] = {}
        if key_scales and value_scales:
            scales = (None, bias, None, self._cache_scales(key_scales), self._cache_scales(value_scales))
            kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return self._op(
            "GroupQueryAttention",
            *(q, k, v, past_k, past_v, *self._attention_lengths, *tables, *scales),
            domain=MICROSOFT,
            outputs=3,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
            do_rotary=int(inv_freq is not None),
            local_window_size=window or -1,
            **kinds,
        )

    def _chunk_bias(self, chunk: int) -> ir.Value:
        """What is added to the scores so that a query sees the keys of its own chunk alone: float ``[B, 1, T, S]``,
        for all layers."""

        def make() -> ir.Value:
            _, mask = self._known_inputs()
            size = self._constant(chunk)
            one = self._constant(1)
            total = self._op("Gather", self._op("Shape", mask), one)
            theirs = self._op("Div", self._op("Range", self._constant(0), total, one), size)  # [S]
            own = self._op("Div", self._positions(), size)  # [B, T]
            seen = self._op("Equal", self._op("Unsqueeze", own, self._constant([1, 3])), theirs)
            return self._op("Where", seen, self._constant(0.0), self._constant(float(np.finfo(np.float32).min)))

        return self._made_once(("chunk", chunk), make)

    def _positions(self) -> ir.Value:
        """Of the tokens of the call: int64 ``[B, T]``."""

        def make() -> ir.Value:
            ids, mask = self._known_inputs()
            zero, one = self._constant(0), self._constant(1)
            length = self._op("Gather", self._op("Shape", ids), one)
            first = self._op("Sub", self._op("ReduceSum", mask, self._constant([1]), keepdims=1), length)  # [B, 1]
            return self._op("Add", first, self._op("Range", zero, length, one))

        return self._made_once("positions", make)

    def _known_inputs(self) -> tuple[ir.Value, ir.Value]:
        assert self._inputs is not None  # set before the walk
        return self._inputs

    def _made_once(self, key: object, make: Callable[[], ir.Value]) -> ir.Value:
        """What all layers need, made for the first that asks."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def _head_norm(self, x: ir.Value, head_dim: int, eps: float, weight: Weight | None = None) -> ir.Value:
        ones = f"constant.ones.{head_dim}"
        gains = (
            self._dense(weight) if weight else self._initializer(ones, FLOAT, (head_dim,), lambda: torch.ones(head_dim))
        )
        heads = self._op("Reshape", x, self._constant([0, 0, -1, head_dim]))
        normed = self._op("SimplifiedLayerNormalization", heads, gains, axis=-1, epsilon=eps, stash_type=1)
        return self._op("Reshape", normed, self._op("Shape", x))

    def _temper(self, q: ir.Value, _past_k: ir.Value, floor_scale: int, attn_scale: float) -> ir.Value:
        count = self._plan.context
        if count < floor_scale:  # all are 1
            return q
        table = temperatures(first=0, count=count, floor_scale=floor_scale, attn_scale=attn_scale)
        stored = self._initializer("constant.temperatures", FLOAT, (count,), lambda: table)

        def make() -> ir.Value:
            return self._op("Unsqueeze", self._op("Gather", stored, self._positions()), self._constant([2]))

        return self._op("Mul", q, self._made_once("temperatures", make))

    def _route(self, logits: ir.Value, count: int) -> ir.Value:
        largest, chosen = self._op("TopK", logits, self._constant([count]), outputs=2, axis=-1)
        none = self._op("ConstantOfShape", self._op("Shape", logits), value=ir.tensor(np.zeros(1, dtype=np.float32)))
        return self._op("ScatterElements", none, chosen, self._op("Sigmoid", largest), axis=-1)

    def _gate(self, x: ir.Value, scores: ir.Value, expert: int) -> ir.Value:
        return self._op("Mul", x, self._op("Gather", scores, self._constant([expert]), axis=2))

    def _expert(
        self, x: ir.Value, scores: ir.Value, total: ir.Value, expert: int, inside: Callable[..., ir.Value]
    ) -> ir.Value:
        """Computed for the tokens that chose it: none or more of them, as rows ``[1, n, H]``. A kernel that is given no
        rows does nothing."""
        own = self._op("Gather", scores, self._constant(expert), axis=2)  # [B, T]
        places = self._op("Transpose", self._op("NonZero", own), perm=[1, 0])  # [n, 2]
        first = self._constant([0])
        rows = (self._op("Unsqueeze", self._op("GatherND", value, places), first) for value in (x, scores, total))
        for_all, self._zero_points = self._zero_points, None  # these are fewer tokens
        added = inside(*rows)
        self._zero_points = for_all
        result: ir.Value = self._op("ScatterND", total, places, self._op("Squeeze", added, first))
        return result

    def _cache_scales(self, scales: Constant) -> ir.Value:
        """float32 ``[KV * D]``"""
        flat = scales.value.flatten()
        return self._initializer(scales.name, FLOAT, tuple(flat.shape), lambda: flat)

    def _lengths(self, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What GroupQueryAttention wants to know: the index of each sequence's last token, and the longest length."""
        used = self._op("ReduceSum", attention_mask, self._constant([1]), keepdims=0)
        last_index = self._op("Cast", self._op("Sub", used, self._constant([1])), to=ir.DataType.INT32)
        longest = self._op("Gather", self._op("Shape", attention_mask), self._constant(1), axis=0)
        return last_index, self._op("Cast", longest, to=ir.DataType.INT32)

    def _rope_tables(self, inv_freq: Constant) -> tuple[ir.Value, ir.Value]:
        cos, sin = rope_table(inv_freq.value, first=0, count=self._plan.context)
        return (
            self._initializer(f"{inv_freq.name}.cos", FLOAT, tuple(cos.shape), lambda: cos),
            self._initializer(f"{inv_freq.name}.sin", FLOAT, tuple(sin.shape), lambda: sin),
        )

    def _codes(self, *weights: Weight) -> tuple[ir.Value, ir.Value, ir.Value | None, int, int]:
        """Of weights of one kind, one below the other: initializers of unsigned codes ``[N, K/b, b*bits/8]``, scales
        ``[N, K/b]`` and, if they have them, zero points ``[N, K/b*bits/8]``; bits; the block size b."""
        name, rows = JOINT.join(weight.name for weight in weights), sum(weight.shape[0] for weight in weights)
        columns = weights[0].shape[1]
        scheme = self._store.scheme
        bits = scheme.precision(weights[0].name).bits
        assert bits is not None  # both callers have asked
        group_size = scheme.groups(weights[0].name, columns=columns)
        block = activation_block(columns=columns, group_size=group_size)
        blocks = columns // block
        codes = self._initializer(
            f"{name}.codes",
            ir.DataType.UINT8,
            (rows, blocks, block * bits // 8),
            lambda: torch.cat([unsigned_codes(self._read(weight)) for weight in weights]).view(rows, blocks, -1),
        )
        scales = self._initializer(
            f"{name}.scales",
            FLOAT,
            (rows, blocks),
            lambda: torch.cat([self._read(weight).scales for weight in weights]).repeat_interleave(
                group_size // block, dim=1
            ),
        )
        zeros = None
        if self._has_zeros(weights[0]):
            zeros = self._initializer(
                f"{name}.zeros",
                ir.DataType.UINT8,
                (rows, math.ceil(blocks * bits / 8)),
                lambda: torch.cat([unsigned_zeros(self._read(weight), blocks=blocks) for weight in weights]),
            )
        return codes, scales, zeros, bits, block

    def _read(self, weight: Weight) -> QuantizedTensor:
        stored = self._store[weight.name]
        assert isinstance(stored, QuantizedTensor)  # the scheme has said so
        return stored

    def _spread(self, logits: ir.Value, tokens: Constant, vocab_size: int) -> ir.Value:
        """One column more, which all tokens are taken from that the head has no row of."""
        wider = self._op("Pad", logits, self._constant([0, 0, 0, 0, 0, 1]), self._constant(FLOOR))
        found = places(tokens.value, vocab_size)
        return self._op(
            "Gather", wider, self._initializer(f"constant.{tokens.name}", INT64, (vocab_size,), lambda: found), axis=-1
        )

    def _dense(self, weight: Weight) -> ir.Value:
        def read() -> Tensor:
            stored = self._store[weight.name]
            assert isinstance(stored, Tensor)
            return stored

        half = len(weight.shape) == 2 and self._store.scheme.precision(weight.name) == "fp16"
        return self._initializer(weight.name, ir.DataType.FLOAT16 if half else FLOAT, weight.shape, read)

    def _to_float(self, x: ir.Value) -> ir.Value:
        return x if x.dtype == FLOAT else self._op("Cast", x, to=FLOAT)

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Tensor]
    ) -> ir.Value:
        """A tensor that is read when the file is written; asked for twice, it is still stored once."""
        if name not in self._initializers:
            lazy = ir.LazyTensor(
                lambda: ir.Tensor(read().contiguous().numpy(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
            )
            value = _value(name, dtype, shape)
            value.const_value = lazy
            self._initializers[name] = value
        return self._initializers[name]

    def _constant(self, content: list[int] | int | float | np.uint8) -> ir.Value:
        """A small initializer, named after what it holds: an int64 list or scalar, a float or a byte."""
        array = np.asarray(content, dtype=np.float32 if isinstance(content, float) else None)
        name = f"constant.{array.dtype}.{'_'.join(map(str, array.ravel()))}" + (".list" if array.ndim else "")
        return self._initializer(
            name, ir.DataType.from_numpy(array.dtype), array.shape, lambda: torch.from_numpy(array.copy())
        )

    def _op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its only output, or the tuple of them. Dtypes are tracked where ``_to_float`` looks."""
        name = f"{op_type}_{len(self._nodes)}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}.{index}"
        if op_type == "Gather" and inputs[0] is not None and inputs[0].dtype is not None:
            node.outputs[0].dtype = inputs[0].dtype
        if op_type == "Cast":
            node.outputs[0].dtype = attributes["to"]
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)


def fuse_residual_norms(nodes: list[ir.Node]) -> None:
    """Add followed by a norm -> SkipSimplifiedLayerNormalization, which does both and gives the sum as well."""
    for norm in [node for node in nodes if node.op_type == "SimplifiedLayerNormalization"]:
        total, gamma = norm.inputs
        add = total.producer() if total is not None else None
        if add is None or add.op_type != "Add":
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, gamma],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=MICROSOFT,
            num_outputs=4,
            name=norm.name,
        )
        for old, new in ((norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[3])):
            new.name, old.name = old.name, None
            old.replace_all_uses_with(new)
        fused.outputs[1].name = fused.outputs[2].name = ""
        nodes[nodes.index(norm)] = fused
        nodes.remove(add)


def genai_name(prefix: str, cache: str) -> str:
    """onnxruntime-genai's name of a cache: ``k.3`` -> ``past_key_values.3.key``."""
    kind, layer = cache.split(".")
    return f"{prefix}.{layer}.{'key' if kind == 'k' else 'value'}"


def unsigned_codes(tensor: QuantizedTensor) -> Tensor:
    """MatMulNBits' codes: offset by half the range, int4 packed two to a byte, low nibble first; uint8."""
    if tensor.bits == 4:
        return pack_int4(tensor.codes ^ -8)  # flips the sign bit of the nibble: -8..7 -> 0..15
    return tensor.codes.view(torch.uint8) ^ 0x80


def unsigned_zeros(tensor: QuantizedTensor, *, blocks: int) -> Tensor:
    """MatMulNBits' zero points, laid out like codes over so many blocks of a row: an odd one out is followed by 0."""
    assert tensor.zeros is not None  # the scheme has said so
    zeros = tensor.zeros.repeat_interleave(blocks // tensor.zeros.shape[1], dim=1)
    if tensor.bits == 8:
        return zeros.view(torch.uint8) ^ 0x80
    return pack_int4(F.pad(zeros ^ -8, (0, blocks % 2)))


def _flat(caches: list[tuple[str, str]]) -> list[str]:
    return [name for pair in caches for name in pair]


def _value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
