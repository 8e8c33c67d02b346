"""Calibration text that the model writes itself, for when no corpus is named.

From many different starts and at temperature 1; after the data-free distillation of LLM-QAT (Liu et al. 2023,
arXiv:2305.17888), which found that sampling beats always taking the likeliest token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.errors import InputError, UsageError
from exporter.model.eager import eager_table
from exporter.model.graph import Constant, Graph, Table, Weight, cache_names
from exporter.model.ops import temperatures
from exporter.model.rope import rope_table, rotate
from exporter.spec import EMBEDDING


class Weights(Protocol):
    """Whatever answers for the tensors of a model by name, in the dtype in which they are stored."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@torch.no_grad()
def write_windows(
    graph: Graph,
    weights: Weights,
    *,
    windows: int,
    length: int,
    seed: int,
    excluded: Collection[int],
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """int64 ``[windows, length]``, no two rows the same: the begin token if there is one, a start, what follows.

    Every row has a start token of its own: no begin or end token and none of ``excluded`` (the special tokens). A row
    that comes to an end goes on with the begin token and another start. ``on_step(done, total)`` is called after each
    token. The same seed gives the same text on the same machine. Raises UsageError for more windows than start tokens,
    InputError for weights that give no distribution.
    """
    spec = graph.spec
    special = {*excluded, *spec.eos_token_ids, spec.bos_token_id}
    allowed = [token for token in range(spec.vocab_size) if token not in special]
    if windows > len(allowed):
        raise UsageError(
            f"--windows {windows} is more than the {len(allowed)} tokens that a text of this model can start with",
            hint=f"take --windows {len(allowed)} or less, or name a corpus",
        )
    generator = torch.Generator().manual_seed(seed)
    starts = _shuffled_for_ever(allowed, generator)
    head = [] if spec.bos_token_id is None else [spec.bos_token_id]
    forced = [[*head, next(starts)] for _ in range(windows)]  # what each row says next, before it is asked

    table = _table(weights)
    caches = _empty_caches(graph, windows=windows, length=length, dtype=weights[EMBEDDING].dtype)
    written = torch.empty(windows, length, dtype=torch.int64)
    sampled = [0] * windows
    for step in range(length):
        column = [queue.pop(0) if queue else token for queue, token in zip(forced, sampled, strict=True)]
        for queue, token in zip(forced, column, strict=True):
            if token in spec.eos_token_ids:
                queue += [*head, next(starts)]
        written[:, step] = torch.tensor(column)
        outputs = graph.run(table, {"ids": written[:, step : step + 1], **caches})
        sampled = _sample(outputs.pop("logits")[:, -1], generator)
        caches = {name.replace("present_", "past_"): value for name, value in outputs.items()}
        if on_step:
            on_step(step + 1, length)
    return written


def _shuffled_for_ever(tokens: list[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from (tokens[index] for index in torch.randperm(len(tokens), generator=generator).tolist())


def _sample(logits: Tensor, generator: torch.Generator) -> list[int]:
    """One token for each row of ``[W, V]``, by where a random number falls among the summed probabilities: a fourth of
    the time that ``torch.multinomial`` takes for a vocabulary of 128,256."""
    summed = logits.softmax(dim=-1).cumsum(dim=-1)  # [W, V]
    total = summed[:, -1:]
    if not torch.isfinite(total).all():
        raise InputError(
            "the model's logits are not finite, so that it cannot write a text to calibrate with",
            hint="check the checkpoint: it may have been cut off, or have diverged in training",
        )
    points = torch.rand(len(summed), 1, generator=generator) * total
    tokens = torch.searchsorted(summed, points, right=True).clamp_(max=summed.shape[1] - 1)
    return tokens.squeeze(1).tolist()


@dataclass(frozen=True, slots=True)
class _Cache:
    """Keys or values of all rows, written in place: to grow a tensor each time would be quadratic in its length."""

    values: Tensor
    """``[W, KV, T, D]``, of which the first ``filled`` positions are written"""
    filled: int

    def append(self, x: Tensor) -> _Cache:
        """``x`` ``[W, KV, 1, D]``"""
        self.values[:, :, self.filled : self.filled + 1] = x
        return _Cache(self.values, self.filled + 1)


def _empty_caches(graph: Graph, *, windows: int, length: int, dtype: torch.dtype) -> dict[str, _Cache]:
    spec = graph.spec
    shape = (windows, spec.num_key_value_heads, length, spec.head_dim)
    names = [f"past_{name}" for pair in cache_names(spec.num_hidden_layers) for name in pair]
    return {name: _Cache(torch.empty(shape, dtype=dtype), 0) for name in names}


def _table(weights: Weights) -> Table:
    """The ops of the graph on one token of each row, ``[W, 1, ...]``.

    Matrix products and attention compute in the dtype of the stored weights, so that of a mapped checkpoint no copy is
    made; the rest in float32.
    """

    def linear(x: Tensor, weight: Weight) -> Tensor:
        stored = weights[weight.name]
        return F.linear(x.to(stored.dtype), stored).float()

    table = eager_table(lambda weight: weights[weight.name].float(), linear=linear)  # of norms: the rest is below
    embedding = {"embedding": lambda ids, weight: F.embedding(ids, weights[weight.name]).float()}
    return {**table, **embedding, "attention": _attention, "temper": _temper}


def _temper(q: Tensor, past_k: _Cache, floor_scale: int, attn_scale: float) -> Tensor:
    return q * temperatures(first=past_k.filled, count=1, floor_scale=floor_scale, attn_scale=attn_scale)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: _Cache,
    past_v: _Cache,
    inv_freq: Constant | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    chunk: int,
) -> tuple[Tensor, _Cache, _Cache]:
    """``exporter.model.ops.attention`` for one token of each row: what it sees is a slice of the cache, and the query
    heads that share a key head lie side by side as if they were positions, so that no key is repeated."""
    position = past_k.filled
    q, k, v = (x.unflatten(2, (count, -1)).transpose(1, 2) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if inv_freq:
        cos, sin = rope_table(inv_freq.value, first=position, count=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = past_k.append(k), past_v.append(v)
    first = max(0, position + 1 - window if window else 0, position // chunk * chunk if chunk else 0)
    context = F.scaled_dot_product_attention(
        q.to(keys.values.dtype).squeeze(2).unflatten(1, (kv_heads, -1)),  # [W, H, 1, D] -> [W, KV, H/KV, D]
        keys.values[:, :, first : keys.filled],
        values.values[:, :, first : values.filled],
        scale=scale,
    )
    return context.flatten(1).unsqueeze(1).float(), keys, values
