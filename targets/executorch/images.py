"""What a model that sees images adds: its decoder's layers that look at them, or states of theirs in the place of
tokens; and ``vision.pte``, which gives the decoder their keys and values, or these states.

Two programs, as ExecuTorch's own example of this model has them (examples/models/llama3_2_vision: ``vision_encoder``,
``text_decoder``): the one is run once for an image, and its weights can then be let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from exporter.errors import LoweringError
from exporter.model.graph import FUSED, Constant, Graph, Table, Weight, image_names
from exporter.model.reference import Weights
from exporter.model.trace import trace_program, trace_vision
from exporter.spec import Artifact, FusionSpec, ImageSpec, ModelSpec
from exporter.store import StoredWeight
from targets.executorch import MOST_IMAGES, VISION, border, read
from targets.executorch.lower import (
    EXAMPLE_LENGTH,
    BaseWalk,
    Dequantized,
    Example,
    Walk,
    compiled,
    write_compiled,
    write_program,
)
from targets.executorch.outer import Step
from targets.executorch.xnnpack import Segment, Wire

_EXAMPLE_TILES = 2
"""Of all images in the example that is traced."""


class SeeingWalk(Walk):
    """A decoder with layers that look at images: behind tokens and position it takes ``tiles`` bool ``[1, T, M]``, the
    tiles of all images that each token sees, and of each such layer the keys, then of each the values,
    ``[1, M * N, KV, D]``: M from 1 to the tiles of ``MOST_IMAGES``, N the states of a tile.

    Without an image M is 1, keys and values zeros, and no token sees the tile: so every such layer adds 0.
    """

    _seen: tuple[Wire, Wire] | None = None

    def _other_inputs(self, spec: ModelSpec) -> dict[str, Wire]:
        images = _images(spec)
        tiles = MOST_IMAGES * images.max_num_tiles
        keys, values = image_names(len(images.cross_attention_layers))
        shape = (1, tiles * images.tile_states, spec.num_key_value_heads, spec.head_dim)
        mask, seen = Wire((self._context, shape[1])), Wire((1, self._context, 1))
        given = Wire((1, self._context, tiles))
        self._steps.append(Step(TileMask(images.tile_states), (given,), (mask, seen)))
        self._seen = mask, seen
        return {"tiles": given, **{name: Wire(shape) for name in keys + values}}

    def example(self, spec: ModelSpec) -> Example:
        images, text = _images(spec), super().example(spec)
        count = Dim("tiles", max=MOST_IMAGES * images.max_num_tiles)
        states = images.tile_states * count
        shape = (1, images.tile_states * _EXAMPLE_TILES, spec.num_key_value_heads, spec.head_dim)
        tiles = torch.zeros(1, EXAMPLE_LENGTH, _EXAMPLE_TILES, dtype=torch.bool)
        taken = [torch.zeros(shape) for _ in range(2 * len(images.cross_attention_layers))]
        assert text.dynamic_shapes is not None  # of a decoder
        length, start = text.dynamic_shapes
        others = ({**length, 2: count}, *({1: states} for _ in taken))
        return Example((*text.inputs, tiles, *taken), (length, start, others))

    def _table(self) -> Table:
        return {**super()._table(), "cross_attention": self._cross_attention, "where_seen": self._where_seen}

    def _cross_attention(
        self, q: Wire, k: Wire, v: Wire, _tiles: Wire, heads: int, _kv_heads: int, scale: float
    ) -> Wire:
        assert self._seen is not None  # set before the walk
        mask, _ = self._seen
        queries = self._segment.split_heads(q, heads)
        context = self._outside(MaskedAttention(scale), queries, k, v, mask, shape=queries.shape)
        return self._segment.join_heads(context)

    def _where_seen(self, x: Wire, _tiles: Wire) -> Wire:
        assert self._seen is not None  # set before the walk
        _, seen = self._seen
        return self._segment.multiply(x, seen)


class FusingWalk(Walk):
    """A decoder with states of images in the place of tokens: behind tokens and position it takes ``image_states``
    float32 ``[1, T, H]`` and ``shown`` bool ``[1, T]``, in the place of which tokens."""

    def _other_inputs(self, spec: ModelSpec) -> dict[str, Wire]:
        states, shown = FUSED
        return {states: Wire((1, self._context, spec.hidden_size)), shown: Wire((1, self._context))}

    def example(self, spec: ModelSpec) -> Example:
        text = super().example(spec)
        states = torch.zeros(1, EXAMPLE_LENGTH, spec.hidden_size)
        shown = torch.zeros(1, EXAMPLE_LENGTH, dtype=torch.bool)
        assert text.dynamic_shapes is not None  # of a decoder
        length, start = text.dynamic_shapes
        return Example((*text.inputs, states, shown), (length, start, (length, length)))

    def _table(self) -> Table:
        return {**super()._table(), "fuse": lambda x, *fused: self._outside(Fused(), x, *fused, shape=x.shape)}


def walk_of(spec: ModelSpec) -> type[Walk]:
    """Over the decoder of one that sees images."""
    return FusingWalk if spec.fusion else SeeingWalk


class _PixelWalk(BaseWalk):
    """Over a vision graph. Every length is fixed."""

    def run(self, graph: Graph) -> nn.Module:
        inputs = {name: Wire(tuple(tensor.shape)) for name, tensor in self._given().items()}
        found = graph.run(self._table(), inputs)
        return self._finished(inputs=[*inputs.values()], outputs=[*found.values()], context=None)

    def example(self) -> Example:
        return Example((*self._given().values(),))

    def _given(self) -> dict[str, Tensor]:
        """Its inputs, by our names."""
        raise NotImplementedError

    def _table(self) -> Table:
        return {
            **super()._table(),
            "patches": self._patches,
            "pad_states": lambda x, count: self._outside(Padded(count), x, shape=(x.shape[0], count, x.shape[2])),
            "layer_norm": self._layer_norm,
            "bias": lambda x, bias: self._segment.bias(x, bias.name, self._vector(bias)),
            "gelu": self._in_segment(Segment.gelu),
        }

    def _patches(self, pixels: Wire, size: int) -> Wire:
        _, count, channels, side, _ = pixels.shape
        return self._outside(Patches(size), pixels, shape=(count, (side // size) ** 2, channels * size * size))

    def _layer_norm(self, x: Wire, weight: Weight, bias: Weight, eps: float) -> Wire:
        gains, shifts = (weight.name, self._vector(weight)), (bias.name, self._vector(bias))
        return self._segment.layer_norm(x, weight=gains, bias=shifts, eps=eps)

    def _matrix(self, table: Weight) -> Tensor:
        values = self._weights[table.name]
        assert isinstance(values, Tensor)  # what is no product is float32 or float16 in every scheme
        return values


class TileWalk(_PixelWalk):
    """``pixel_values`` float32 ``[1, 1, C, S, S]``, a tile as transformers' processor gives it -> ``image_states``
    float32 ``[1, N, H]``."""

    def __init__(self, weights: Weights, matrices: Weights, spec: ModelSpec) -> None:
        super().__init__(weights, matrices)
        assert spec.fusion is not None  # who lowers what sees them has looked
        self._fusion: FusionSpec = spec.fusion
        self._turns: tuple[Wire, Wire] | None = None

    def _given(self) -> dict[str, Tensor]:
        side = self._fusion.image_size
        return {"pixel_values": torch.zeros(1, 1, self._fusion.num_channels, side, side)}

    def _table(self) -> Table:
        return {
            **super()._table(),
            "append": self._append,
            "add_position": self._add_position,
            "patch_attention": self._patch_attention,
            "pixel_shuffle": self._pixel_shuffle,
        }

    def _append(self, x: Wire, state: Weight) -> Wire:
        count, length, width = x.shape
        return self._outside(Appended(self._vector(state)), x, shape=(count, length + 1, width))

    def _add_position(self, x: Wire, table: Weight) -> Wire:
        return self._segment.add(x, self._outside(Positions(self._matrix(table)), shape=(1, *table.shape)))

    def _patch_attention(self, q: Wire, k: Wire, v: Wire, angles: Constant, heads: int) -> Wire:
        if self._turns is None:
            module = Turns(angles.value)
            cos, sin = Wire(tuple(module.get_buffer("cos").shape)), Wire(tuple(module.get_buffer("sin").shape))
            self._steps.append(Step(module, (), (cos, sin)))
            self._turns = cos, sin
        cos, sin = self._turns
        segment = self._segment
        q, k, v = (segment.split_heads(x, heads) for x in (q, k, v))
        q, k = segment.rotate(q, cos=cos, sin=sin), segment.rotate(k, cos=cos, sin=sin)
        context = self._outside(WholeAttention(q.shape[-1] ** -0.5), q, k, v, shape=q.shape)
        return self._segment.join_heads(context)

    def _pixel_shuffle(self, x: Wire, step: int) -> Wire:
        count, length, width = x.shape
        shape = (count, length // step**2, width * step**2)
        return self._outside(Shuffled(self._fusion.side, step), x, shape=shape)


class VisionWalk(_PixelWalk):
    """Over what turns one image into keys and values: ``pixel_values`` float32 ``[1, M, C, S, S]``,
    ``aspect_ratio_ids`` int64 ``[1, 1]``, ``aspect_ratio_mask`` int64 ``[1, 1, M]``, as transformers' processor gives
    them -> of each layer that looks the keys, then of each the values, ``[1, M * N, KV, D]``. Every length is fixed."""

    def __init__(self, weights: Weights, matrices: Weights, spec: ModelSpec) -> None:
        super().__init__(weights, matrices)
        self._images = _images(spec)
        self._masks: dict[tuple[int, int], Wire] = {}

    def _given(self) -> dict[str, Tensor]:
        images = self._images
        count, side = images.max_num_tiles, images.image_size
        return {
            "pixel_values": torch.zeros(1, count, images.num_channels, side, side),
            "aspect_ratio_ids": torch.zeros(1, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.zeros(1, 1, count, dtype=torch.int64),
        }

    def _table(self) -> Table:
        return {
            **super()._table(),
            "prepend": self._prepend,
            "add_position": self._add_position,
            "add_tile_position": self._add_tile_position,
            "tile_attention": self._tile_attention,
            "concat": self._concat,
            "as_heads": self._in_segment(Segment.as_heads),
        }

    def _prepend(self, x: Wire, state: Weight) -> Wire:
        count, length, width = x.shape
        return self._outside(Prepended(self._vector(state)), x, shape=(count, length + 1, width))

    def _add_position(self, x: Wire, table: Weight, gate: Weight) -> Wire:
        positions = self._outside(Positions(self._matrix(table)), shape=(1, *table.shape))
        return self._segment.add_rest(x, positions, gate.name, self._vector(gate))

    def _add_tile_position(self, x: Wire, ratio: Wire, table: Weight, gate: Weight) -> Wire:
        count, width = x.shape[0], x.shape[2]
        shape = (count, table.shape[1] // (count * width), width)
        row = self._outside(Row(self._matrix(table), shape), ratio, shape=shape)
        return self._segment.add(x, self._segment.tanh_gate(row, gate.name, self._vector(gate)))

    def _tile_attention(self, q: Wire, k: Wire, v: Wire, tiles: Wire, states: int, heads: int) -> Wire:
        count, length, width = q.shape
        if (states, length) not in self._masks:
            shape = (count * length, count * length)
            self._masks[states, length] = self._outside(PaddingMask(states, length), tiles, shape=shape)
        module = TileAttention(heads, scale=(width // heads) ** -0.5)
        return self._outside(module, q, k, v, self._masks[states, length], shape=q.shape)

    def _concat(self, *parts: Wire) -> Wire:
        return self._outside(Concatenated(), *parts, shape=(*parts[0].shape[:-1], sum(x.shape[-1] for x in parts)))


def write_vision(graph: Graph, weights: Weights, path: Path, *, matrices: Weights | None = None) -> None:
    """Lower ``graph``, the vision graph of a model, and write ``path``, whole or not at all; ``matrices`` as
    ``targets.executorch.lower.write_program``. Raises LoweringError."""
    with border.toolchain("lower the graph"):
        walk = TileWalk if graph.spec.fusion else VisionWalk
        walked = walk(weights, matrices or weights, graph.spec)
        outer = walked.run(graph)
        program = compiled(outer, walked.example(), described={})
    write_compiled(program, outer, path)


def write_unrounded(artifact: Artifact, folder: Path) -> Artifact:
    """Both programs again, of the weights in their files, with the codes of every linear as the float32 weight that
    they stand for."""
    weights, program = dict(read_weights(artifact)), trace_program(artifact.spec)
    assert program.vision is not None  # the artifact sees
    path, matrices = folder / artifact.path.name, Dequantized(weights)
    write_vision(program.vision, weights, path.with_name(VISION), matrices=matrices)
    write_program(
        program.decoder,
        weights,
        path,
        context=artifact.context,
        logits=artifact.logits,
        matrices=matrices,
        walk=walk_of(artifact.spec),
    )
    return replace(artifact, path=path)


def read_weights(artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
    """Every weight in both files under its stored name.

    Raises LoweringError for a file that is no whole program, or in which a weight is missing or has a wrong size.
    """
    vision = trace_vision(artifact.spec)
    used = {a.name: a.shape for node in vision.nodes for a in node.arguments if isinstance(a, Weight)}
    yield from read.read_weights(artifact, elsewhere=used)
    path = artifact.path.with_name(VISION)
    with read.ProgramFile(path) as file:
        constants = read.constants_in_order(file)
        for weight in _nameless(vision):
            own = [tensor for tensor in constants if tuple(tensor.sizes) == weight.shape]
            if not own:
                raise LoweringError(f"{path} holds no {weight.name}", hint="lower the model again")
            constants.remove(own[0])
            yield weight.name, file.constant(own[0])
            del used[weight.name]
        for name, shape in used.items():
            yield name, read.read_named(file, name, shape)


def _nameless(vision: Graph) -> list[Weight]:
    """What no delegate holds, but the outer program: constants without a name, which are found in the order in which
    graph and file use them, those of each shape."""
    outside = ("prepend", "append", "add_position", "add_tile_position")
    read_outside = [node for node in vision.nodes if node.op in outside]
    weights = [a for node in read_outside for a in node.arguments if isinstance(a, Weight)]
    return [weight for weight in weights if weight.shape != _GATE]


_GATE = (1,)


def _images(spec: ModelSpec) -> ImageSpec:
    assert spec.images is not None  # who lowers what sees them has looked
    return spec.images


class TileMask(nn.Module):
    """bool [1, T, M] -> what is added to scores, float32 [T, M * states]: 0 for the states of a tile that a token sees,
    and for all of a token that sees none, else -inf; and float32 [1, T, 1]: 1 for a token that sees one, else 0."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = states

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        sees_any = tiles.any(dim=2, keepdim=True)
        added = torch.where(tiles | ~sees_any, 0.0, -torch.inf)[0].unsqueeze(2)  # [T, M, 1]
        return added.expand(-1, -1, self.states).flatten(1), sees_any.float()


