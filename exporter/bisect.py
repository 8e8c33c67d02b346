"""Where an artifact parts from its reference: each op computed anew from the values that the artifact itself gave it.

So a fault shows in the op that has it, and not in all that follow; and rounding does not add up from op to op.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.reference import Reference, Weights
from exporter.spec import Activations, Arithmetic
from targets.base import Observation

PARTS_AT = 1e-5
"""Largest difference over the reference's largest value, for sums over no more than ``SHORT_SUM`` numbers. Float32 sums
in another order differ by up to 1.1e-6 of it in the sample, over 768 columns, on ExecuTorch and Core ML at every
precision. Rounded activations ask for no more: both sides round the very same numbers, and to the same codes."""

SHORT_SUM = 768

_SHOWN = 3


def parts_at(node: Node) -> float:
    """The bound for one op: it grows with the length K of the sums in it.

    Roundings of a linear's terms, of either sign, cancel: sqrt(K) (Higham and Mary 2019, "A new approach to
    probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5)). A norm adds up squares, whose roundings need
    not: K, as in the worst case. Measured on XNNPACK with random weights: linears of int4 in groups of 32 7.8e-6 over
    8,192 columns, 1.3e-5 over 14,336; norms of an int8 embedding 2.2e-6 over 2,048, 8.5e-6 over 4,096.
    """
    columns = next((argument.shape[-1] for argument in node.arguments if isinstance(argument, Weight)), 1)
    growth = max(1.0, columns / SHORT_SUM)
    return PARTS_AT * (growth if node.op == "rms_norm" else math.sqrt(growth))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """One op that does not give what the reference gives for the same inputs."""

    node: Node
    difference: float
    """Largest one, over the reference's largest value; infinite where the artifact has no such value."""
    call: str

    def __str__(self) -> str:
        place = "outside the layers" if self.node.layer is None else f"layer {self.node.layer}"
        weights = [argument.name for argument in self.node.arguments if isinstance(argument, Weight)]
        what = f"{self.node.op} {weights[0] if weights else self.node.name}"
        missing = self.difference == float("inf")
        found = "has no counterpart in the file" if missing else f"is off by {self.difference:.1e}"
        return f"{place}, {what} {found} ({self.call})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What a look at every op has found."""

    partings: Sequence[Parting]
    """In the order of the graph; none where artifact and reference are the same."""
    ops: int
    arithmetic: Arithmetic
    """In which they were compared."""

    def __str__(self) -> str:
        """In a sentence: the first of them, and how many more."""
        if not self.partings:
            rounded = "unrounded" if self.arithmetic.activations is Activations.FLOAT else "rounded as its runtime does"
            same = f"each of {self.ops} gives what the reference gives for the same inputs"
            return f"no op does: {same}, activations {rounded}"
        shown = "; ".join(str(parting) for parting in self.partings[:_SHOWN])
        more = f"; and {len(self.partings) - _SHOWN} more" if len(self.partings) > _SHOWN else ""
        return f"{shown}{more}"


def compare_ops(
    observation: Observation, graph: Graph, weights: Weights, *, calls: Mapping[str, Sequence[int]]
) -> Bisection:
    """Look at each op of ``graph``; ``calls`` are those observed, the token ids of each by a name."""
    partings = find_partings(observation, graph, weights, calls=calls)
    return Bisection(partings=partings, ops=len(graph.nodes), arithmetic=observation.arithmetic)


def find_partings(
    observation: Observation, graph: Graph, weights: Weights, *, calls: Mapping[str, Sequence[int]]
) -> list[Parting]:
    """Every op that parts, in the order of the graph; ``calls`` are those observed, the token ids of each by a name."""
    reference = Reference(graph, weights, observation.arithmetic)
    spec = graph.spec
    caches = {
        name: torch.zeros(1, spec.num_key_value_heads, 0, spec.head_dim)
        for name in graph.inputs
        if name.startswith("past_")
    }
    partings: dict[str, Parting] = {}
    for (call, ids), seen in zip(calls.items(), observation.calls, strict=False):  # some may not have been possible
        values: dict[Value, Tensor] = {Value("ids"): torch.tensor([list(ids)])}
        values |= {Value(name): cache for name, cache in caches.items()}
        for node in graph.nodes:
            difference = _compute(node, reference, values, seen)
            if not difference <= parts_at(node) and node.name not in partings:
                partings[node.name] = Parting(node=node, difference=difference, call=call)
        caches = {
            name.replace("present_", "past_"): values[value]
            for name, value in graph.outputs.items()
            if name.startswith("present_")
        }
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return sorted(partings.values(), key=lambda parting: order[parting.node.name])


def _compute(node: Node, reference: Reference, values: dict[Value, Tensor], seen: Mapping[Value, Tensor]) -> float:
    """Run one op on ``values``, add the artifact's own results to them, and give how far those are from it."""
    results = reference.compute(node, values)
    worst = 0.0
    for index, expected in enumerate(results):
        value = Value(node.name, index)
        got = seen.get(value)
        if got is None:
            values[value] = expected
            worst = float("inf")
            continue
        if got.shape != expected.shape and got.shape[1] == 1:  # the head, of the last token alone
            expected = expected[:, -1:]  # noqa: PLW2901
        if got.shape != expected.shape:
            values[value] = expected
            worst = float("inf")
            continue
        values[value] = got
        distance = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        worst = distance if not distance <= worst else worst
    return worst
