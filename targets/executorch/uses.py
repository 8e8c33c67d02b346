"""The weights of a program by the order in which it reads them: for files that do not keep their names.

A program reads each weight where our graph does, and in the same order, whatever a backend made of the ops. So the
n-th matrix product of the file is the n-th of the graph. Two that changed places would be found out: codes and scales
that are not those of that name differ from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from exporter.errors import LoweringError
from exporter.model.graph import Weight
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor
from exporter.spec import Artifact, Precision
from exporter.store import StoredWeight
from targets.executorch.read import EMBEDDING_KERNELS, ProgramFile, quantized, read_table

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
        where = "one ends where the other goes on"
        if first is not None:
            where = f"number {first} is a {found_ops[first]}, wanted {wanted_ops[first]}"
        raise LoweringError(
            f"{artifact.path} has {len(found_ops)} ops with weights, the model {len(wanted_ops)}: {where}",
            hint="lower the model again",
        )
    for node, use in zip(nodes, found, strict=True):
        weight = next(argument for argument in node.arguments if isinstance(argument, Weight))
        yield weight.name, use.read(weight.name)


class KernelUses:
    """Finds the weights that ExecuTorch's own kernels read, call after call."""

    def __init__(self, file: ProgramFile, artifact: Artifact) -> None:
        self._file, self._artifact = file, artifact
        self._widened: dict[int, Any] = {}

    def of(self, call: Any) -> list[Use]:
        """None or one, for a kernel call of the program."""
        file, plan = self._file, self._file.forward
        name = plan.operators[call.op_index].name
        values = [plan.values[index].val for index in call.args]
        held = [file.is_constant(value) for value in values]
        if name == "dim_order_ops::_to_dim_order_copy" and held[0]:
            self._widened[call.args[-1]] = values[0]
        elif name in EMBEDDING_KERNELS and held[0] and values[0].sizes[0] == self._artifact.spec.num_embeddings:
            table = partial(read_table, file, values, bits=EMBEDDING_KERNELS[name])
            return [Use("embedding", lambda _name: table())]
        elif name == "aten::linear":
            weight = self._widened.get(call.args[1], values[1])
            return [Use("linear", lambda _name: file.constant(weight))]
        elif name == "quantized_decomposed::mixed_linear":
            return [Use("linear", partial(self._codes, *values[1:3]))]
        elif name == "aten::mul" and held[1] and values[1].sizes == [self._artifact.spec.hidden_size]:
            return [Use("rms_norm", lambda _name: file.constant(values[1]))]
        return []

    def _codes(self, codes: Any, scales: Any, name: str) -> QuantizedTensor:
        """Codes of int4 and int8 lie alike, so it is for the scheme to say which they are."""
        bits = self._artifact.scheme.precision(name).bits or Precision.INT8.bits
        assert bits is not None
        return quantized(name, self._file.constant(codes), self._file.constant(scales), bits=bits)
