"""The table that computes a graph in eager PyTorch: what the reference, calibration and self-written text share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.model.graph import Constant, Table, Weight
from exporter.model.ops import attention


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
    }


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
