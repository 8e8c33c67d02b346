"""Activations quantized statically: uint16 codes whose steps come from the ranges that calibration saw.

A lowering writes the steps into its file and the reference rounds by them; both ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from exporter.errors import InputError
from exporter.model.graph import Graph, Value, Weight

HIGHEST_CODE = 2**16 - 1


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


def _step(ranges: Mapping[str, Mapping[str, Any]], edge: str) -> Step:
    if edge not in ranges:
        raise InputError(
            f"static activations need the range of every linear's input and output, but {edge} has none",
            hint="calibrate with a text: leave --calibration none out",
        )
    return Step.spanning(ranges[edge]["lowest"], ranges[edge]["highest"])
