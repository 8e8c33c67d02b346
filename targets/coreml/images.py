"""What a model that sees images adds to the table: its decoder's layers that look at them, or states of theirs in the
place of tokens; and ``vision.mlpackage``, which gives the decoder their keys and values, or these states.

Features beside those of ``lower.py``: the decoder's inputs ``crossAttentionMask`` float16 [1, T, M], 1 for each tile of
all images that a token sees and 0 for the others, and for each layer that looks ``imageKey_i`` and ``imageValue_i``
float16 [KV, M, N, D], outputs of vision of the same names, those of several images one behind the other on the second
axis. N is the number of states of a tile, so that M is the only length that is open. Of states among tokens:
``imageStates`` float16 [1, T, H], output of vision as [1, N, H], and ``shown`` float16 [1, T, 1], 1 for each token in
whose place a state stands and 0 for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from exporter.model.graph import FUSED, Constant, Graph, Weight, image_names
from exporter.spec import FusionSpec, ImageSpec, Plan
from exporter.store import WeightStore
from targets.coreml import MOST_IMAGES
from targets.coreml.emission import MilVar, cast, refuse_unknown_attention, sizes_of
from targets.coreml.lower import NUMPY, DecoderEmitter, Emitter, Feature
from targets.coreml.toolchain import mb

TILES = "crossAttentionMask"
IMAGE_STATES, SHOWN = "imageStates", "shown"
PIXELS, RATIO, PRESENT = "pixelValues", "aspectRatioIds", "aspectRatioMask"
_MASKED = -3e4
"""Added to a score, nothing is left of it, and it is no infinity in float16."""


def image_name(name: str) -> str:
    """``cross_k.3`` -> ``imageKey_3``: an output of vision, and an input of the decoder."""
    kind, index = name.split(".")
    return f"{'imageKey' if kind == 'cross_k' else 'imageValue'}_{index}"


def image_features(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the vision graph as its program has them."""
    names = {"pixel_values": PIXELS, "aspect_ratio_ids": RATIO, "aspect_ratio_mask": PRESENT}
    return {names[name]: value if value.is_floating_point() else value.int() for name, value in image.items()}


def state_features(states: Mapping[str, Tensor], *, tiles: int) -> dict[str, Tensor]:
    """Keys and values [1, KV, M*N, D] as the decoder's program has them."""
    return {image_name(name): value[0].unflatten(1, (tiles, -1)) for name, value in states.items()}


