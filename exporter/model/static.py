"""Activations quantized statically: codes whose steps come from the ranges that calibration saw. Linears have uint16,
caches int8.

A lowering writes the steps into its file and the reference rounds by them; both ask here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.model.graph import Constant, Graph, Node, Value, Weight

HIGHEST_CODE = 2**16 - 1
HIGHEST_CACHE_CODE = 127
_SMALLEST_CACHED = 2.0**-20
"""What the largest magnitude of a channel counts as at least: one that was silent has a scale too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """uint16 codes that stand for ``scale * (code - zero)``."""

    scale: float
    """Exact in float16, so that a graph of either float type holds the same."""
    zero: int

    @classmethod
    def spanning(cls, lowest: float, highest: float) -> Step:
        """The finest that reaches from ``lowest`` to ``highest``, and to 0, which has a code of its own."""
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
        scale = np.float16((highest - lowest) / HIGHEST_CODE)
        while float(scale) * HIGHEST_CODE < highest - lowest or scale == 0.0:
            scale = np.nextafter(scale, np.float16(np.inf))
        return cls(scale=float(scale), zero=min(round(-lowest / float(scale)), HIGHEST_CODE))

    def round(self, x: Tensor) -> Tensor:
        """``x`` float32 of any shape as its codes say, by the definition of ONNX's QuantizeLinear: divided, rounded
        half to even, clipped."""
        codes = ((x / self.scale).round() + self.zero).clamp(0, HIGHEST_CODE)
        return (codes - self.zero) * self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSteps:
    """How one linear is quantized on both sides."""

    before: Step
    after: Step


def linear_steps(graph: Graph, ranges: Mapping[str, Mapping[str, Any]]) -> dict[str, LinearSteps]:
    """Of every linear of ``graph``, by the name of its weight; ``ranges`` as ``WeightStore.read_ranges`` gives them.

    Raises InputError where an edge has none.
    """
    steps: dict[str, LinearSteps] = {}
    for node in graph.nodes:
        if node.op == "linear":
            source, weight = node.arguments
            assert isinstance(source, Value)  # VOCABULARY: linear is x, weight
            assert isinstance(weight, Weight)
            steps[weight.name] = LinearSteps(before=_step(ranges, source.node), after=_step(ranges, node.name))
    return steps


def with_static_caches(graph: Graph, caches: Mapping[str, Sequence[Sequence[float]]]) -> Graph:
    """``graph``, each attention with two more arguments behind the others: the scales of its keys and of its values,
    float32 ``[KV, D]``. ``caches`` as ``WeightStore.read_cache_ranges`` gives them. Raises InputError where one is
    missing."""

    def scales(node: Node, kind: str) -> Constant:
        name = f"{node.name}.{kind}"
        if name not in caches:
            raise InputError(
                f"a static cache needs the range of every key and value, but {name} has none",
                hint="calibrate with a text: leave --calibration none out",
            )
        largest = torch.tensor(caches[name]).clamp(min=_SMALLEST_CACHED)
        return Constant(f"{name}.scales", largest / HIGHEST_CACHE_CODE)

    nodes = (
        replace(node, arguments=(*node.arguments, scales(node, "keys"), scales(node, "values")))
        if node.op == "attention"
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


def round_cached(x: Tensor, scales: Tensor) -> Tensor:
    """Keys or values float32 ``[B, KV, T, D]`` as a static cache holds them (ONNX Runtime's GroupQueryAttention with
    ``PER_CHANNEL``): divided, rounded half to even, clipped to int8."""
    by_channel = scales.unsqueeze(1)
    return (x / by_channel).round().clamp(-HIGHEST_CACHE_CODE - 1, HIGHEST_CACHE_CODE) * by_channel


def _step(ranges: Mapping[str, Mapping[str, Any]], edge: str) -> Step:
    if edge not in ranges:
        raise InputError(
            f"static activations need the range of every linear's input and output, but {edge} has none",
            hint="calibrate with a text: leave --calibration none out",
        )
    return Step.spanning(ranges[edge]["lowest"], ranges[edge]["highest"])
