"""What a model that sees images adds to the table: its decoder's layers that look at them, or states of theirs in the
place of tokens; and ``vision.onnx``, which gives the decoder their keys and values, or these states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.model.graph import FUSED, Constant, Weight, image_names
from exporter.spec import FusionSpec, ImageSpec
from targets.onnxruntime.lower import FLOAT, INT64, MICROSOFT, Emitter, _value
from targets.onnxruntime.read import TILES, image_name

BOOL = ir.DataType.BOOL
_MASKED = float(np.finfo(np.float32).min)


class _GatedEmitter(Emitter):
    """What the decoder of a model that looks at images has in common with its vision graph."""

    def _tanh_gate(self, x: ir.Value, gate: Weight) -> ir.Value:
        result: ir.Value = self._op("Mul", x, self._op("Tanh", self._dense(gate)))
        return result


class SeeingEmitter(_GatedEmitter):
    """A decoder with layers that look at images: inputs ``cross_attention_mask`` bool ``[B, T, M]``, the tiles of all
    images that each token sees, and ``image_key_values.*`` ``[B, KV, M * N, D]``.

    Without an image M and N are 1, keys and values zeros, and no token sees the tile: so every such layer adds 0.
    """

    def _other_inputs(self) -> dict[str, ir.Value]:
        spec = self._graph.spec
        assert spec.images is not None  # who asks for this emitter has looked
        tiles = _value(TILES, BOOL, ("batch_size", "sequence_length", "tiles"))
        keys, values = image_names(len(spec.images.cross_attention_layers))
        shape = ("batch_size", spec.num_key_value_heads, "image_states", spec.head_dim)
        return {"tiles": tiles, **{name: _value(image_name(name), FLOAT, shape) for name in keys + values}}

    def _table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super()._table(),
            "cross_attention": self._cross_attention,
            "where_seen": lambda x, tiles: self._op("Mul", x, self._to_float(self._sees_any(tiles))),
            "tanh_gate": self._tanh_gate,
        }

    def _cross_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, tiles: ir.Value, heads: int, kv_heads: int, scale: float
    ) -> ir.Value:
        """The query heads that share a key are rows of one product."""
        groups = heads // kv_heads
        split = self._op("Reshape", q, self._constant([0, 0, kv_heads, groups, -1]))
        by_key = self._op("Transpose", split, perm=[0, 2, 3, 1, 4])  # [B, KV, H/KV, T, D]
        rows = self._op("Reshape", by_key, self._constant([0, 0, -1, self._graph.spec.head_dim]))
        scores = self._op("FusedMatMul", rows, k, domain=MICROSOFT, transB=1, alpha=scale)  # [B, KV, H/KV*T, M*N]
        length = self._op("Shape", by_key, start=3, end=4)
        apart = self._op("Concat", self._constant([0, 0, groups]), length, self._constant([-1]), axis=0)
        masked = self._op("Add", self._op("Reshape", scores, apart), self._mask(tiles, k))
        seen = self._op("Softmax", masked, axis=-1)
        context = self._op("MatMul", self._op("Reshape", seen, self._op("Shape", scores)), v)
        back = self._op("Transpose", self._op("Reshape", context, apart), perm=[0, 3, 1, 2, 4])
        merged: ir.Value = self._op("Reshape", back, self._constant([0, 0, -1]))
        return merged

    def _sees_any(self, tiles: ir.Value) -> ir.Value:
        """bool ``[B, T, 1]``"""

        def make() -> ir.Value:
            count = self._op("ReduceSum", self._op("Cast", tiles, to=INT64), self._constant([2]), keepdims=1)
            return self._op("Greater", count, self._constant(0))

        return self._made_once("sees any", make)

    def _mask(self, tiles: ir.Value, k: ir.Value) -> ir.Value:
        """What is added to the scores: float ``[B, 1, 1, T, M*N]``; nothing for a token that sees no tile."""

        def make() -> ir.Value:
            seen = self._op("Or", tiles, self._op("Not", self._sees_any(tiles)))  # [B, T, M]
            bias = self._op("Where", seen, self._constant(0.0), self._constant(_MASKED))
            states = self._op("Div", self._op("Shape", k, start=2, end=3), self._op("Shape", tiles, start=2, end=3))
            shape = self._op("Concat", self._op("Shape", tiles), states, axis=0)
            spread = self._op("Expand", self._op("Unsqueeze", bias, self._constant([3])), shape)  # [B, T, M, N]
            flat = self._op("Reshape", spread, self._constant([0, 0, -1]))
            return self._op("Unsqueeze", flat, self._constant([1, 2]))

        return self._made_once("image mask", make)


class FusingEmitter(Emitter):
    """A decoder with states of images in the place of tokens: inputs ``image_states`` float ``[B, T, H]`` and ``shown``
    bool ``[B, T]``, which tokens these are."""

    def _other_inputs(self) -> dict[str, ir.Value]:
        shape = ("batch_size", "sequence_length")
        states = _value(FUSED[0], FLOAT, (*shape, self._graph.spec.hidden_size))
        return {FUSED[0]: states, FUSED[1]: _value(FUSED[1], BOOL, shape)}

    def _table(self) -> dict[str, Callable[..., Any]]:
        return {**super()._table(), "fuse": self._fuse}

    def _fuse(self, x: ir.Value, states: ir.Value, shown: ir.Value) -> ir.Value:
        result: ir.Value = self._op("Where", self._op("Unsqueeze", shown, self._constant([2])), states, x)
        return result


class _PixelEmitter(_GatedEmitter):
    """What both vision graphs have: patches of M tiles at once, and the ops of a transformer with biases."""

    @property
    def _vision(self) -> ImageSpec | FusionSpec:
        vision = self._graph.spec.vision
        assert vision is not None  # who asks for this emitter has looked
        return vision

    @property
    def _tiles(self) -> int:
        return self._vision.tiles_at_once

    def _pixels(self) -> ir.Value:
        side = self._vision.image_size
        return _value("pixel_values", FLOAT, (1, self._tiles, self._vision.num_channels, side, side))

    def _table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super()._table(),
            "patches": self._patches,
            "layer_norm": self._layer_norm,
            "bias": lambda x, bias: self._op("Add", x, self._dense(bias)),
            "gelu": lambda x: self._op("Gelu", x, domain=MICROSOFT),
        }

    def _patches(self, pixels: ir.Value, size: int) -> ir.Value:
        channels, side = self._vision.num_channels, self._vision.image_size // size
        cut = self._op("Reshape", pixels, self._constant([self._tiles, channels, side, size, side, size]))
        squares = self._op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
        shape = self._constant([self._tiles, side * side, channels * size * size])
        result: ir.Value = self._op("Reshape", squares, shape)
        return result

    def _class_state(self, state: Weight) -> ir.Value:
        """Of each tile: float ``[M, 1, H]``."""
        shape = self._constant([self._tiles, 1, state.shape[0]])
        result: ir.Value = self._op("Expand", self._dense(state), shape)
        return result

    def _first_states(self, x: ir.Value, count: int) -> ir.Value:
        result: ir.Value = self._op("Slice", x, *(self._constant([bound]) for bound in (0, count, 1)))
        return result

    def _layer_norm(self, x: ir.Value, weight: Weight, bias: Weight, eps: float) -> ir.Value:
        gains, shifts = self._dense(weight), self._dense(bias)
        result: ir.Value = self._op("LayerNormalization", x, gains, shifts, axis=-1, epsilon=eps)
        return result


class TileEmitter(_PixelEmitter):
    """``pixel_values`` float ``[1, 1, C, S, S]``, a tile as transformers' processor gives it -> ``image_states`` float
    ``[1, N, H]``."""

    def build(self) -> ir.Model:
        spec, fusion = self._graph.spec, self._graph.spec.fusion
        assert fusion is not None  # see _vision
        pixels = self._pixels()
        (states,) = self._graph.run(self._table(), {"pixel_values": pixels}).values()
        states.name, states.dtype = FUSED[0], FLOAT
        states.shape = ir.Shape((1, fusion.tile_states, spec.hidden_size))
        return self._model([pixels], [states])

    def _table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super()._table(),
            "append": lambda x, state: self._op("Concat", x, self._class_state(state), axis=1),
            "pad_states": self._first_states,
            "add_position": lambda x, table: self._op("Add", x, self._to_float(self._dense(table))),
            "patch_attention": self._patch_attention,
            "pixel_shuffle": self._pixel_shuffle,
        }

    def _patch_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, angles: Constant, heads: int) -> ir.Value:
        shape = tuple(angles.value.shape)
        tables = [
            self._initializer("constant.patch_cos", FLOAT, shape, angles.value.cos),
            self._initializer("constant.patch_sin", FLOAT, shape, angles.value.sin),
        ]
        first = self._constant([0])  # position of the first state; others follow
        q, k = (self._op("RotaryEmbedding", x, first, *tables, domain=MICROSOFT, num_heads=heads) for x in (q, k))
        result: ir.Value = self._op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=heads)
        return result

    def _pixel_shuffle(self, x: ir.Value, step: int) -> ir.Value:
        fusion = self._graph.spec.fusion
        assert fusion is not None  # see _vision
        side, size = fusion.side // step, fusion.hidden_size
        cut = self._op("Reshape", x, self._constant([self._tiles, side, step, side, step, size]))
        squares = self._op("Transpose", cut, perm=[0, 1, 3, 2, 4, 5])
        result: ir.Value = self._op("Reshape", squares, self._constant([self._tiles, side * side, step * step * size]))
        return result


class VisionEmitter(_PixelEmitter):
    """``pixel_values`` float ``[1, M, C, S, S]``, ``aspect_ratio_ids`` int64 ``[1, 1]``, ``aspect_ratio_mask`` int64
    ``[1, 1, M]``, as transformers' processor gives them of one image -> ``image_key_values.*``."""

    def build(self) -> ir.Model:
        spec, images = self._graph.spec, self._graph.spec.images
        assert images is not None
        tiles = self._tiles
        inputs = {
            "pixel_values": self._pixels(),
            "aspect_ratio_ids": _value("aspect_ratio_ids", INT64, (1, 1)),
            "aspect_ratio_mask": _value("aspect_ratio_mask", INT64, (1, 1, tiles)),
        }
        found = self._graph.run(self._table(), inputs)
        shape = ir.Shape((1, spec.num_key_value_heads, tiles * images.tile_states, spec.head_dim))
        for name, value in found.items():
            value.name, value.dtype, value.shape = image_name(name), FLOAT, shape
        return self._model([*inputs.values()], [*found.values()])

    def _table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super()._table(),
            "tanh_gate": self._tanh_gate,
            "prepend": lambda x, state: self._op("Concat", self._class_state(state), x, axis=1),
            "pad_states": self._pad_states,
            "add_position": self._add_position,
            "add_tile_position": self._add_tile_position,
            "tile_attention": self._tile_attention,
            "concat": lambda *parts: self._op("Concat", *parts, axis=-1),
            "as_heads": self._as_heads,
        }

    def _add_position(self, x: ir.Value, table: Weight, gate: Weight) -> ir.Value:
        share = self._op("Sub", self._constant(1.0), self._op("Tanh", self._dense(gate)))
        result: ir.Value = self._op("Add", x, self._op("Mul", share, self._to_float(self._dense(table))))
        return result

    def _add_tile_position(self, x: ir.Value, ratio: ir.Value, table: Weight, gate: Weight) -> ir.Value:
        images = self._graph.spec.images
        assert images is not None
        row = self._rows(ratio, self._dense(table))
        by_tile = self._op("Reshape", row, self._constant([self._tiles, -1, images.hidden_size]))
        result: ir.Value = self._op("Add", x, self._op("Mul", self._op("Tanh", self._dense(gate)), by_tile))
        return result

    def _pad_states(self, x: ir.Value, count: int) -> ir.Value:
        """Zeros behind, or the first only: which of them, the number of states there are decides, that the file's
        reader knows as we do."""
        images = self._graph.spec.images
        assert images is not None
        if count == images.tile_states:
            return self._first_states(x, count)
        padding = self._constant([0, 0, 0, 0, count - images.tile_states, 0])
        padded: ir.Value = self._op("Pad", x, padding, self._constant(0.0))
        return padded

    def _tile_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, tiles: ir.Value, states: int, heads: int
    ) -> ir.Value:
        """The queries of one tile after another, since scores of all on all take gigabytes."""
        images = self._graph.spec.images
        assert images is not None
        size = images.hidden_size // heads
        everything = self._constant([1, -1, heads, size])
        keys = self._op("Transpose", self._op("Reshape", k, everything), perm=[0, 2, 1, 3])  # [1, heads, M*N, D]
        values = self._op("Transpose", self._op("Reshape", v, everything), perm=[0, 2, 1, 3])
        contexts = []
        for tile in range(self._tiles):
            own = self._op("Gather", q, self._constant([tile]), axis=0)  # [1, N, heads*D]
            queries = self._op(
                "Transpose", self._op("Reshape", own, self._constant([0, 0, heads, size])), perm=[0, 2, 1, 3]
            )
            scores = self._op("FusedMatMul", queries, keys, domain=MICROSOFT, transB=1, alpha=size**-0.5)
            masked = self._op("Add", scores, self._padding_mask(q, tiles, states, tile))
            context = self._op("MatMul", self._op("Softmax", masked, axis=-1), values)  # [1, heads, N, D]
            merged = self._op("Transpose", context, perm=[0, 2, 1, 3])
            contexts.append(self._op("Reshape", merged, self._constant([0, 0, -1])))
        result: ir.Value = self._op("Concat", *contexts, axis=0)
        return result

    def _padding_mask(self, q: ir.Value, tiles: ir.Value, states: int, tile: int) -> ir.Value:
        """What is added to the scores of the states of ``tile``: float ``[1, 1, N, M*N]``."""

        def padding() -> ir.Value:
            length = self._op("Squeeze", self._op("Shape", q, start=1, end=2))
            places = self._op("Range", self._constant(0), length, self._constant(1))  # [N]
            behind = self._op("GreaterOrEqual", places, self._constant(states))
            absent = self._op("Equal", self._op("Reshape", tiles, self._constant([-1, 1])), self._constant(0))
            return self._op("Or", behind, absent)  # [M, N]

        def make() -> ir.Value:
            all_of_it = self._made_once("padding", padding)
            keys = self._op("Reshape", all_of_it, self._constant([1, -1]))
            queries = self._op(
                "Reshape", self._op("Gather", all_of_it, self._constant(tile), axis=0), self._constant([-1, 1])
            )
            masked = self._op("And", queries, keys)
            bias = self._op("Where", masked, self._constant(_MASKED), self._constant(0.0))
            return self._op("Unsqueeze", bias, self._constant([0, 1]))

        return self._made_once(("padding", tile), make)

    def _as_heads(self, x: ir.Value, heads: int) -> ir.Value:
        split = self._op("Reshape", x, self._constant([1, -1, heads, self._graph.spec.head_dim]))
        result: ir.Value = self._op("Transpose", split, perm=[0, 2, 1, 3])
        return result