def fused_features(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """States in the place of tokens, and which tokens, as the decoder's program has them."""
    states, shown = (inputs[name] for name in FUSED)
    return {IMAGE_STATES: states, SHOWN: shown.unsqueeze(2).float()}


class SeeingEmitter(DecoderEmitter):
    """A decoder with layers that look at images. Without an image M is 1, keys and values are zeros, and no token sees
    the tile: so every such layer adds 0."""

    def __init__(self, graph: Graph, store: WeightStore, plan: Plan, compute_dtype: str) -> None:
        super().__init__(graph, store, plan, compute_dtype)
        self._seeing: MilVar = None
        self._unseen: MilVar = None

    def features(self) -> dict[str, Feature]:
        spec, images = self._graph.spec, self._images
        states = Feature(shape=(spec.num_key_value_heads, "tiles", images.tile_states, spec.head_dim), dtype="fp16")
        return {
            **super().features(),
            TILES: Feature(shape=(1, "length", "tiles"), dtype="fp16"),
            **dict.fromkeys(map(image_name, self._names), states),
        }

    def lengths(self) -> dict[str, int]:
        return {**super().lengths(), "tiles": MOST_IMAGES * self._images.max_num_tiles}

    @property
    def _images(self) -> ImageSpec:
        assert self._graph.spec.images is not None  # who asks for this emitter has looked
        return self._graph.spec.images

    @property
    def _names(self) -> list[str]:
        keys, values = image_names(len(self._images.cross_attention_layers))
        return keys + values

    def _other_values(self, inputs: Mapping[str, MilVar]) -> dict[str, MilVar]:
        spec = self._graph.spec
        shape = [1, spec.num_key_value_heads, -1, spec.head_dim]
        states = {
            name: cast(mb.reshape(x=inputs[image_name(name)], shape=shape), self._compute) for name in self._names
        }
        tiles = cast(inputs[TILES], self._compute)
        self._seeing = mb.reduce_max(x=tiles, axes=[-1], keep_dims=True)  # [1, T, 1]: 1 for tokens that see any
        self._unseen = self._bias(tiles, self._seeing)
        return {"tiles": tiles, **states}

    def _bias(self, tiles: MilVar, seeing: MilVar) -> MilVar:
        """What is added to the scores: [1, 1, T, M*N]; nothing for a token that sees no tile."""
        one = self._number(1)
        seen = mb.maximum(x=tiles, y=mb.sub(x=one, y=seeing))  # [1, T, M]
        bias = mb.mul(x=mb.sub(x=one, y=seen), y=self._number(_MASKED))
        spread = mb.tile(x=mb.expand_dims(x=bias, axes=[-1]), reps=[1, 1, 1, self._images.tile_states])
        return mb.reshape(x=spread, shape=sizes_of(1, 1, self._length, -1))

    def table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().table(),
            "cross_attention": self._cross_attention,
            "where_seen": lambda x, _tiles: mb.mul(x=x, y=self._seeing),
        }

    def _cross_attention(
        self, q: MilVar, k: MilVar, v: MilVar, _tiles: MilVar, heads: int, kv_heads: int, scale: float
    ) -> MilVar:
        refuse_unknown_attention(q.shape[2] // heads, scale=scale, window=0, chunk=0, layer=None)
        return self._attend(self._split_heads(q, heads), k, v, kv_heads=kv_heads, mask=self._unseen)


class FusingEmitter(DecoderEmitter):
    """A decoder with states of images in the place of tokens."""

    def features(self) -> dict[str, Feature]:
        return {
            **super().features(),
            IMAGE_STATES: Feature(shape=(1, "length", self._graph.spec.hidden_size), dtype="fp16"),
            SHOWN: Feature(shape=(1, "length", 1), dtype="fp16"),
        }

    def _other_values(self, inputs: Mapping[str, MilVar]) -> dict[str, MilVar]:
        names = zip(FUSED, (IMAGE_STATES, SHOWN), strict=True)
        return {ours: cast(inputs[name], self._compute) for ours, name in names}

    def table(self) -> dict[str, Callable[..., Any]]:
        return {**super().table(), "fuse": self._fuse}

    def _fuse(self, x: MilVar, states: MilVar, shown: MilVar) -> MilVar:
        """Of 0 and 1, so that neither touches the other."""
        kept = mb.mul(x=x, y=mb.sub(x=self._number(1), y=shown))
        return mb.add(x=kept, y=mb.mul(x=states, y=shown))


class _PixelEmitter(Emitter):
    """What both vision graphs have: patches of M tiles, and the ops of a transformer with biases."""

    @property
    def _vision(self) -> ImageSpec | FusionSpec:
        vision = self._graph.spec.vision
        assert vision is not None  # who asks for this emitter has looked
        return vision

    def _pixels(self) -> Feature:
        vision, side = self._vision, self._vision.image_size
        return Feature(shape=(1, vision.tiles_at_once, vision.num_channels, side, side), dtype="fp16")

    def table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().table(),
            "patches": self._patches,
            "pad_states": self._pad_states,
            "layer_norm": self._layer_norm,
            "bias": lambda x, bias: mb.add(x=x, y=cast(self._weight(bias), self._compute)),
            "gelu": lambda x: mb.gelu(x=x, mode="EXACT"),
        }

    def _patches(self, pixels: MilVar, size: int) -> MilVar:
        """Squares side by side come apart first, then those one above the other."""
        tiles, channels, pixels_a_side = self._vision.tiles_at_once, self._vision.num_channels, self._vision.image_size
        side = pixels_a_side // size
        columns = mb.reshape(x=pixels, shape=[tiles, channels, pixels_a_side, side, size])
        by_column = mb.transpose(x=columns, perm=[0, 3, 1, 2, 4])
        rows = mb.reshape(x=by_column, shape=[tiles * side, channels, side, size, size])
        squares = mb.transpose(x=rows, perm=[0, 2, 1, 3, 4])
        flat = mb.reshape(x=squares, shape=[tiles, side, side, channels * size * size])  # a column's rows lie together
        return mb.reshape(x=mb.transpose(x=flat, perm=[0, 2, 1, 3]), shape=[tiles, side * side, channels * size * size])

    def _class_state(self, x: MilVar, state: Weight) -> MilVar:
        """Of each tile of ``x`` [M, N, H]: [M, 1, H]."""
        (width,) = state.shape
        one = mb.reshape(x=cast(self._weight(state), self._compute), shape=[1, 1, width])
        return mb.tile(x=one, reps=[x.shape[0], 1, 1])

    def _pad_states(self, x: MilVar, count: int) -> MilVar:
        tiles, states, width = x.shape
        if count <= states:
            return mb.slice_by_size(x=x, begin=[0, 0, 0], size=[tiles, count, width])
        zeros = np.zeros((tiles, count - states, width), dtype=NUMPY[self._compute])
        return mb.concat(values=[x, mb.const(val=zeros)], axis=1)

    def _layer_norm(self, x: MilVar, weight: Weight, bias: Weight, eps: float) -> MilVar:
        normed = mb.layer_norm(
            x=cast(x, "fp32"),
            axes=[-1],
            gamma=self._weight(weight),
            beta=self._weight(bias),
            epsilon=np.float32(eps),
        )
        return cast(normed, self._compute)


