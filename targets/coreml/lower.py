"""Graph -> MIL: the decoder as a stateful Core ML program with lengths open up to the context.

Features are those that swift-transformers' ``LanguageModel`` looks for: inputs ``inputIds`` int32 [1, T] and
``causalMask`` float16 [1, 1, T, E] (0 where a query may look, -inf where it may not), states ``keyCache`` and
``valueCache``, output ``logits``. E counts the positions in the cache after the call, so the first new token stands at
P = E - T and nothing else has to tell it.

Linears, attention and the residual stream are computed in float16 (float32 when the body is stored so); norms and the
rotary embedding always in float32, and the states are always float16, the only type that Core ML has for them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.errors import ExportError, LoweringError
from exporter.model.graph import Constant, Graph, Weight, cache_names
from exporter.model.rope import rope_table
from exporter.quantized import QuantizedTensor
from exporter.spec import FINAL_NORM, Logits, Plan
from exporter.store import StoredWeight, WeightStore
from targets.coreml.package import finish, mil_name
from targets.coreml.toolchain import (
    ct,
    get_new_symbol,
    mb,
    quiet,
    types,
    without_progress_bars,
)

_NEARLY_FULL_BYTES = 1 << 20

MilVar = Any
"""A value of the program under construction: coremltools has no types."""


class _State:
    """A state [L, 1, KV, context, D], float16, and the value it has at the point that the emission has come to.

    Each update builds on the value that the one before it left. A second ``read_state`` would be the same op as the
    first, which the default passes of coremltools merge: the update would then undo every one before it.
    """

    def __init__(self, state: MilVar) -> None:
        self._state = state
        self.value = mb.read_state(input=state)

    def update(self, new: MilVar, *, begin: MilVar, end: MilVar) -> None:
        updated = mb.slice_update(x=self.value, update=new, begin=begin, end=end)
        self.value = mb.coreml_update_state(state=self._state, value=updated)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The part of a state that belongs to one layer: what the graph passes around as ``past_k.i`` or ``past_v.i``."""

    state: _State
    layer: int


def lower(graph: Graph, store: WeightStore, plan: Plan, path: Path, *, compute_dtype: str) -> None:
    """Write the package of ``graph`` at ``path``, a new name ending in ``.mlpackage``. Raises LoweringError."""
    try:
        with quiet(), without_progress_bars():
            mb.name_count.clear()  # left over from a conversion that failed, it would give the ops other names
            _convert(_program(graph, store, plan, compute_dtype), path, context=plan.context)
    except (ExportError, OSError):
        raise
    except Exception as error:  # coremltools raises whatever its builder, passes and writers happen to raise
        raise _mapped(error, path) from error
    finish(path, model_name=graph.spec.name)


