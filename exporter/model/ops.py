"""The custom ops of the graph. The eager implementation of each is its definition; every target lowers them its own
way.

``attention_edges`` is the one decomposition of attention into plain tensor ops, for whoever needs what lies inside.
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
    weighed: Callable[[Tensor], Tensor] | None = None,
    table: Callable[..., tuple[Tensor, Tensor]] = rope_table,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op computes, of the same arguments. ``rounded``, where given, is what becomes of rotated queries, of
    rotated new keys and of new values ``[B, heads, T, D]`` before anything is done with them: a cache of few bits.
    ``weighed``: what becomes of the probabilities ``[B, heads, T, P+T]`` before values are summed by them.
    ``table`` is called as ``rope_table``."""
    q, k, v = _split_heads(q, heads), _split_heads(k, kv_heads), _split_heads(v, kv_heads)
    q, k = _rotate(q, k, inv_freq, first=past_k.shape[2], table=table)
    if rounded:
        q, k, v = rounded(q, k, v)
    present_k = torch.cat([past_k, k], dim=2)  # [B, KV, P+T, D]
    present_v = torch.cat([past_v, v], dim=2)
    repeats = heads // kv_heads
    keys, values = (present.repeat_interleave(repeats, dim=1) for present in (present_k, present_v))
    visible = _visible(past_k.shape[2], q.shape[2], window=window, chunk=chunk)
    if weighed:
        scores = (scale * (q @ keys.mT)).masked_fill_(~visible, -torch.inf)
        context = weighed(scores.softmax(dim=-1)) @ values
    else:
        context = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale)
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


def _rotate(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None,
    *,
    first: int,
    table: Callable[..., tuple[Tensor, Tensor]] = rope_table,
) -> tuple[Tensor, Tensor]:
    if inv_freq is None:
        return q, k
    cos, sin = table(inv_freq, first=first, count=q.shape[2])
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


@torch.library.custom_op("llama_export::head_norm", mutates_args=())
def head_norm(x: Tensor, head_dim: int, eps: float, weight: Tensor | None = None) -> Tensor:
    """``x`` [B, T, heads*D], each head of each token divided by its root mean square, and times ``weight`` [D] where
    there is one."""
    heads = x.unflatten(2, (-1, head_dim))
    normed = heads * (heads.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * weight).flatten(2)


@head_norm.register_fake
def _(x, head_dim, eps, weight=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("llama_export::temper", mutates_args=())
def temper(q: Tensor, past_k: Tensor, floor_scale: int, attn_scale: float) -> Tensor:
    """``q`` [B, T, heads*D] times ``temperatures`` of positions P, P + 1, ..., for ``past_k`` [B, kv_heads, P, D]."""
    first = past_k.shape[2]
    return q * temperatures(first=first, count=q.shape[1], floor_scale=floor_scale, attn_scale=attn_scale).unsqueeze(1)


@temper.register_fake
def _(q, past_k, floor_scale, attn_scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


def temperatures(*, first: int, count: int, floor_scale: int, attn_scale: float) -> Tensor:
    """What queries at positions ``first .. first + count`` are multiplied by: float32 ``[count]``, all exactly 1 below
    ``floor_scale - 1`` (``exporter.spec.AttentionSpec``)."""
    positions = torch.arange(first, first + count, dtype=torch.float32)
    return torch.log1p(torch.floor((positions + 1.0) / floor_scale)) * attn_scale + 1.0


@torch.library.custom_op("llama_export::route", mutates_args=())
def route(logits: Tensor, count: int) -> Tensor:
    """Scores [B, T, E] of the experts: the sigmoid of the ``count`` largest logits of each token, 0 for the others."""
    largest, chosen = logits.topk(count, dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen, largest.sigmoid())


@route.register_fake
def _(logits, count):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


def gate(x: Tensor, scores: Tensor, expert: int) -> Tensor:
    """``x`` [B, T, H] times the score [B, T, E] of one expert: what it reads, all zeros for a token that it is not
    for."""
    return x * scores[..., expert : expert + 1]


FLOOR = -4096.0
"""The logit of a token that the head has no row for. Its probability is exactly 0 in float32 wherever the best logit is
above -3990, and in float64 above -3350, at any temperature up to 30 or so; and yet it is a number, where -inf would
make 0 * inf of a KL divergence: a power of two, which float16 and bfloat16 hold exactly, with room left to be divided
by a temperature of 1/15 in float16."""


@torch.library.custom_op("llama_export::spread", mutates_args=())
def spread(logits: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """``logits`` [..., n] of the tokens int64 [n] at their places among all of the vocabulary [..., V]; ``FLOOR`` at
    those of others."""
    return torch.nn.functional.pad(logits, (0, 1), value=FLOOR)[..., places(tokens, vocab_size)]


@spread.register_fake
def _(logits, tokens, vocab_size):  # type: ignore[no-untyped-def]
    return logits.new_empty(*logits.shape[:-1], vocab_size)


def places(tokens: Tensor, vocab_size: int) -> Tensor:
    """Where the logit of each token of the vocabulary lies among those of ``tokens`` int64 [n] and, behind them, one
    for all others: int64 [V]."""
    found = torch.full((vocab_size,), len(tokens))
    found[tokens] = torch.arange(len(tokens))
    return found


@torch.library.custom_op("llama_export::experts", mutates_args=())
def experts(x: Tensor, scores: Tensor, shared: Tensor) -> Tensor:
    """``shared`` [B, T, H] and the sum of what every expert makes of ``gate(x, scores, expert)``. Only ever traced:
    a graph has the nodes of each expert in its place (``exporter.model.trace``)."""
    raise NotImplementedError("a graph has its experts as nodes")


@experts.register_fake
def _(x, scores, shared):  # type: ignore[no-untyped-def]
    return torch.empty_like(shared)
