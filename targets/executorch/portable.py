"""No backend: a program of ExecuTorch's own kernels, for any build of its runtime, and to compare others with.

Codes stay codes: ``targets.executorch.kernels`` says which kernel takes them. A call takes at most ``LONGEST`` tokens:
memory is laid out for the longest, and scores are [heads, tokens, context] there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from exporter.errors import LoweringError
from exporter.files import written_whole
from exporter.model.graph import Graph
from exporter.model.reference import Weights
from exporter.spec import Artifact, Logits
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
    from targets.executorch.read import ProgramFile
    from targets.executorch.uses import KernelUses, Use, named

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
    found = KernelUses(file, artifact)
    for call in (i.instr_args for chain in file.forward.chains for i in chain.instructions):
        if not isinstance(call, KernelCall):
            raise LoweringError(f"{artifact.path} calls a delegate, this is no portable program", hint="lower it again")
        yield from found.of(call)