class TileEmitter(_PixelEmitter):
    """``pixelValues`` float16 [1, 1, C, S, S], a tile as transformers' processor gives it -> ``imageStates``."""

    def features(self) -> dict[str, Feature]:
        return {PIXELS: self._pixels()}

    def outputs(self, inputs: Mapping[str, MilVar]) -> list[MilVar]:
        found = self._graph.run(self.table(), {"pixel_values": cast(inputs[PIXELS], self._compute)})
        return [mb.identity(x=cast(found[FUSED[0]], "fp16"), name=IMAGE_STATES)]

    def table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().table(),
            "append": lambda x, state: mb.concat(values=[x, self._class_state(x, state)], axis=1),
            "add_position": lambda x, table: mb.add(x=x, y=cast(self._weight(table), self._compute)),
            "patch_attention": self._patch_attention,
            "pixel_shuffle": self._pixel_shuffle,
        }

    def _patch_attention(self, q: MilVar, k: MilVar, v: MilVar, angles: Constant, heads: int) -> MilVar:
        count, length, width = q.shape
        tables = [table[None, None].numpy() for table in (angles.value.cos(), angles.value.sin())]
        queries, keys, values = (
            mb.transpose(x=mb.reshape(x=x, shape=[count, length, heads, width // heads]), perm=[0, 2, 1, 3])
            for x in (q, k, v)
        )
        context = mb.scaled_dot_product_attention(
            query=self._turned(queries, *tables), key=self._turned(keys, *tables), value=values
        )
        return mb.reshape(x=mb.transpose(x=context, perm=[0, 2, 1, 3]), shape=[count, length, width])

    def _pixel_shuffle(self, x: MilVar, step: int) -> MilVar:
        """Of one tile: the squares of a row of patches lie side by side as they are."""
        fusion = self._graph.spec.fusion
        assert fusion is not None  # see _vision
        side, width = fusion.side // step, step * x.shape[2]
        squares = mb.transpose(x=mb.reshape(x=x, shape=[side, step, side, width]), perm=[0, 2, 1, 3])
        return mb.reshape(x=squares, shape=[1, side * side, step * width])


class VisionEmitter(_PixelEmitter):
    """``pixelValues`` float16 [1, M, C, S, S], ``aspectRatioIds`` int32 [1, 1] and ``aspectRatioMask`` int32 [1, 1, M],
    as transformers' processor gives them of one image -> ``imageKey_i`` and ``imageValue_i``.

    Nothing is open, and no value has more than five dimensions: Core ML takes none that has. Norms and gates are
    computed in float32.
    """

    def __init__(self, graph: Graph, store: WeightStore, plan: Plan, compute_dtype: str) -> None:
        super().__init__(graph, store, plan, compute_dtype)
        self._masks: list[MilVar] = []

    def features(self) -> dict[str, Feature]:
        tiles = self._images.max_num_tiles
        return {
            PIXELS: self._pixels(),
            RATIO: Feature(shape=(1, 1), dtype="int32"),
            PRESENT: Feature(shape=(1, 1, tiles), dtype="int32"),
        }

    def outputs(self, inputs: Mapping[str, MilVar]) -> list[MilVar]:
        given = {
            "pixel_values": cast(inputs[PIXELS], self._compute),
            "aspect_ratio_ids": inputs[RATIO],
            "aspect_ratio_mask": inputs[PRESENT],
        }
        found = self._graph.run(self.table(), given)
        return [mb.identity(x=cast(value, "fp16"), name=image_name(name)) for name, value in found.items()]

    @property
    def _images(self) -> ImageSpec:
        assert self._graph.spec.images is not None
        return self._graph.spec.images

    def table(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().table(),
            "prepend": lambda x, state: mb.concat(values=[self._class_state(x, state), x], axis=1),
            "add_position": self._add_position,
            "add_tile_position": self._add_tile_position,
            "tile_attention": self._tile_attention,
            "concat": lambda *parts: mb.concat(values=parts, axis=-1),
            "as_heads": self._as_heads,
        }

    def _add_position(self, x: MilVar, table: Weight, gate: Weight) -> MilVar:
        share = cast(mb.sub(x=np.float32(1), y=self._tanh(gate)), self._compute)
        return mb.add(x=x, y=mb.mul(x=cast(self._weight(table), self._compute), y=share))

    def _add_tile_position(self, x: MilVar, ratio: MilVar, table: Weight, gate: Weight) -> MilVar:
        row = cast(mb.gather(x=self._weight(table), indices=ratio, axis=0), self._compute)
        by_tile = mb.reshape(x=row, shape=[x.shape[0], -1, x.shape[2]])
        return mb.add(x=x, y=mb.mul(x=by_tile, y=cast(self._tanh(gate), self._compute)))

    def _tile_attention(self, q: MilVar, k: MilVar, v: MilVar, tiles: MilVar, states: int, heads: int) -> MilVar:
        """The queries of one tile after another, since scores of all on all take gigabytes where they are not fused."""
        count, length, width = q.shape
        size = width // heads
        queries = mb.transpose(x=mb.reshape(x=q, shape=[count, length, heads, size]), perm=[0, 2, 1, 3])
        keys, values = (
            mb.transpose(x=mb.reshape(x=x, shape=[1, count * length, heads, size]), perm=[0, 2, 1, 3]) for x in (k, v)
        )
        contexts = [
            mb.scaled_dot_product_attention(
                query=mb.slice_by_size(x=queries, begin=[tile, 0, 0, 0], size=[1, heads, length, size]),
                key=keys,
                value=values,
                attn_mask=mask,
            )
            for tile, mask in enumerate(self._padding_masks(tiles, length, states))
        ]  # each [1, heads, N, D]
        merged = mb.transpose(x=mb.concat(values=contexts, axis=0), perm=[0, 2, 1, 3])
        return mb.reshape(x=merged, shape=[count, length, width])

    def _padding_masks(self, tiles: MilVar, length: int, states: int) -> list[MilVar]:
        """What is added to the scores of the states of each tile: [1, 1, N, M*N]; the same in every layer."""
        if not self._masks:
            count = self._images.max_num_tiles
            absent = mb.cast(x=mb.equal(x=mb.reshape(x=tiles, shape=[count, 1]), y=np.int32(0)), dtype=self._compute)
            behind = (np.arange(length) >= states)[None].astype(NUMPY[self._compute])
            padding = mb.maximum(x=absent, y=behind)  # [M, N]
            keys = mb.mul(x=mb.reshape(x=padding, shape=[1, 1, 1, count * length]), y=self._number(_MASKED))
            for tile in range(count):
                own = mb.slice_by_size(x=padding, begin=[tile, 0], size=[1, length])
                self._masks.append(mb.mul(x=mb.reshape(x=own, shape=[1, 1, length, 1]), y=keys))
        return self._masks

    def _as_heads(self, x: MilVar, heads: int) -> MilVar:
        """[KV, M, N, D]: the heads in front, where the graph has them behind a batch of 1."""
        tiles, states, width = x.shape
        split = mb.reshape(x=x, shape=[tiles, states, heads, width // heads])
        return mb.transpose(x=split, perm=[2, 0, 1, 3])
