"""The table that computes a graph in eager PyTorch: what the reference, calibration and self-written text share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.model import image_ops
from exporter.model.graph import EXPERT, Constant, Table, Weight
from exporter.model.ops import attention, gate, head_norm, route, spread, temper


def eager_table(
    values: Callable[[Weight], Tensor], *, linear: Callable[[Tensor, Weight], Tensor] | None = None
) -> Table:
    """Each op of the vocabulary on tensors of any batch size; ``values`` gives a weight as floats.

    ``linear``, where given, takes the place of ``x @ values(weight).T``.
    """
    return {
        "embedding": lambda ids, weight: F.embedding(ids, values(weight)),
        "linear": linear or (lambda x, weight: F.linear(x, values(weight))),
        "rms_norm": lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], values(weight), eps),
        "silu": F.silu,
        "mul": torch.mul,
        "add": torch.add,
        "attention": _attention,
        "head_norm": lambda x, head_dim, eps, weight=None: head_norm(x, head_dim, eps, weight and values(weight)),
        "temper": temper,
        "route": route,
        "gate": gate,
        "spread": lambda logits, tokens, count: spread(logits, tokens.value, count),
        EXPERT: chosen_tokens,
        **_image_table(values),
    }


def _image_table(values: Callable[[Weight], Tensor]) -> Table:
    return {
        "cross_attention": image_ops.cross_attention,
        "where_seen": image_ops.where_seen,
        "tanh_gate": lambda x, gate: image_ops.tanh_gate(x, values(gate)),
        "patches": image_ops.patches,
        "prepend": lambda x, state: image_ops.prepend(x, values(state)),
        "append": lambda x, state: image_ops.append(x, values(state)),
        "add_position": lambda x, table, gate=None: image_ops.add_position(x, values(table), gate and values(gate)),
        "add_tile_position": lambda x, ratio, table, gate: image_ops.add_tile_position(
            x, ratio, values(table), values(gate)
        ),
        "pad_states": image_ops.pad_states,
        "tile_attention": image_ops.tile_attention,
        "layer_norm": lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], values(weight), values(bias), eps),
        "bias": lambda x, bias: x + values(bias),
        "gelu": F.gelu,
        "concat": lambda *parts: torch.cat(parts, dim=-1),
        "as_heads": image_ops.as_heads,
        "patch_attention": lambda q, k, v, angles, heads: image_ops.patch_attention(q, k, v, angles.value, heads),
        "pixel_shuffle": image_ops.pixel_shuffle,
        "fuse": image_ops.fuse,
    }


def chosen_tokens(x: Tensor, scores: Tensor, total: Tensor, expert: int, inside: Callable[..., Tensor]) -> Tensor:
    """One expert on those tokens alone that it is for: ``total`` [B, T, H] with what it gives them added. For the
    others it would add exactly 0 (``exporter.model.graph.EXPERT``)."""
    chosen = scores[..., expert] != 0  # [B, T]
    if not chosen.any():
        return total
    result = total.clone()
    (result[chosen],) = inside(x[chosen][None], scores[chosen][None], total[chosen][None])
    return result


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    inv_freq: Constant | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    frequencies = inv_freq.value if inv_freq else None
    return attention(q, k, v, past_k, past_v, frequencies, heads, kv_heads, scale, window, chunk)
