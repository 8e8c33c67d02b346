"""Graph -> MIL: the decoder as a stateful Core ML program with lengths open up to the context.

Features are those that swift-transformers' ``LanguageModel`` looks for: inputs ``inputIds`` int32 [1, T] and
``causalMask`` float16 [1, 1, T, E] (0 where a query may look, -inf where it may not), states ``keyCache`` and
``valueCache``, output ``logits``. E counts the positions in the cache after the call, so the first new token stands at
P = E - T and nothing else has to tell it.

Linears, attention and the residual stream are computed in float16 (float32 when the body is stored so); norms and the
rotary embedding always in float32, and the states are always float16, the only type that Core ML has for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from exporter.model.graph import Constant, Graph, Weight, cache_names
from exporter.model.rope import rope_table
from exporter.spec import FINAL_NORM, Logits, Plan
from exporter.store import StoredWeight, WeightStore
from targets.coreml.emission import (
    MilVar,
    Slot,
    State,
    cast,
    code_arrays,
    conversion,
    decoded,
    dtype_of,
    refuse_unknown_attention,
    sizes_of,
)
from targets.coreml.package import finish, mil_name
from targets.coreml.toolchain import ct, get_new_symbol, mb, types


def lower(graph: Graph, store: WeightStore, plan: Plan, path: Path, *, compute_dtype: str) -> None:
    """Write the package of ``graph`` at ``path``, a new name ending in ``.mlpackage``. Raises LoweringError."""
    with conversion(path):
        _convert(_program(graph, store, plan, compute_dtype), path, context=plan.context)
    finish(path, model_name=graph.spec.name)


def _program(graph: Graph, store: WeightStore, plan: Plan, compute_dtype: str) -> Any:
    length, end = get_new_symbol(), get_new_symbol()
    cache = (graph.spec.num_hidden_layers, 1, graph.spec.num_key_value_heads, plan.context, graph.spec.head_dim)

    @mb.program(  # type: ignore[untyped-decorator]
        input_specs=[
            mb.TensorSpec((1, length), types.int32),
            mb.TensorSpec((1, 1, length, end), types.fp16),
            mb.StateTensorSpec(cache, types.fp16),
            mb.StateTensorSpec(cache, types.fp16),
        ],
        opset_version=ct.target.iOS18,
    )
    def program(inputIds: MilVar, causalMask: MilVar, keyCache: MilVar, valueCache: MilVar) -> MilVar:  # noqa: N803
        emitter = _Emitter(store, plan, compute_dtype, ids=inputIds, mask=causalMask)
        keys, values = State(keyCache), State(valueCache)
        caches: dict[str, Slot] = {}
        for layer, (key, value) in enumerate(cache_names(graph.spec.num_hidden_layers)):
            caches |= {f"past_{key}": Slot(keys, layer), f"past_{value}": Slot(values, layer)}
        outputs = graph.run(emitter.table(), {"ids": inputIds, **caches})
        return mb.identity(x=outputs["logits"], name="logits")

    return program


def _convert(program: Any, path: Path, *, context: int) -> None:
    length, end = (ct.RangeDim(1, context, default=1) for _ in range(2))
    ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,  # "insert no casts": ours stay; FLOAT16 would undo each fp32 op of ours
        # What is emitted is what is saved. The default passes merge constants that are equal, or nearly, and so lose
        # the name of a weight; take out a norm whose weights are all ones; and guard the embedding from negative ids.
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
        package_dir=str(path),
        inputs=[
            ct.TensorType("inputIds", shape=(1, length), dtype=np.int32),
            ct.TensorType("causalMask", shape=(1, 1, length, end), dtype=np.float16),
        ],
    )


class _Emitter:
    """The table: for each op of the graph, the MIL that computes it."""

    def __init__(self, store: WeightStore, plan: Plan, compute_dtype: str, *, ids: MilVar, mask: MilVar) -> None:
        self._store = store
        self._plan = plan
        self._compute = compute_dtype
        self._weights: dict[str, MilVar] = {}
        self._rope: dict[str, tuple[MilVar, MilVar]] = {}
        self._masks: dict[int, MilVar] = {}
        self._mask = cast(mask, compute_dtype)
        self._length = mb.slice_by_size(x=mb.shape(x=ids), begin=[1], size=[1])  # [1]: T
        self._end = mb.slice_by_size(x=mb.shape(x=mask), begin=[3], size=[1])  # [1]: E
        self._position = mb.sub(x=self._end, y=self._length)  # [1]: P

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
        return cast(mb.gather(x=self._weight(weight), indices=ids, axis=0), self._compute)

    def _linear(self, x: MilVar, weight: Weight) -> MilVar:
        """In the dtype of its weight, whatever the dtype around it."""
        matrix = self._weight(weight)
        return cast(mb.linear(x=cast(x, dtype_of(matrix)), weight=matrix), self._compute)

    def _rms_norm(self, x: MilVar, weight: Weight, eps: float) -> MilVar:
        if weight.name == FINAL_NORM and self._plan.logits is Logits.LAST:
            x = self._last_position(x)
        x = cast(x, "fp32")
        mean_square = mb.reduce_mean(x=mb.square(x=x), axes=[-1], keep_dims=True)
        normed = mb.mul(x=x, y=mb.rsqrt(x=mean_square, epsilon=np.float32(eps)))
        return cast(mb.mul(x=normed, y=self._weight(weight)), self._compute)

    def _last_position(self, x: MilVar) -> MilVar:
        begin = mb.concat(values=[[0], mb.sub(x=self._length, y=[1]), [0]], axis=0)
        return mb.slice_by_size(x=x, begin=begin, size=[1, 1, x.shape[2]])  # [1, 1, H]

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
        head_dim = q.shape[2] // heads
        refuse_unknown_attention(head_dim, scale=scale, window=window, chunk=chunk, layer=past_k.layer)
        q, k, v = (self._split_heads(x, count) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
        if inv_freq:
            q, k = self._rotate(q, inv_freq), self._rotate(k, inv_freq)
        keys, values = self._grow(past_k, k), self._grow(past_v, v)  # [1, KV, E, D]
        shared = heads // kv_heads
        # scaled_dot_product_attention does not broadcast heads: queries that share keys lie one after another in T.
        queries = mb.reshape(x=q, shape=sizes_of(1, kv_heads, -1, head_dim)) if shared > 1 else q
        context = mb.scaled_dot_product_attention(
            query=queries, key=keys, value=values, attn_mask=self._mask_for(shared)
        )  # [1, KV, shared*T, D]
        if shared > 1:
            context = mb.reshape(x=context, shape=sizes_of(1, heads, self._length, head_dim))
        context = mb.transpose(x=context, perm=[0, 2, 1, 3])
        return mb.reshape(x=context, shape=sizes_of(1, self._length, heads * head_dim)), past_k, past_v

    def _split_heads(self, x: MilVar, count: int) -> MilVar:
        x = mb.reshape(x=x, shape=sizes_of(1, self._length, count, x.shape[2] // count))
        return mb.transpose(x=x, perm=[0, 2, 1, 3])  # [1, T, H*D] -> [1, H, T, D]

    def _rotate(self, x: MilVar, inv_freq: Constant) -> MilVar:
        cos, sin = self._rope_of_this_call(inv_freq)
        first, second = mb.split(x=cast(x, "fp32"), num_splits=2, axis=-1)
        turned_first = mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin))
        turned_second = mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin))
        return cast(mb.concat(values=[turned_first, turned_second], axis=-1), self._compute)

    def _rope_of_this_call(self, inv_freq: Constant) -> tuple[MilVar, MilVar]:
        """Cosines and sines of positions P .. E, float32 [1, 1, T, D/2], cut from tables as long as the context."""
        if inv_freq.name not in self._rope:
            tables = rope_table(inv_freq.value, first=0, count=self._plan.context)
            begin, size = sizes_of(0, 0, self._position, 0), sizes_of(1, 1, self._length, len(inv_freq.value))
            cos, sin = (mb.slice_by_size(x=table[None, None].numpy(), begin=begin, size=size) for table in tables)
            self._rope[inv_freq.name] = cos, sin
        return self._rope[inv_freq.name]

    def _grow(self, slot: Slot, new: MilVar) -> MilVar:
        """Write ``new`` [1, KV, T, D] into its layer of the state; everything up to position E: [1, KV, E, D]."""
        _, kv_heads, _, head_dim = new.shape
        layer = slot.layer
        slot.state.update(
            mb.expand_dims(x=cast(new, "fp16"), axes=[0]),
            begin=sizes_of(layer, 0, 0, self._position, 0),
            end=sizes_of(layer + 1, 1, kv_heads, self._end, head_dim),
        )
        # slice_by_size keeps the known dimensions; slice_by_index with a computed end would lose all of them, and with
        # them the builder's check of the attention's shapes.
        filled = mb.slice_by_size(
            x=slot.state.value,
            begin=[layer, 0, 0, 0, 0],
            size=sizes_of(1, 1, kv_heads, self._end, head_dim),
        )
        return cast(mb.squeeze(x=filled, axes=[0]), self._compute)

    def _mask_for(self, shared: int) -> MilVar:
        if shared not in self._masks:
            self._masks[shared] = mb.tile(x=self._mask, reps=[1, 1, shared, 1]) if shared > 1 else self._mask
        return self._masks[shared]

    def _weight(self, weight: Weight) -> MilVar:
        """One constant per tensor, however many ops use it, called by a name that the codes are found again by."""
        if weight.name not in self._weights:
            self._weights[weight.name] = _constant(weight.name, self._store[weight.name])
        return self._weights[weight.name]


def _constant(name: str, stored: StoredWeight) -> MilVar:
    if isinstance(stored, Tensor):
        return mb.const(val=stored.numpy(), name=mil_name(name))
    return decoded(code_arrays(name, stored), name=mil_name(name))
