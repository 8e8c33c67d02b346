"""Graph -> MIL for Apple's Neural Engine: fixed lengths, everything a 1x1 convolution over [1, C, 1, T], float16.

A package has two functions that share weights and states: ``prefill`` takes ``prefill_length`` tokens, ``decode`` one.
Features, T being that length:

    inputIds          int32   [1, T]
    position          int32   [1]             of the first of them
    causalMask        float16 [1, 1, T, ctx]  0 where a query may look, -inf where it may not, over the whole context
    lastToken         int32   [1]             which of the T the logits are for (prefill of ``Logits.LAST`` alone)
    keyCache, valueCache  float16 [L, KV, ctx, D], states
    logits            float16 [1, T or 1, V]

Where a model is split, packages hand ``hiddenStates`` float16 [1, C, 1, T] on to each other as ``nextHiddenStates``.

A prompt that does not fill the last prefill is padded: what the padding writes lies behind the text, where no mask lets
a query look, and the next call writes over it.

RMSNorm is one ``layer_norm`` over [x, -x]: their mean is exactly zero, so their variance is the mean square of x, and
no square is ever rounded to float16 or beyond its range (``docs/decisions/0010-rmsnorm-in-float16.md``). Tables of the
rotary embedding are float32 constants, cut at the position and only then rounded: all else is float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from exporter.model.graph import Constant, Graph, Value, Weight, cache_names, walk
from exporter.model.rope import rope_table
from exporter.spec import FINAL_NORM, TABLE_ROWS, Logits, Plan
from exporter.store import WeightStore
from targets.coreml.ane_parts import Part
from targets.coreml.emission import (
    MilVar,
    Slot,
    State,
    cast,
    code_arrays,
    conversion,
    decoded,
    refuse_unknown_attention,
    sizes_of,
)
from targets.coreml.package import block_name, finish, mil_name
from targets.coreml.toolchain import Function, Program, ct, mb, mil_convert, types

PREFILL, DECODE = "prefill", "decode"

LARGEST_SIZE = 16_384
"""Of a tensor on the engines of A13 to A15; those of A16 and later take 65,536 (reported, as ``max_tensor_dim``, at
https://github.com/sbryngelson/ANEForge/pull/240). A head with more rows is cut into blocks of them."""

HIDDEN, NEXT_HIDDEN = "hiddenStates", "nextHiddenStates"
_CHANNELS = 1
"""The axis that a norm goes over and a convolution mixes."""


def lower(graph: Graph, store: WeightStore, plan: Plan, part: Part, path: Path, *, prefill_length: int) -> None:
    """Write the package of one ``part`` at ``path``, a new name ending in ``.mlpackage``. Raises LoweringError."""
    with conversion(path):
        constants = _Constants(store)
        program = Program()
        for name, length in ((PREFILL, prefill_length), (DECODE, 1)):
            mb.name_count.clear()  # the same weight has the same name in both
            program.add_function(name, _Emitter(graph, plan, part, constants, length=length).function())
        program.default_function_name = PREFILL
        program.export_as_multifunction = True
        # What is emitted is what is saved, as in ``lower.py``; ``ct.convert`` takes programs of one function only, so
        # this is the call by which ``ct.utils.save_multifunction`` writes what it has merged.
        program.skip_all_passes = True
        mil_convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            specification_version=ct.target.iOS18.value,
            compute_units=ct.ComputeUnit.CPU_AND_NE,
            skip_model_load=True,
            package_dir=str(path),
        )
    finish(path, model_name=graph.spec.name)


def embedded_name(weight: str) -> str:
    """What the looked-up rows of a weight are called, laid out as channels."""
    return f"{mil_name(weight)}_embedded"


def product_name(weight: str) -> str:
    """What is called so that the blocks of a weight were multiplied to, one behind the other."""
    return f"{mil_name(weight)}_product"


