"""The one custom op of the graph. Its eager implementation is its definition; every target lowers it its own way.

``attention_edges`` is its one decomposition into plain tensor ops, for whoever needs what lies inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.model.rope import rope_table, rotate


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    inv_freq: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    chunk: int,
    *,
    rounded: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op computes, of the same arguments. ``rounded``, where given, is what becomes of rotated queries, of
    rotated new keys and of new values ``[B, heads, T, D]`` before anything is done with them: a cache of few bits."""
    q, k, v = _split_heads(q, heads), _split_heads(k, kv_heads), _split_heads(v, kv_heads)
    q, k = _rotate(q, k, inv_freq, first=past_k.shape[2])
    if rounded:
        q, k, v = rounded(q, k, v)
    present_k = torch.cat([past_k, k], dim=2)  # [B, KV, P+T, D]
    present_v = torch.cat([past_v, v], dim=2)
    repeats = heads // kv_heads
    context = torch.nn.functional.scaled_dot_product_attention(
        q,
        present_k.repeat_interleave(repeats, dim=1),
        present_v.repeat_interleave(repeats, dim=1),
        attn_mask=_visible(past_k.shape[2], q.shape[2], window=window, chunk=chunk),
        scale=scale,
    )
    return _merge_heads(context), present_k, present_v


@torch.library.custom_op("llama_export::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    inv_freq: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention with rotary positions and a key-value cache.

    ``q`` [B, T, heads*D], ``k`` and ``v`` [B, T, kv_heads*D], none of them rotated; ``past_k`` (rotated) and
    ``past_v`` [B, kv_heads, P, D], where P is the position of the first new token; ``inv_freq`` [D/2] float32 with any
    RoPE scaling folded in, None for no rotation. Gives the context [B, T, heads*D] and the caches grown to P + T.
    A graph has B = 1.

    ``window`` > 0: a query sees the last ``window`` keys, itself among them. ``chunk`` > 0: it sees only keys of its
    own chunk of ``chunk`` positions. Query heads h share the keys of head ``h // (heads / kv_heads)`` (Ainslie et al.
    2023, arXiv:2305.13245).
    """
    return attend(q, k, v, past_k, past_v, inv_freq, heads, kv_heads, scale, window, chunk)


@attention.register_fake
def _(q, k, v, past_k, past_v, inv_freq, heads, kv_heads, scale, window=0, chunk=0):  # type: ignore[no-untyped-def]
    batch, _, past_length, head_dim = past_k.shape
    present = past_k.new_empty(batch, kv_heads, past_length + q.shape[1], head_dim)
    return torch.empty_like(q), present, torch.empty_like(present)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionEdges:
    """Every tensor inside one attention, H query heads and S = P + T positions."""

    q_rotated: Tensor
    """[B, H, T, D]"""
    k_rotated: Tensor
    """[B, KV, T, D]: the new keys, without those of the cache."""
    visible: Tensor
    """bool [T, S]: which keys a query sees; the others are masked."""
    scores: Tensor
    """[B, H, T, S], times ``scale``; -inf where masked. A range must leave those out: see ``visible``."""
    probabilities: Tensor
    """[B, H, T, S], each row of sum 1; exactly 0 where masked."""
    context: Tensor
    """[B, T, H*D]: what the op gives first."""
    present_k: Tensor
    """[B, KV, S, D]"""
    present_v: Tensor
    """[B, KV, S, D]"""


def attention_edges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    inv_freq: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    chunk: int = 0,
) -> AttentionEdges:
    """The op ``attention`` of the same arguments in plain tensor ops: its results, and all that lies between.

    Keys and values are not repeated: the query heads that share a key are rows of one matrix product. Holds two
    tensors [B, H, T, S] at least; to hold less, call it for one key head at a time.
    """
    length = q.shape[1]
    q, k, v = _split_heads(q, heads), _split_heads(k, kv_heads), _split_heads(v, kv_heads)
    q, k = _rotate(q, k, inv_freq, first=past_k.shape[2])
    present_k = torch.cat([past_k, k], dim=2)
    present_v = torch.cat([past_v, v], dim=2)
    visible = _visible(past_k.shape[2], length, window=window, chunk=chunk)
    stacked = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, H, T, D] -> [B, KV, H/KV*T, D]
    scores = (scale * stacked) @ present_k.mT  # [B, KV, H/KV*T, S]
    scores = scores.unflatten(2, (-1, length)).flatten(1, 2)  # [B, H, T, S]
    scores.masked_fill_(~visible, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    context = probabilities.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ present_v  # [B, KV, H/KV*T, D]
    return AttentionEdges(
        q_rotated=q,
        k_rotated=k,
        visible=visible,
        scores=scores,
        probabilities=probabilities,
        context=_merge_heads(context.unflatten(2, (-1, length)).flatten(1, 2)),
        present_k=present_k,
        present_v=present_v,
    )


def _split_heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(2, (count, -1)).transpose(1, 2)  # [B, T, H*D] -> [B, H, T, D]


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, H, T, D] -> [B, T, H*D]


def _rotate(q: Tensor, k: Tensor, inv_freq: Tensor | None, *, first: int) -> tuple[Tensor, Tensor]:
    if inv_freq is None:
        return q, k
    cos, sin = rope_table(inv_freq, first=first, count=q.shape[2])
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _visible(past_length: int, length: int, *, window: int, chunk: int) -> Tensor:
    """Which of all keys each of the last ``length`` positions sees: bool [T, P+T]."""
    queries = torch.arange(past_length, past_length + length).unsqueeze(1)  # [T, 1]
    keys = torch.arange(past_length + length)  # [P+T]
    visible = keys <= queries
    if window:
        visible &= keys > queries - window
    if chunk:
        visible &= keys // chunk == queries // chunk
    return visible