class MaskedAttention(nn.Module):
    """q [1, T, H, D], k and v [1, S, KV, D], mask [T, S] -> context [1, T, H, D]."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        start, dropout, causal = 0, 0.0, False
        context: Tensor = torch.ops.llama.custom_sdpa(q, k, v, start, mask, dropout, causal, self.scale)
        return context


class TileAttention(nn.Module):
    """q, k, v [M, N, heads * D], mask [M * N, M * N] -> context [M, N, heads * D]."""

    def __init__(self, heads: int, *, scale: float) -> None:
        super().__init__()
        self.heads, self.attend = heads, MaskedAttention(scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        count, length, width = q.shape
        shape = (1, count * length, self.heads, width // self.heads)
        context: Tensor = self.attend(q.view(shape), k.view(shape), v.view(shape), mask)
        return context.view(count, length, width)


class PaddingMask(nn.Module):
    """int64 [1, 1, M] -> float32 [M * length, M * length]: -inf between padding and padding, that is what lies behind
    the first ``states`` of a tile and the tiles that are 0; else 0."""

    def __init__(self, states: int, length: int) -> None:
        super().__init__()
        self.register_buffer("behind", torch.arange(length) >= states)

    def forward(self, tiles: Tensor) -> Tensor:
        padding = (self.get_buffer("behind") | (tiles.view(-1, 1) == 0)).flatten()
        return torch.where(padding.unsqueeze(1) & padding, -torch.inf, 0.0)


class Patches(nn.Module):
    """See ``exporter.model.image_ops.patches``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, pixels: Tensor) -> Tensor:
        _, count, channels, side, _ = pixels.shape
        many = side // self.size
        cut = pixels.view(count, channels, many, self.size, many, self.size).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(count, many * many, channels * self.size * self.size)


