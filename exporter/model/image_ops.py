"""The custom ops of a model that sees images. The eager implementation of each is its definition, as in
``exporter.model.ops``.

M tiles of an image, each of N states; a graph of the decoder has those of all images of a text, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.model.rope import rotate


@torch.library.custom_op("llama_export::cross_attention", mutates_args=())
def cross_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, heads: int, kv_heads: int, scale: float) -> Tensor:
    """``q`` [B, T, heads*D] looks at the states of images: ``k`` and ``v`` [B, kv_heads, M*N, D]; ``tiles``
    bool [B, T, M] tells which tiles a token sees. Gives [B, T, heads*D].

    A token that sees no tile looks at all of them, as transformers has it (``_prepare_cross_attention_mask``); where
    there is none at all the context is 0.
    """
    batch, length, _ = q.shape
    queries = q.unflatten(2, (kv_heads, heads // kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, KV, H/KV, T, D]
    seen = tiles | ~tiles.any(dim=2, keepdim=True)  # [B, T, M]
    states = k.shape[2] // max(tiles.shape[2], 1)
    masked = ~seen.repeat_interleave(states, dim=2)[:, None, None]  # [B, 1, 1, T, M*N]
    scores = (scale * queries) @ k.unsqueeze(2).mT
    context = scores.masked_fill(masked, -torch.inf).softmax(dim=-1) @ v.unsqueeze(2)
    return context.permute(0, 3, 1, 2, 4).reshape(batch, length, -1)


@cross_attention.register_fake
def _(q, k, v, tiles, heads, kv_heads, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@torch.library.custom_op("llama_export::where_seen", mutates_args=())
def where_seen(x: Tensor, tiles: Tensor) -> Tensor:
    """``x`` [B, T, H], 0 for each token that sees none of ``tiles`` bool [B, T, M]."""
    return x * tiles.any(dim=2, keepdim=True)


@where_seen.register_fake
def _(x, tiles):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("llama_export::tanh_gate", mutates_args=())
def tanh_gate(x: Tensor, gate: Tensor) -> Tensor:
    """``x`` of any shape times the hyperbolic tangent of ``gate`` [1]."""
    return x * gate.tanh()


@tanh_gate.register_fake
def _(x, gate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("llama_export::patches", mutates_args=())
def patches(pixels: Tensor, size: int) -> Tensor:
    """``pixels`` [1, M, C, S, S] cut into squares of ``size``: [M, (S/size)^2, C*size*size], row after row."""
    return F.unfold(pixels[0], kernel_size=size, stride=size).mT.contiguous()


@patches.register_fake
def _(pixels, size):  # type: ignore[no-untyped-def]
    _, tiles, channels, height, width = pixels.shape
    return pixels.new_empty(tiles, (height // size) * (width // size), channels * size * size)


@torch.library.custom_op("llama_export::prepend", mutates_args=())
def prepend(x: Tensor, state: Tensor) -> Tensor:
    """``x`` [M, N, H] with ``state`` [H] in front of each tile's: [M, N + 1, H]."""
    return torch.cat([state.expand(len(x), 1, -1), x], dim=1)


@prepend.register_fake
def _(x, state):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] + 1, x.shape[2])


@torch.library.custom_op("llama_export::append", mutates_args=())
def append(x: Tensor, state: Tensor) -> Tensor:
    """``x`` [M, N, H] with ``state`` [H] behind each tile's: [M, N + 1, H]."""
    return torch.cat([x, state.expand(len(x), 1, -1)], dim=1)


@append.register_fake
def _(x, state):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] + 1, x.shape[2])


@torch.library.custom_op("llama_export::add_position", mutates_args=())
def add_position(x: Tensor, positions: Tensor, gate: Tensor | None = None) -> Tensor:
    """``x`` [M, N, H] with ``positions`` [N, H] added, times 1 - tanh of ``gate`` [1] where there is one."""
    return x + (positions if gate is None else (1 - gate.tanh()) * positions)


@add_position.register_fake
def _(x, positions, gate=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("llama_export::add_tile_position", mutates_args=())
def add_tile_position(x: Tensor, ratio: Tensor, table: Tensor, gate: Tensor) -> Tensor:
    """``x`` [M, N, H] with a row of ``table`` [ids, M*H] (a state for each tile) or [ids, M*N*H] (one for each of its
    states) added, times tanh of ``gate`` [1]: that of ``ratio``, int64 [1, 1], how the tiles lie."""
    row = F.embedding(ratio, table).view(len(x), -1, x.shape[2])
    return x + gate.tanh() * row


@add_tile_position.register_fake
def _(x, ratio, table, gate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("llama_export::pad_states", mutates_args=())
def pad_states(x: Tensor, count: int) -> Tensor:
    """``x`` [M, N, H] with states of zeros behind each tile's, ``count`` in all; of fewer than N the first."""
    return F.pad(x, (0, 0, 0, count - x.shape[1])).clone()


@pad_states.register_fake
def _(x, count):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], count, x.shape[2])