class _Constants:
    """The weights of one package, read from the store once. Each function has a constant of its own for every one,
    which ``weight_id`` makes the same bytes of the weight file."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._arrays: dict[str, Any] = {}

    def blocks(self, weight: Weight, *, largest: int) -> list[MilVar]:
        """float16 [N, K, 1, 1], the kernel of a 1x1 convolution, in blocks of at most ``largest`` rows."""
        rows = weight.shape[0]
        step = math.ceil(rows / math.ceil(rows / largest))
        if step == rows:
            return [self._block(weight.name, slice(0, rows), name=mil_name(weight.name))]
        if "lut" in self._read(weight.name):
            step = math.ceil(step / TABLE_ROWS) * TABLE_ROWS
        blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        return [self._block(weight.name, block, name=block_name(weight.name, start=block.start)) for block in blocks]

    def _block(self, weight: str, rows: slice, *, name: str) -> MilVar:
        stored = self._read(weight)
        if not isinstance(stored, dict):
            return self.floats(stored[rows], name=name)
        count = len(next(iter(stored.values())))
        # A table serves several rows: of its array each of them takes a part.
        parts = {
            key: part[rows.start * len(part) // count : rows.stop * len(part) // count] for key, part in stored.items()
        }
        constant = decoded(parts, name=name)
        for key, part in constant.op.inputs.items():
            part.op.weight_id = f"{name}.{key}"
        return constant

    def gains(self, weight: Weight) -> MilVar:
        """float32 [2C]: of a norm over [x, -x]."""
        return self.floats(np.tile(self._read(weight.name), 2), name=mil_name(weight.name))

    @staticmethod
    def floats(values: NDArray[Any], *, name: str) -> MilVar:
        constant = mb.const(val=values, name=name)
        constant.op.weight_id = name
        return constant

    def _read(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = self._shaped(name)
        return self._arrays[name]

    def _shaped(self, name: str) -> Any:
        """float32 [C] of a vector; of a matrix ``code_arrays``, or floats, with the kernel's [1, 1] behind."""
        stored = self._store[name]
        if not isinstance(stored, Tensor):
            return code_arrays(name, stored, kernel=True)
        values = stored.numpy()
        return values if values.ndim == 1 else values[:, :, None, None]