def _mapped(error: Exception, path: Path) -> Exception:
    """Our error for one of coremltools'. Its writer in C++ says "filesystem error" of any trouble with the disk."""
    if "filesystem error" in str(error):
        disk = os.statvfs(path.parent)
        number = errno.ENOSPC if disk.f_bavail * disk.f_frsize < _NEARLY_FULL_BYTES else errno.EIO
        return OSError(number, os.strerror(number), str(path))
    return LoweringError(
        f"coremltools could not make the package: {type(error).__name__}: {error}",
        hint="this is a fault of llama-export: please report it with the model's config.json",
    )


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
        keys, values = _State(keyCache), _State(valueCache)
        caches: dict[str, _Slot] = {}
        for layer, (key, value) in enumerate(cache_names(graph.spec.num_hidden_layers)):
            caches |= {f"past_{key}": _Slot(keys, layer), f"past_{value}": _Slot(values, layer)}
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
        self._mask = self._cast(mask, compute_dtype)
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
        return self._cast(mb.gather(x=self._weight(weight), indices=ids, axis=0), self._compute)

    def _linear(self, x: MilVar, weight: Weight) -> MilVar:
        """In the dtype of its weight, whatever the dtype around it."""
        matrix = self._weight(weight)
        return self._cast(mb.linear(x=self._cast(x, _dtype(matrix)), weight=matrix), self._compute)

    def _rms_norm(self, x: MilVar, weight: Weight, eps: float) -> MilVar:
        if weight.name == FINAL_NORM and self._plan.logits is Logits.LAST:
            x = self._last_position(x)
        x = self._cast(x, "fp32")
        mean_square = mb.reduce_mean(x=mb.square(x=x), axes=[-1], keep_dims=True)
        normed = mb.mul(x=x, y=mb.rsqrt(x=mean_square, epsilon=np.float32(eps)))
        return self._cast(mb.mul(x=normed, y=self._weight(weight)), self._compute)

    def _last_position(self, x: MilVar) -> MilVar:
        begin = mb.concat(values=[[0], mb.sub(x=self._length, y=[1]), [0]], axis=0)
        return mb.slice_by_size(x=x, begin=begin, size=[1, 1, x.shape[2]])  # [1, 1, H]

    def _attention(
        self,
        q: MilVar,
        k: MilVar,
        v: MilVar,
        past_k: _Slot,
        past_v: _Slot,
        inv_freq: Constant | None,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
        chunk: int,
    ) -> tuple[MilVar, _Slot, _Slot]:
        head_dim = q.shape[2] // heads
        _refuse_unknown_attention(head_dim, scale=scale, window=window, chunk=chunk, layer=past_k.layer)
        q, k, v = (self._split_heads(x, count) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
        if inv_freq:
            q, k = self._rotate(q, inv_freq), self._rotate(k, inv_freq)
        keys, values = self._grow(past_k, k), self._grow(past_v, v)  # [1, KV, E, D]
        shared = heads // kv_heads
        # scaled_dot_product_attention does not broadcast heads: queries that share keys lie one after another in T.
        queries = mb.reshape(x=q, shape=self._shape(1, kv_heads, -1, head_dim)) if shared > 1 else q
        context = mb.scaled_dot_product_attention(
            query=queries, key=keys, value=values, attn_mask=self._mask_for(shared)
        )  # [1, KV, shared*T, D]
        if shared > 1:
            context = mb.reshape(x=context, shape=self._shape(1, heads, self._length, head_dim))
        context = mb.transpose(x=context, perm=[0, 2, 1, 3])
        return mb.reshape(x=context, shape=self._shape(1, self._length, heads * head_dim)), past_k, past_v

    def _split_heads(self, x: MilVar, count: int) -> MilVar:
        x = mb.reshape(x=x, shape=self._shape(1, self._length, count, x.shape[2] // count))
        return mb.transpose(x=x, perm=[0, 2, 1, 3])  # [1, T, H*D] -> [1, H, T, D]

    def _rotate(self, x: MilVar, inv_freq: Constant) -> MilVar:
        cos, sin = self._rope_of_this_call(inv_freq)
        first, second = mb.split(x=self._cast(x, "fp32"), num_splits=2, axis=-1)
        turned_first = mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin))
        turned_second = mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin))
        return self._cast(mb.concat(values=[turned_first, turned_second], axis=-1), self._compute)

    def _rope_of_this_call(self, inv_freq: Constant) -> tuple[MilVar, MilVar]:
        """Cosines and sines of positions P .. E, float32 [1, 1, T, D/2], cut from tables as long as the context."""
        if inv_freq.name not in self._rope:
            tables = rope_table(inv_freq.value, first=0, count=self._plan.context)
            begin, size = self._shape(0, 0, self._position, 0), self._shape(1, 1, self._length, len(inv_freq.value))
            cos, sin = (mb.slice_by_size(x=table[None, None].numpy(), begin=begin, size=size) for table in tables)
            self._rope[inv_freq.name] = cos, sin
        return self._rope[inv_freq.name]

    def _grow(self, slot: _Slot, new: MilVar) -> MilVar:
        """Write ``new`` [1, KV, T, D] into its layer of the state; everything up to position E: [1, KV, E, D]."""
        _, kv_heads, _, head_dim = new.shape
        layer = slot.layer
        slot.state.update(
            mb.expand_dims(x=self._cast(new, "fp16"), axes=[0]),
            begin=self._shape(layer, 0, 0, self._position, 0),
            end=self._shape(layer + 1, 1, kv_heads, self._end, head_dim),
        )
        # slice_by_size keeps the known dimensions; slice_by_index with a computed end would lose all of them, and with
        # them the builder's check of the attention's shapes.
        filled = mb.slice_by_size(
            x=slot.state.value,
            begin=[layer, 0, 0, 0, 0],
            size=self._shape(1, 1, kv_heads, self._end, head_dim),
        )
        return self._cast(mb.squeeze(x=filled, axes=[0]), self._compute)

    def _mask_for(self, shared: int) -> MilVar:
        if shared not in self._masks:
            self._masks[shared] = mb.tile(x=self._mask, reps=[1, 1, shared, 1]) if shared > 1 else self._mask
        return self._masks[shared]

    def _weight(self, weight: Weight) -> MilVar:
        """One constant per tensor, however many ops use it, called by a name that the codes are found again by."""
        if weight.name not in self._weights:
            self._weights[weight.name] = _constant(weight.name, self._store[weight.name])
        return self._weights[weight.name]

    @staticmethod
    def _shape(*sizes: int | MilVar) -> MilVar:
        """A rank-1 tensor of sizes, some of them known only when the program runs."""
        if all(isinstance(size, int) for size in sizes):
            return list(sizes)
        return mb.concat(values=[[size] if isinstance(size, int) else size for size in sizes], axis=0)

    @staticmethod
    def _cast(x: MilVar, dtype: str) -> MilVar:
        return x if _dtype(x) == dtype else mb.cast(x=x, dtype=dtype)


def _constant(name: str, stored: StoredWeight) -> MilVar:
    if not isinstance(stored, QuantizedTensor):
        return mb.const(val=stored.numpy(), name=mil_name(name))
    scales = stored.scales.to(torch.float16)
    if not torch.equal(scales.float(), stored.scales):
        raise LoweringError(
            f"{name} has scales that float16 cannot hold: the largest is {stored.scales.max().item():.3g}",
            hint="take --precision fp32 for this model, or another target",
        )
    codes = stored.codes.numpy()
    return mb.constexpr_blockwise_shift_scale(
        data=codes.astype(types.nptype_from_builtin(types.int4)) if stored.bits == 4 else codes,
        scale=scales.numpy(),
        name=mil_name(name),
    )


def _dtype(x: MilVar) -> str:
    return str(types.builtin_to_string(x.dtype))


def _refuse_unknown_attention(head_dim: int, *, scale: float, window: int, chunk: int, layer: int) -> None:
    """scaled_dot_product_attention has no scale of its own, and the mask comes from the app."""
    found = {"scale": scale, "window": window, "chunk": chunk}
    wanted = {"scale": head_dim**-0.5, "window": 0, "chunk": 0}
    for name, value in found.items():
        if abs(value - wanted[name]) > 1e-9:
            raise LoweringError(
                f"the Core ML target cannot lower op 'attention' of layer {layer}: "
                f"{name} is {value:g}, only {wanted[name]:g} works",
                hint="choose another target for this model",
            )
