"""The one custom op of the graph. Its eager implementation is its definition; every target lowers it its own way."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.model.rope import rope_table, rotate


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

    ``q`` [1, T, heads*D], ``k`` and ``v`` [1, T, kv_heads*D], none of them rotated; ``past_k`` (rotated) and
    ``past_v`` [1, kv_heads, P, D], where P is the position of the first new token; ``inv_freq`` [D/2] float32 with any
    RoPE scaling folded in, None for no rotation. Gives the context [1, T, heads*D] and the caches grown to P + T.

    ``window`` > 0: a query sees the last ``window`` keys, itself among them. ``chunk`` > 0: it sees only keys of its
    own chunk of ``chunk`` positions. Query heads h share the keys of head ``h // (heads / kv_heads)`` (Ainslie et al.
    2023, arXiv:2305.13245).
    """
    length, past_length = q.shape[1], past_k.shape[2]
    q, k, v = (_split_heads(x, count) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if inv_freq is not None:
        cos, sin = rope_table(inv_freq, first=past_length, count=length)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    present_k = torch.cat([past_k, k], dim=2)  # [1, KV, P+T, D]
    present_v = torch.cat([past_v, v], dim=2)
    queries = torch.arange(past_length, past_length + length).unsqueeze(1)  # [T, 1]
    keys = torch.arange(past_length + length)  # [P+T]
    visible = keys <= queries
    if window:
        visible &= keys > queries - window
    if chunk:
        visible &= keys // chunk == queries // chunk
    repeats = heads // kv_heads
    context = torch.nn.functional.scaled_dot_product_attention(
        q,
        present_k.repeat_interleave(repeats, dim=1),
        present_v.repeat_interleave(repeats, dim=1),
        attn_mask=visible,
        scale=scale,
    )
    return context.transpose(1, 2).flatten(2), present_k, present_v


@attention.register_fake
def _(q, k, v, past_k, past_v, inv_freq, heads, kv_heads, scale, window=0, chunk=0):  # type: ignore[no-untyped-def]
    _, _, past_length, head_dim = past_k.shape
    present = past_k.new_empty(1, kv_heads, past_length + q.shape[1], head_dim)
    return torch.empty_like(q), present, torch.empty_like(present)


def _split_heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(2, (count, -1)).transpose(1, 2)  # [1, T, H*D] -> [1, H, T, D]