@torch.library.custom_op("llama_export::tile_attention", mutates_args=())
def tile_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, states: int, heads: int) -> Tensor:
    """Every state of an image looks at every other, over all of its tiles: ``q``, ``k``, ``v`` [M, N, heads*D] ->
    [M, N, heads*D].

    What is padding (of a tile all behind the first ``states``; all of a tile that ``tiles``, int64 [1, 1, M], has as 0)
    does not look at padding. All else does, as transformers has it (``_prepare_aspect_ratio_attention_mask``).
    """
    count, length, _ = q.shape
    padding = torch.arange(length).expand(count, -1) >= states
    padding = (padding | (tiles.view(-1, 1) == 0)).flatten()  # [M*N]
    q, k, v = (x.reshape(1, count * length, heads, -1).transpose(1, 2) for x in (q, k, v))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=~(padding & padding.unsqueeze(1)))
    return context.transpose(1, 2).reshape(count, length, -1)


@tile_attention.register_fake
def _(q, k, v, tiles, states, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@torch.library.custom_op("llama_export::as_heads", mutates_args=())
def as_heads(x: Tensor, heads: int) -> Tensor:
    """``x`` [M, N, heads*D] as keys or values of one image: [1, heads, M*N, D]."""
    return x.reshape(1, -1, heads, x.shape[2] // heads).transpose(1, 2).contiguous()


@as_heads.register_fake
def _(x, heads):  # type: ignore[no-untyped-def]
    return x.new_empty(1, heads, x.shape[0] * x.shape[1], x.shape[2] // heads)


@torch.library.custom_op("llama_export::patch_attention", mutates_args=())
def patch_attention(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, heads: int) -> Tensor:
    """Every state of a tile looks at every other of its own tile: ``q``, ``k``, ``v`` [M, N, heads*D] ->
    [M, N, heads*D]. Of each head of a query or key, channels i and i + D/2 are turned by ``angles`` [N, D/2]."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [M, heads, N, D]
    cos, sin = angles.cos(), angles.sin()
    context = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    return context.transpose(1, 2).flatten(2)


@patch_attention.register_fake
def _(q, k, v, angles, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@torch.library.custom_op("llama_export::pixel_shuffle", mutates_args=())
def pixel_shuffle(x: Tensor, step: int) -> Tensor:
    """``x`` [M, side*side, H], states of patches row after row -> [M, (side/step)^2, step*step*H]: those of a square of
    patches, row after row, side by side."""
    side = math.isqrt(x.shape[1])
    squares = x.view(len(x), side // step, step, side // step, step, -1).transpose(2, 3)
    return squares.reshape(len(x), (side // step) ** 2, -1)


@pixel_shuffle.register_fake
def _(x, step):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] // step**2, x.shape[2] * step**2)


@torch.library.custom_op("llama_export::fuse", mutates_args=())
def fuse(x: Tensor, states: Tensor, shown: Tensor) -> Tensor:
    """``x`` [B, T, H], with what ``states`` [B, T, H] has in place of each token that ``shown``, bool [B, T], names."""
    return torch.where(shown.unsqueeze(2), states, x)


@fuse.register_fake
def _(x, states, shown):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def tiles_of(image: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """An image of M tiles, each by itself: the inputs of a vision graph that reads one at a time."""
    return [{"pixel_values": tile} for tile in image["pixel_values"].split(1, dim=1)]


def in_place(states: Tensor, seen: Tensor | None, *, length: int) -> tuple[Tensor, Tensor]:
    """What ``fuse`` is given of ``states`` [1, S, H] for T tokens (``length``), of which ``seen``, bool [T, S], names
    the one that stands in place of each, if any does (None: of none): [1, T, H], zeros where none does, and
    bool [1, T]."""
    if seen is None:
        seen = torch.zeros(length, states.shape[1], dtype=torch.bool)
    placed = states.new_zeros(1, len(seen), states.shape[2])
    tokens, chosen = seen.nonzero(as_tuple=True)
    placed[0, tokens] = states[0, chosen]
    return placed, seen.any(dim=1).unsqueeze(0)
