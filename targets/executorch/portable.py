"""No backend: a program of ExecuTorch's own kernels, for any build of its runtime, and to compare others with.

Codes stay codes: ``targets.executorch.kernels`` says which kernel takes them. A call takes at most ``LONGEST`` tokens:
memory is laid out for the longest, and scores are [heads, tokens, context] there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter.errors import LoweringError
from exporter.files import written_whole
from exporter.model.graph import Graph
from exporter.model.reference import Weights
from exporter.quantized import QuantizedTensor
from exporter.spec import Artifact, Logits, Precision
from exporter.store import StoredWeight
from targets.executorch import border
from targets.executorch.metadata import describe

with border.toolchain("be imported"):
    import executorch.exir.passes._quant_patterns_and_replacements
    import executorch.kernels.quantized  # noqa: F401  (both declare quantized_decomposed)
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.schema import KernelCall

    from targets.executorch.kernels import linear_module, register_shapes
    from targets.executorch.outer import embedding_module
    from targets.executorch.plain import Decoder, DynamicAttention, Form
    from targets.executorch.read import EMBEDDING_KERNELS, ProgramFile, quantized, read_table
    from targets.executorch.uses import Use, named

LONGEST = 128

_EXAMPLE_LENGTH = 3
"""Tokens in the example that is traced: neither 0 nor 1, which would become constants."""


def longest(context: int) -> int:
    """Tokens that a call of the program takes at most."""
    return min(context, LONGEST)


def write_program(graph: Graph, weights: Weights, path: Path, *, context: int, logits: Logits) -> None:
    """Lower ``graph`` and write ``path``, whole or not at all. Raises LoweringError."""
    bound = longest(context)
    form = Form(embedding=embedding_module, linear=linear_module, attention=DynamicAttention)
    with border.toolchain("lower the graph"):
        register_shapes()
        decoder = Decoder(graph, weights, form=form, context=context, logits=logits)
        examples = torch.zeros(1, _EXAMPLE_LENGTH, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        length = {1: torch.export.Dim("length", max=bound)}
        exported = torch.export.export(decoder, examples, dynamic_shapes=(length, None), strict=False)
        # aten::linear takes a matrix as it lies; decomposed, it is preceded by a transposed copy at every call.
        kept = EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[torch.ops.aten.linear.default])
        described = describe(graph.spec, context=context, longest=bound)
        edge = to_edge(exported, constant_methods=described, compile_config=kept)
        # Without that pass each new key is followed by a copy of the whole cache.
        program = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    with written_whole(path) as temporary, border.toolchain("write the program"), temporary.open("wb") as file:
        program.write_to_file(file)


def read_weights(artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
    """Every weight in the file under its stored name; of a tied one both uses, which share their bytes.

    Raises LoweringError for a file that is no whole program, or does not read the weights of that model.
    """
    with ProgramFile(artifact.path) as file:
        yield from named(artifact, _uses(file, artifact))


def _uses(file: ProgramFile, artifact: Artifact) -> Iterator[Use]:
    plan = file.forward
    widened: dict[int, Any] = {}
    for call in (i.instr_args for chain in plan.chains for i in chain.instructions):
        if not isinstance(call, KernelCall):
            raise LoweringError(f"{artifact.path} calls a delegate, this is no portable program", hint="lower it again")
        name = plan.operators[call.op_index].name
        values = [plan.values[index].val for index in call.args]
        held = [file.is_constant(value) for value in values]
        if name == "dim_order_ops::_to_dim_order_copy" and held[0]:
            widened[call.args[-1]] = values[0]
        elif name in EMBEDDING_KERNELS:
            table = partial(read_table, file, values, bits=EMBEDDING_KERNELS[name])
            yield Use("embedding", lambda _name, table=table: table())
        elif name == "aten::linear":
            weight = widened.get(call.args[1], values[1])
            yield Use("linear", lambda _name, weight=weight: file.constant(weight))
        elif name == "quantized_decomposed::mixed_linear":
            yield Use("linear", partial(_matrix, file, artifact, *values[1:3]))
        elif name == "aten::mul" and held[1] and len(values[1].sizes) == 1:
            yield Use("rms_norm", lambda _name, weight=values[1]: file.constant(weight))


def _matrix(file: ProgramFile, artifact: Artifact, codes: Any, scales: Any, name: str) -> QuantizedTensor:
    """Codes of int4 and int8 lie alike, so it is for the scheme to say which they are."""
    bits = artifact.scheme.precision(name).bits or Precision.INT8.bits
    assert bits is not None
    return quantized(name, file.constant(codes), file.constant(scales), bits=bits)
