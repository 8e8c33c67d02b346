"""The weights of a program by the order in which it reads them: for files that do not keep their names.

A program reads each weight where our graph does, and in the same order, whatever a backend made of the ops. So the
n-th matrix product of the file is the n-th of the graph. Two that changed places would be found out: codes and scales
that are not those of that name differ from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from exporter.errors import LoweringError
from exporter.model.graph import Weight
from exporter.model.trace import trace
from exporter.spec import Artifact
from exporter.store import StoredWeight

_WEIGHED = ("embedding", "linear", "rms_norm")
"""The ops of a graph that read a weight."""


@dataclass(frozen=True, slots=True)
class Use:
    """One op of a file that reads a weight."""

    op: str
    """What it is in our graph."""
    read: Callable[[str], StoredWeight]
    """The weight, which is to have that name."""


def named(artifact: Artifact, uses: Iterable[Use]) -> Iterator[tuple[str, StoredWeight]]:
    """Every weight of an artifact under its name. Raises LoweringError where the file reads others, or in another
    order, than the graph of the model."""
    nodes = [node for node in trace(artifact.spec).nodes if node.op in _WEIGHED]
    found = list(uses)
    wanted_ops, found_ops = [node.op for node in nodes], [use.op for use in found]
    if wanted_ops != found_ops:
        first = next((i for i, ops in enumerate(zip(wanted_ops, found_ops, strict=False)) if ops[0] != ops[1]), None)
        where = f"number {first} is a {found_ops[first]}, wanted {wanted_ops[first]}" if first is not None else "in order"
        raise LoweringError(
            f"{artifact.path} has {len(found_ops)} ops with weights, the model {len(wanted_ops)}: {where}",
            hint="lower the model again",
        )
    for node, use in zip(nodes, found, strict=True):
        weight = next(argument for argument in node.arguments if isinstance(argument, Weight))
        yield weight.name, use.read(weight.name)
