"""Graph -> MIL: the decoder as a stateful Core ML program with lengths open up to the context.

Features are those that swift-transformers' ``LanguageModel`` looks for: inputs ``inputIds`` int32 [1, T] and
``causalMask`` float16 [1, 1, T, E] (0 where a query may look, -inf where it may not), states ``keyCache`` and
``valueCache``, output ``logits``. E counts the positions in the cache after the call, so the first new token stands at
P = E - T and nothing else has to tell it.

Linears, attention and the residual stream are computed in float16 (float32 when the body is stored so); norms and the
rotary embedding always in float32, and the states are always float16, the only type that Core ML has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from exporter.model.graph import EXPERT, Constant, Graph, Weight, cache_names
from exporter.model.ops import FLOOR, places, temperatures
from exporter.model.rope import rope_table
from exporter.spec import FINAL_NORM, ROUTER, Logits, Plan
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
from targets.coreml.toolchain import Function, Program, ct, get_new_symbol, mb, types

IDS, MASK, LOGITS = "inputIds", "causalMask", "logits"
STATES = ("keyCache", "valueCache")
"""[L, 1, KV, context, D]"""

_OUT_OF_SIGHT = 3e4
NUMPY: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}
_MIL = {"fp16": types.fp16, "int32": types.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """An input. A dimension that is open has a name, and is equal in all inputs that have it."""

    shape: tuple[int | str, ...]
    dtype: str


def lower(
    graph: Graph,
    store: WeightStore,
    plan: Plan,
    path: Path,
    *,
    compute_dtype: str,
    emitter: type[Emitter] | None = None,
) -> None:
    """Write the package of ``graph`` at ``path``, a new name ending in ``.mlpackage``. Raises LoweringError."""
    with conversion(path):
        _convert((emitter or DecoderEmitter)(graph, store, plan, compute_dtype), path)
    finish(path, model_name=graph.spec.name)


def _convert(emitter: Emitter, path: Path) -> None:
    features, lengths = emitter.features(), emitter.lengths()
    symbols = {name: get_new_symbol() for name in lengths}
    specs = {
        name: mb.TensorSpec(_with_lengths(feature.shape, symbols), _MIL[feature.dtype])
        for name, feature in features.items()
    }
    specs |= {name: mb.StateTensorSpec(shape, types.fp16) for name, shape in emitter.states().items()}
    with Function(specs, ct.target.iOS18) as function:
        function.set_outputs(emitter.outputs(function.inputs))
    program = Program()
    program.add_function("main", function)
    ranges = {name: ct.RangeDim(1, most, default=1) for name, most in lengths.items()}
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
            ct.TensorType(name, shape=_with_lengths(feature.shape, ranges), dtype=NUMPY[feature.dtype])
            for name, feature in features.items()
        ],
    )


def _with_lengths(shape: tuple[int | str, ...], lengths: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(lengths[size] if isinstance(size, str) else size for size in shape)


class Emitter:
    """What programs of ours have in common: their inputs, and the ops that know no text."""

    def __init__(self, graph: Graph, store: WeightStore, plan: Plan, compute_dtype: str) -> None:
        self._graph = graph
        self._store = store
        self._plan = plan
        self._compute = compute_dtype
        self._weights: dict[str, MilVar] = {}

    def features(self) -> dict[str, Feature]:
        raise NotImplementedError

    def lengths(self) -> dict[str, int]:
        """Dimensions of features that are open, from 1 up to this."""
        return {}

    def states(self) -> dict[str, tuple[int, ...]]:
        """float16"""
        return {}

    def outputs(self, inputs: Mapping[str, MilVar]) -> list[MilVar]:
        """Of the graph on values of the features and states, called as an app looks for them."""
        raise NotImplementedError

    def table(self) -> dict[str, Callable[..., Any]]:
        return {
            "linear": self._linear,
            "silu": lambda x: mb.silu(x=x),
            "mul": lambda a, b: mb.mul(x=a, y=b),
            "add": lambda a, b: mb.add(x=a, y=b),
            "head_norm": self._head_norm,
            "tanh_gate": lambda x, gate: mb.mul(x=x, y=cast(self._tanh(gate), self._compute)),
        }

    def _linear(self, x: MilVar, weight: Weight) -> MilVar:
        """In the dtype of its weight, whatever the dtype around it; what a router gives stays so: float16 would make
        equals of logits that differ."""
        matrix = self._weight(weight)
        product = mb.linear(x=cast(x, dtype_of(matrix)), weight=matrix)
        return product if weight.name.endswith(ROUTER) else cast(product, self._compute)

    def _normal(self, x: MilVar, eps: float) -> MilVar:
        """float32"""
        x = cast(x, "fp32")
        mean_square = mb.reduce_mean(x=mb.square(x=x), axes=[-1], keep_dims=True)
        return mb.mul(x=x, y=mb.rsqrt(x=mean_square, epsilon=np.float32(eps)))

    def _head_norm(self, x: MilVar, head_dim: int, eps: float, weight: Weight | None = None) -> MilVar:
        rows, width = self._rows(x), x.shape[2]
        normed = self._normal(mb.reshape(x=x, shape=sizes_of(*rows, width // head_dim, head_dim)), eps)
        if weight:
            normed = mb.mul(x=normed, y=self._weight(weight))
        return mb.reshape(x=cast(normed, self._compute), shape=sizes_of(*rows, width))

    def _turned(self, x: MilVar, cos: MilVar, sin: MilVar) -> MilVar:
        """Channels i and i + D/2 of ``x`` [1, heads, T, D] by the angles of float32 tables [1, 1, T, D/2]."""
        first, second = mb.split(x=cast(x, "fp32"), num_splits=2, axis=-1)
        turned_first = mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin))
        turned_second = mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin))
        return cast(mb.concat(values=[turned_first, turned_second], axis=-1), self._compute)

    def _rows(self, x: MilVar) -> Sequence[int | MilVar]:
        """The sizes of ``x`` [A, B, H] but the last."""
        return tuple(x.shape[:2])

    def _number(self, value: float) -> Any:
        """In the dtype that is computed in: no MIL op mixes two."""
        return NUMPY[self._compute](value)

    def _tanh(self, gate: Weight) -> MilVar:
        """float32"""
        return mb.tanh(x=cast(self._weight(gate), "fp32"))

    def _weight(self, weight: Weight) -> MilVar:
        """One constant per tensor, however many ops use it, called by a name that the codes are found again by."""
        if weight.name not in self._weights:
            self._weights[weight.name] = _constant(weight.name, self._store[weight.name])
        return self._weights[weight.name]


class DecoderEmitter(Emitter):
    """The table: for each op of the decoder, the MIL that computes it."""

    def __init__(self, graph: Graph, store: WeightStore, plan: Plan, compute_dtype: str) -> None:
        super().__init__(graph, store, plan, compute_dtype)
        self._rope: dict[str, tuple[MilVar, MilVar]] = {}
        self._masks: dict[int, MilVar] = {}
        self._repeats: dict[str, MilVar] = {}
        self._temperatures: MilVar | None = None
        self._mask: MilVar = None
        self._length: MilVar = None
        self._end: MilVar = None
        self._position: MilVar = None

    def features(self) -> dict[str, Feature]:
        return {
            IDS: Feature(shape=(1, "length"), dtype="int32"),
            MASK: Feature(shape=(1, 1, "length", "end"), dtype="fp16"),
        }

    def lengths(self) -> dict[str, int]:
        return dict.fromkeys(("length", "end"), self._plan.context)

    def states(self) -> dict[str, tuple[int, ...]]:
        spec = self._graph.spec
        cache = (spec.num_hidden_layers, 1, spec.num_key_value_heads, self._plan.context, spec.head_dim)
        return dict.fromkeys(STATES, cache)

    def outputs(self, inputs: Mapping[str, MilVar]) -> list[MilVar]:
        self._mask = cast(inputs[MASK], self._compute)
        self._length = mb.slice_by_size(x=mb.shape(x=inputs[IDS]), begin=[1], size=[1])  # [1]: T
        self._end = mb.slice_by_size(x=mb.shape(x=inputs[MASK]), begin=[3], size=[1])  # [1]: E
        self._position = mb.sub(x=self._end, y=self._length)  # [1]: P
        keys, values = (State(inputs[name]) for name in STATES)
        given: dict[str, Any] = {"ids": inputs[IDS], **self._other_values(inputs)}
        for layer, (key, value) in enumerate(cache_names(self._graph.spec.num_hidden_layers)):
            given |= {f"past_{key}": Slot(keys, layer), f"past_{value}": Slot(values, layer)}
        self._store_experts()
        return [mb.identity(x=self._graph.run(self.table(), given)["logits"], name=LOGITS)]

    def _other_values(self, _inputs: Mapping[str, MilVar]) -> dict[str, MilVar]:
        """What the graph reads besides tokens and caches."""
        return {}

    def table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().table(),
            "embedding": self._embedding,
            "rms_norm": self._rms_norm,
            "attention": self._attention,
            "temper": self._temper,
            "route": self._route,
            "gate": lambda x, scores, expert: mb.mul(x=x, y=self._of_expert(scores, expert)),
            "spread": self._spread,
            EXPERT: self._expert,
        }

    def _rows(self, x: MilVar) -> Sequence[int | MilVar]:
        return 1, self._length

    def _store_experts(self) -> None:
        """Their weights as constants of the program itself: what lies inside of a branch is seen by that alone."""
        for node in self._graph.nodes:
            if node.expert is not None:
                for argument in node.arguments:
                    if isinstance(argument, Weight):
                        self._weight(argument)

    def _embedding(self, ids: MilVar, weight: Weight) -> MilVar:
        return cast(mb.gather(x=self._weight(weight), indices=ids, axis=0), self._compute)

    def _rms_norm(self, x: MilVar, weight: Weight, eps: float) -> MilVar:
        if weight.name == FINAL_NORM and self._plan.logits is Logits.LAST:
            x = self._last_position(x)
        return cast(mb.mul(x=self._normal(x, eps), y=self._weight(weight)), self._compute)

    def _temper(self, q: MilVar, _past_k: Slot, floor_scale: int, attn_scale: float) -> MilVar:
        count = self._plan.context
        if count < floor_scale:  # all are 1
            return q
        if self._temperatures is None:
            table = temperatures(first=0, count=count, floor_scale=floor_scale, attn_scale=attn_scale)
            begin, size = sizes_of(0, self._position, 0), sizes_of(1, self._length, 1)
            self._temperatures = mb.slice_by_size(x=table[None, :, None].numpy(), begin=begin, size=size)
        return cast(mb.mul(x=cast(q, "fp32"), y=self._temperatures), self._compute)

    def _route(self, logits: MilVar, count: int) -> MilVar:
        """Logits that are equal to the last bit are chosen together."""
        if count == 1:
            least = mb.reduce_max(x=logits, axes=[-1], keep_dims=True)
        else:
            largest, _ = mb.topk(x=logits, k=count, axis=-1)
            least = mb.reduce_min(x=largest, axes=[-1], keep_dims=True)
        chosen = mb.cast(x=mb.greater_equal(x=logits, y=least), dtype="fp32")
        return cast(mb.mul(x=mb.sigmoid(x=logits), y=chosen), self._compute)

    def _spread(self, logits: MilVar, tokens: Constant, vocab_size: int) -> MilVar:
        """Logits of all tokens from those of some and, behind them, one for all others."""
        floor = NUMPY[dtype_of(logits)](FLOOR)
        wider = mb.pad(x=logits, pad=[0, 1], mode="constant", constant_val=floor)
        return mb.gather(x=wider, indices=places(tokens.value, vocab_size).numpy().astype(np.int32), axis=2)

    def _of_expert(self, scores: MilVar, expert: int) -> MilVar:
        return mb.slice_by_size(x=scores, begin=[0, 0, expert], size=sizes_of(1, self._length, 1))  # [1, T, 1]

    def _expert(self, x: MilVar, scores: MilVar, total: MilVar, expert: int, inside: Callable[..., MilVar]) -> MilVar:
        """Passed over where no token of the call chose it."""
        largest = mb.reduce_max(x=self._of_expert(scores, expert), axes=[0, 1, 2], keep_dims=False)
        return mb.cond(
            pred=mb.greater(x=largest, y=np.dtype(NUMPY[dtype_of(largest)]).type(0)),
            _true_fn=lambda: inside(x, scores, total),
            _false_fn=lambda: mb.identity(x=total),
        )

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
        refuse_unknown_attention(head_dim, scale=scale, window=window, chunk=0, layer=past_k.layer)
        chunk = chunk if chunk < self._plan.context else 0
        q, k, v = (self._split_heads(x, count) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
        if inv_freq:
            q, k = self._rotate(q, inv_freq), self._rotate(k, inv_freq)
        keys, values = self._grow(past_k, k), self._grow(past_v, v)  # [1, KV, E, D]
        context = self._attend(q, keys, values, kv_heads=kv_heads, mask=self._mask_for(chunk))
        return context, past_k, past_v

    def _attend(self, q: MilVar, k: MilVar, v: MilVar, *, kv_heads: int, mask: MilVar) -> MilVar:
        """``q`` [1, H, T, D], ``k`` and ``v`` [1, KV, S, D], ``mask`` [1, 1, T, S] -> [1, T, H*D]."""
        _, heads, _, head_dim = q.shape
        shared = heads // kv_heads
        # scaled_dot_product_attention does not broadcast heads: queries that share keys lie one after another in T.
        queries = mb.reshape(x=q, shape=sizes_of(1, kv_heads, -1, head_dim)) if shared > 1 else q
        context = mb.scaled_dot_product_attention(
            query=queries, key=k, value=v, attn_mask=self._repeated(mask, shared)
        )  # [1, KV, shared*T, D]
        if shared > 1:
            context = mb.reshape(x=context, shape=sizes_of(1, heads, self._length, head_dim))
        context = mb.transpose(x=context, perm=[0, 2, 1, 3])
        return mb.reshape(x=context, shape=sizes_of(1, self._length, heads * head_dim))

    def _split_heads(self, x: MilVar, count: int) -> MilVar:
        x = mb.reshape(x=x, shape=sizes_of(1, self._length, count, x.shape[2] // count))
        return mb.transpose(x=x, perm=[0, 2, 1, 3])  # [1, T, H*D] -> [1, H, T, D]

    def _rotate(self, x: MilVar, inv_freq: Constant) -> MilVar:
        return self._turned(x, *self._rope_of_this_call(inv_freq))

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

    def _mask_for(self, chunk: int) -> MilVar:
        if chunk not in self._masks:
            self._masks[chunk] = mb.add(x=self._mask, y=self._chunk_bias(chunk)) if chunk else self._mask
        return self._masks[chunk]

    def _repeated(self, mask: MilVar, shared: int) -> MilVar:
        """For so many queries in place of each, made once of a mask."""
        if shared == 1:
            return mask
        if mask.name not in self._repeats:
            self._repeats[mask.name] = mb.tile(x=mask, reps=[1, 1, shared, 1])
        return self._repeats[mask.name]

    def _chunk_bias(self, chunk: int) -> MilVar:
        """What is added to the app's mask for keys of other chunks, [1, 1, T, E]: 0, or a score of which nothing is
        left in float16 either."""
        chunks = (np.arange(self._plan.context) // chunk).astype(np.float32)
        own = mb.slice_by_size(
            x=chunks[None, None, :, None], begin=sizes_of(0, 0, self._position, 0), size=sizes_of(1, 1, self._length, 1)
        )
        theirs = mb.slice_by_size(x=chunks[None, None, None], begin=[0, 0, 0, 0], size=sizes_of(1, 1, 1, self._end))
        same = mb.cast(x=mb.equal(x=own, y=theirs), dtype="fp32")  # [1, 1, T, E]
        return cast(mb.mul(x=mb.sub(x=same, y=np.float32(1)), y=np.float32(_OUT_OF_SIGHT)), self._compute)


def _constant(name: str, stored: StoredWeight) -> MilVar:
    if isinstance(stored, Tensor):
        return mb.const(val=stored.numpy(), name=mil_name(name))
    return decoded(code_arrays(name, stored), name=mil_name(name))