class _Emitter:
    """The table for one function: for each op of the graph, the MIL that computes it on [1, C, 1, T]."""

    def __init__(self, graph: Graph, plan: Plan, part: Part, constants: _Constants, *, length: int) -> None:
        self._graph = graph
        self._plan = plan
        self._part = part
        self._constants = constants
        self._length = length
        self._weights: dict[str, Any] = {}
        self._rope: dict[tuple[str, bool], tuple[MilVar, MilVar]] = {}
        self._inputs: Mapping[str, MilVar] = {}
        self._end: MilVar = None
        self._masks: dict[int, MilVar] = {}

    def function(self) -> Any:
        """The MIL function, and in it the nodes of the part."""
        with Function(self._input_specs(), ct.target.iOS18) as function:
            self._inputs = function.inputs
            values = self._first_values()
            output = self._last_value()
            walk(self._part.nodes(self._graph), self.table(), values, wanted={output})
            function.set_outputs([self._output(values[output])])
        return function

    def _input_specs(self) -> dict[str, Any]:
        spec, part, length = self._graph.spec, self._part, self._length
        specs: dict[str, Any] = {}
        if part.embedding:
            specs["inputIds"] = mb.TensorSpec((1, length), types.int32)
        else:
            specs[HIDDEN] = mb.TensorSpec((1, spec.hidden_size, 1, length), types.fp16)
        if part.layers:
            specs["position"] = mb.TensorSpec((1,), types.int32)
            specs["causalMask"] = mb.TensorSpec((1, 1, length, self._plan.context), types.fp16)
            cache = (len(part.layers), spec.num_key_value_heads, self._plan.context, spec.head_dim)
            specs |= {name: mb.StateTensorSpec(cache, types.fp16) for name in ("keyCache", "valueCache")}
        if part.head and self._one_of_many:
            specs["lastToken"] = mb.TensorSpec((1,), types.int32)
        return specs

    @property
    def _one_of_many(self) -> bool:
        """Whether logits are for one of the positions of this function."""
        return self._length > 1 and self._plan.logits is Logits.LAST

    def _first_values(self) -> dict[Value, Any]:
        """What the first nodes of the part read."""
        part = self._part
        if part.embedding:
            values: dict[Value, Any] = {Value("ids"): self._inputs["inputIds"]}
        else:
            first = part.layers.start if part.layers else self._graph.spec.num_hidden_layers
            values = {self._graph.read_by(first): self._inputs[HIDDEN]}
        if part.layers:
            keys, caches = State(self._inputs["keyCache"]), State(self._inputs["valueCache"])
            self._end = mb.add(x=self._inputs["position"], y=np.array([self._length], dtype=np.int32))  # [1]
            names = cache_names(self._graph.spec.num_hidden_layers)
            for index, layer in enumerate(part.layers):
                key, value = names[layer]
                values[Value(f"past_{key}")] = Slot(keys, index)
                values[Value(f"past_{value}")] = Slot(caches, index)
        return values

    def _last_value(self) -> Value:
        if self._part.head:
            return self._graph.outputs["logits"]
        return self._graph.read_by(self._part.layers.stop if self._part.layers else 0)

    def _output(self, x: MilVar) -> MilVar:
        if not self._part.head:
            return mb.identity(x=x, name=NEXT_HIDDEN)
        return mb.transpose(x=mb.squeeze(x=x, axes=[2]), perm=[0, 2, 1], name="logits")  # [1, V, 1, T] -> [1, T, V]

    def table(self) -> Mapping[str, Any]:
        return {
            "embedding": self._embedding,
            "linear": self._linear,
            "rms_norm": self._rms_norm,
            "silu": lambda x: mb.silu(x=x),
            "mul": lambda a, b: mb.mul(x=a, y=b),
            "add": lambda a, b: mb.add(x=a, y=b),
            "attention": self._attention,
        }

    def _embedding(self, ids: MilVar, weight: Weight) -> MilVar:
        """From the convolution's own constants, so that a tied weight is stored once. Ids stay int32: 16 bits would end
        at a vocabulary of 65,536."""
        blocks = self._blocks(weight)
        rows = self._row_of_blocks(ids, blocks) if len(blocks) > 1 else mb.gather(x=blocks[0], indices=ids, axis=0)
        rows = mb.squeeze(x=rows, axes=[4])  # [1, T, C, 1, 1]
        return mb.transpose(x=rows, perm=[0, 2, 3, 1], name=embedded_name(weight.name))  # [1, C, 1, T]

    @staticmethod
    def _row_of_blocks(ids: MilVar, blocks: Sequence[MilVar]) -> MilVar:
        """Each block looks up its nearest row, which counts once where it is the one, and zero times where not."""
        total, start = None, 0
        for block in blocks:
            local = mb.sub(x=ids, y=np.int32(start)) if start else ids
            nearest = mb.minimum(x=mb.maximum(x=local, y=np.int32(0)), y=np.int32(block.shape[0] - 1))
            found = mb.expand_dims(x=mb.cast(x=mb.equal(x=nearest, y=local), dtype="fp16"), axes=[2, 3, 4])
            part = mb.mul(x=mb.gather(x=block, indices=nearest, axis=0), y=found)
            total = part if total is None else mb.add(x=total, y=part)
            start += block.shape[0]
        return total

    def _linear(self, x: MilVar, weight: Weight) -> MilVar:
        products = [mb.conv(x=x, weight=block, pad_type="valid") for block in self._blocks(weight)]
        if len(products) == 1:
            return products[0]
        return mb.concat(values=products, axis=_CHANNELS, name=product_name(weight.name))

    def _rms_norm(self, x: MilVar, weight: Weight, eps: float) -> MilVar:
        if weight.name == FINAL_NORM and self._one_of_many:
            begin = sizes_of(0, 0, 0, self._inputs["lastToken"])
            x = mb.slice_by_size(x=x, begin=begin, size=[1, x.shape[_CHANNELS], 1, 1])
        return self.normalized(x, self._vector(weight), eps)

    @staticmethod
    def normalized(x: MilVar, gains: MilVar, eps: float) -> MilVar:
        """``gains`` [2C] float32"""
        both = mb.concat(values=[x, mb.mul(x=x, y=np.float16(-1))], axis=_CHANNELS)
        normed = mb.layer_norm(x=both, axes=[_CHANNELS], gamma=gains, epsilon=np.float32(eps))
        return mb.slice_by_size(x=normed, begin=[0, 0, 0, 0], size=list(x.shape))

    def _attention(
        self,
        q: MilVar,
        k: MilVar,
        v: MilVar,
        past_k: Slot,
        past_v: Slot,
        inv_freq: Constant | None,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
        chunk: int,
    ) -> tuple[MilVar, Slot, Slot]:
        head_dim = q.shape[_CHANNELS] // heads
        layer = self._part.layers[past_k.layer]
        refuse_unknown_attention(head_dim, scale=scale, window=window, chunk=chunk, layer=layer)
        q, k, v = (self._split_heads(x, count) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
        q, k = self._rotate(q, inv_freq, scale=scale), self._rotate(k, inv_freq)
        keys, values = self._grow(past_k, k), self._grow(past_v, v)  # [1, KV, ctx, D]
        # Queries that share keys lie one after another in T: no key is copied.
        shared = heads // kv_heads
        queries = mb.reshape(x=q, shape=[1, kv_heads, shared * self._length, head_dim])
        scores = mb.matmul(x=queries, y=keys, transpose_y=True)  # [1, KV, shared*T, ctx]
        weights = mb.softmax(x=mb.add(x=scores, y=self._mask_for(shared)), axis=-1)
        context = mb.matmul(x=weights, y=values)
        context = mb.reshape(x=context, shape=[1, heads, self._length, head_dim])
        context = mb.transpose(x=context, perm=[0, 1, 3, 2])
        return mb.reshape(x=context, shape=[1, heads * head_dim, 1, self._length]), past_k, past_v

    def _split_heads(self, x: MilVar, count: int) -> MilVar:
        x = mb.reshape(x=x, shape=[1, count, x.shape[_CHANNELS] // count, self._length])
        return mb.transpose(x=x, perm=[0, 1, 3, 2])  # [1, H*D, 1, T] -> [1, H, T, D]

    def _rotate(self, x: MilVar, inv_freq: Constant | None, *, scale: float = 1.0) -> MilVar:
        """Turned by the positions of this call, and times ``scale``, which the tables have in them: it would lose bits
        in float16, and the scores of unscaled queries their range."""
        if inv_freq is None:
            return x if scale == 1.0 else mb.mul(x=x, y=cast(mb.const(val=np.float32(scale)), "fp16"))
        cos, sin = self._rope_of_this_call(inv_freq, scale=scale)
        first, second = mb.split(x=x, num_splits=2, axis=-1)
        turned_first = mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin))
        turned_second = mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin))
        return mb.concat(values=[turned_first, turned_second], axis=-1)

    def _rope_of_this_call(self, inv_freq: Constant, *, scale: float) -> tuple[MilVar, MilVar]:
        """float16 [1, 1, T, D/2], cut from float32 tables as long as the context."""
        key = (inv_freq.name, scale != 1.0)
        if key not in self._rope:
            begin = sizes_of(0, 0, self._inputs["position"], 0)
            size = [1, 1, self._length, len(inv_freq.value)]
            cos, sin = (
                cast(mb.slice_by_size(x=table, begin=begin, size=size), "fp16")
                for table in self._rope_tables(inv_freq, scale=scale)
            )
            self._rope[key] = cos, sin
        return self._rope[key]

    def _rope_tables(self, inv_freq: Constant, *, scale: float) -> Sequence[MilVar]:
        purpose = "queries" if scale != 1.0 else "keys"
        tables = rope_table(inv_freq.value, first=0, count=self._plan.context)
        return [
            self._constants.floats(
                scale * table[None, None].numpy(), name=f"{mil_name(inv_freq.name)}_{name}_of_{purpose}"
            )
            for name, table in zip(("cos", "sin"), tables, strict=True)
        ]

    def _grow(self, slot: Slot, new: MilVar) -> MilVar:
        """Write ``new`` [1, KV, T, D] into its layer of the state; all of that layer: [1, KV, ctx, D]."""
        _, kv_heads, _, head_dim = new.shape
        slot.state.update(
            new,
            begin=sizes_of(slot.layer, 0, self._inputs["position"], 0),
            end=sizes_of(slot.layer + 1, kv_heads, self._end, head_dim),
        )
        return mb.slice_by_size(
            x=slot.state.value,
            begin=[slot.layer, 0, 0, 0],
            size=[1, kv_heads, self._plan.context, head_dim],
        )

    def _mask_for(self, shared: int) -> MilVar:
        if shared not in self._masks:
            mask = self._inputs["causalMask"]
            self._masks[shared] = mb.tile(x=mask, reps=[1, 1, shared, 1]) if shared > 1 else mask
        return self._masks[shared]

    def _blocks(self, weight: Weight) -> list[MilVar]:
        """A table that nothing is multiplied with stays whole, however long."""
        if weight.name not in self._weights:
            multiplied = any(n.op == "linear" and weight in n.arguments for n in self._part.nodes(self._graph))
            largest = LARGEST_SIZE if multiplied else weight.shape[0]
            self._weights[weight.name] = self._constants.blocks(weight, largest=largest)
        found: list[MilVar] = self._weights[weight.name]
        return found

    def _vector(self, weight: Weight) -> MilVar:
        if weight.name not in self._weights:
            self._weights[weight.name] = self._constants.gains(weight)
        return self._weights[weight.name]