class Prepended(nn.Module):
    """[M, N, H] -> [M, N + 1, H], with a state in front of each tile's."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.register_buffer("state", state)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_buffer("state").expand(len(x), 1, -1), x], dim=1)


class Appended(nn.Module):
    """[M, N, H] -> [M, N + 1, H], with a state behind each tile's."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.register_buffer("state", state)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.get_buffer("state").expand(len(x), 1, -1)], dim=1)


class Fused(nn.Module):
    """See ``exporter.model.image_ops.fuse``."""

    def forward(self, x: Tensor, states: Tensor, shown: Tensor) -> Tensor:
        return torch.where(shown.unsqueeze(2), states, x)


class Shuffled(nn.Module):
    """See ``exporter.model.image_ops.pixel_shuffle``."""

    def __init__(self, side: int, step: int) -> None:
        super().__init__()
        self.side, self.step = side // step, step

    def forward(self, x: Tensor) -> Tensor:
        count, _, width = x.shape
        squares = x.view(count, self.side, self.step, self.side, self.step * width).transpose(2, 3)
        return squares.reshape(count, self.side * self.side, self.step * self.step * width)


class Turns(nn.Module):
    """Of angles [N, D/2] the tables that ``Segment.rotate`` takes, float32 [1, N, 1, D]."""

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1)[None, :, None])
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1)[None, :, None])

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("cos"), self.get_buffer("sin")


class WholeAttention(nn.Module):
    """q, k, v [1, N, H, D] -> context [1, N, H, D]: every state sees every other."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, mask, dropout, causal = 0, None, 0.0, False
        context: Tensor = torch.ops.llama.custom_sdpa(q, k, v, start, mask, dropout, causal, self.scale)
        return context


class Positions(nn.Module):
    """A table [N, H], as float32 [1, N, H]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self) -> Tensor:
        return self.get_buffer("table").float().unsqueeze(0)


class Row(nn.Module):
    """int64 [1, 1] -> that row of a table, float32 in ``shape``."""

    def __init__(self, table: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.shape = shape

    def forward(self, ratio: Tensor) -> Tensor:
        return F.embedding(ratio, self.get_buffer("table")).float().view(self.shape)


class Padded(nn.Module):
    """See ``exporter.model.image_ops.pad_states``."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        missing = self.count - x.shape[1]
        return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x[:, : self.count]


class Concatenated(nn.Module):
    """[..., H], ... -> [..., H + ...]."""

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=-1)
