"""How far the activations on each edge of a graph reach: what a backend needs that quantizes them statically.

The smallest and largest value are exact. Percentiles come from a histogram whose bins are the float32 numbers that
share their upper 16 bits: sign, exponent and seven bits of mantissa. Such bins are fixed, so that counting in any order
or in parts gives the same; and they are relative, so that one outlier a thousand times the rest, as Llamas have (Sun et
al. 2024, arXiv:2402.17762), does not blur the rest, as it does where equal bins span the whole range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import InputError
from exporter.model.graph import Constant, Node
from exporter.model.ops import AttentionEdges, attention_edges

CENTRAL = 0.9999
"""The share of values that lies between the two percentiles, half of the rest on either side."""

_BINS = 1 << 16
"""512 KiB of counts for each edge."""
_HALF = _BINS // 2
_BLOCK = 1 << 18
"""Values counted at once: they and their bins stay in the second-level cache."""
_QUERIES = 256
"""Tokens whose attention is decomposed at once: bounds the scores held, and leaves out most masked ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What was seen on one edge. The bounds of the percentiles hold for all but subnormal float32 numbers."""

    lowest: float
    highest: float
    low_percentile: float
    """At most the exact percentile, and below it by less than 2**-7 of its magnitude; never below ``lowest``."""
    high_percentile: float
    """At least the exact percentile, and above it by less than 2**-7 of its magnitude; never above ``highest``."""
    count: int
    """Values seen."""

    def __post_init__(self) -> None:
        if not self.lowest <= self.low_percentile <= self.high_percentile <= self.highest or self.count < 1:
            raise ValueError(f"{self} is not a range: its four ends must ascend and its count be positive")


class RangeObserver:
    """Collects the range of every edge it is shown; ``on_node`` is what ``Graph.run`` takes as ``observe``.

    The percentiles leave out a share of (1 - ``central``) / 2 of the values at either end: of n sorted values they are
    those of rank floor((1 - central) / 2 * (n - 1)), counted from below and from above.
    """

    def __init__(self, *, central: float = CENTRAL) -> None:
        if not 0 < central <= 1:
            raise ValueError(f"central is {central}, a share above 0 and up to 1 was expected")
        self._central = central
        self._histograms: dict[str, _Histogram] = {}
        self._caches: dict[str, Tensor] = {}

    def observe(self, name: str, x: Tensor) -> None:
        """Count every value of ``x`` (floats of any shape) for the edge ``name``.

        Raises InputError for a value that is not finite.
        """
        self._count(name, x.detach().float().flatten().contiguous().numpy())

    def on_node(self, node: Node, arguments: Sequence[Any], results: tuple[Any, ...]) -> None:
        """Observe the first result of ``node`` under its name, and the edges inside an attention as ``name.edge``.

        Those are q_rotated, k_rotated, and scores and probabilities where not masked. The context is the node's own
        first result; the caches that it grows hold nothing but k_rotated and the values, which are a node themselves.
        """
        self.observe(node.name, results[0])
        if node.op == "attention":
            self._observe_caches(node.name, *results[1:])
            for edges in _edges_in_parts(*arguments):
                self._observe_edges(node.name, edges)

    def merge(self, other: RangeObserver) -> None:
        """Add all that ``other`` has seen, as if it had been observed here."""
        for name, histogram in other._histograms.items():
            self._histograms.setdefault(name, _Histogram()).merge(histogram)
        for name, largest in other._caches.items():
            self._enlarge(name, largest)

    def ranges(self) -> dict[str, Range]:
        """By the name of the edge, in the order in which edges were first seen."""
        return {name: histogram.range(self._central) for name, histogram in self._histograms.items()}

    def caches(self) -> dict[str, list[list[float]]]:
        """``[KV, D]``: the largest magnitude of each channel that an attention has cached, by its name with ``.keys``
        or ``.values`` behind it. Of keys both channels of a rotated pair have the length of the pair, which no position
        changes: a text of any length is bounded by what a shorter one has shown."""
        return {name: largest.tolist() for name, largest in self._caches.items()}

    def _observe_caches(self, name: str, keys: Tensor, values: Tensor) -> None:
        """``[B, KV, P + T, D]`` each."""
        first, second = keys.float().chunk(2, dim=-1)  # exporter.model.rope pairs the halves
        pairs = torch.hypot(first, second)
        self._enlarge(f"{name}.keys", torch.cat([pairs, pairs], dim=-1).amax(dim=(0, 2)))
        self._enlarge(f"{name}.values", values.float().abs().amax(dim=(0, 2)))

    def _enlarge(self, name: str, largest: Tensor) -> None:
        self._caches[name] = torch.maximum(self._caches[name], largest) if name in self._caches else largest

    def _observe_edges(self, name: str, edges: AttentionEdges) -> None:
        self.observe(f"{name}.q_rotated", edges.q_rotated)
        self.observe(f"{name}.k_rotated", edges.k_rotated)
        visible = edges.visible.numpy()
        for inner, x in (("scores", edges.scores), ("probabilities", edges.probabilities)):
            for head in x.detach().float().flatten(0, 1).numpy():
                self._count(f"{name}.{inner}", head[visible])

    def _count(self, name: str, values: NDArray[np.float32]) -> None:
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK]
            lowest, highest = float(block.min()), float(block.max())
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                raise InputError(
                    f"{name} reaches from {lowest} to {highest} on the calibration text, finite values were expected",
                    hint="check the checkpoint: it may have been cut off, or have diverged in training",
                )
            self._histograms.setdefault(name, _Histogram()).count(block, lowest, highest)


def ranges_to_json(ranges: Mapping[str, Range]) -> dict[str, dict[str, float | int]]:
    return {name: asdict(found) for name, found in ranges.items()}


def ranges_from_json(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Range]:
    return {name: Range(**fields) for name, fields in written.items()}


class _Histogram:
    def __init__(self) -> None:
        self._lowest, self._highest = math.inf, -math.inf
        self._counts = np.zeros(_BINS, dtype=np.int64)
        """By the upper 16 bits of a value: from 0.0 up, then from -0.0 down."""

    def count(self, values: NDArray[np.float32], lowest: float, highest: float) -> None:
        """``values`` reach from ``lowest`` to ``highest``."""
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        # Not torch.bincount: its helpers wake a team of threads at each call, which stalls where cores are shared.
        self._counts += np.bincount(values.view("<u2")[1::2], minlength=_BINS)

    def merge(self, other: _Histogram) -> None:
        self._lowest, self._highest = min(self._lowest, other._lowest), max(self._highest, other._highest)
        self._counts += other._counts

    def range(self, central: float) -> Range:
        ascending = np.concatenate([self._counts[_HALF:][::-1], self._counts[:_HALF]])
        up_to = ascending.cumsum()
        count = int(up_to[-1])
        rank = math.floor((1 - central) / 2 * (count - 1))
        low, high = (int(np.searchsorted(up_to, r, side="right")) for r in (rank, count - 1 - rank))
        return Range(
            lowest=self._lowest,
            highest=self._highest,
            low_percentile=max(self._lowest, _ends(low)[0]),
            high_percentile=min(self._highest, _ends(high)[1]),
            count=count,
        )


def _ends(index: int) -> tuple[float, float]:
    """Smallest and largest float32 of a bin, counted in ascending order of values."""
    upper = index - _HALF if index >= _HALF else _HALF - 1 - index  # without the sign
    near, far = np.array([upper << 16, upper << 16 | 0xFFFF], dtype=np.int32).view(np.float32).tolist()
    return (near, far) if index >= _HALF else (-far, -near)


def _edges_in_parts(
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
) -> Iterator[AttentionEdges]:
    """The edges of an attention node, for one key head and a few tokens at a time that find the earlier ones cached."""
    frequencies = inv_freq.value if inv_freq else None
    flat = (x.chunk(kv_heads, dim=2) for x in (q, k, v))
    caches = (past.split(1, dim=1) for past in (past_k, past_v))
    for *head, head_past_k, head_past_v in zip(*flat, *caches, strict=True):
        grown_k, grown_v = head_past_k, head_past_v
        for new_q, new_k, new_v in zip(*(x.split(_QUERIES, dim=1) for x in head), strict=True):
            edges = attention_edges(
                *(new_q, new_k, new_v, grown_k, grown_v, frequencies),
                *(heads // kv_heads, 1, scale, window, chunk),
            )
            grown_k, grown_v = edges.present_k, edges.present_v
            yield edges
