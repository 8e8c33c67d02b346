"""The traced graph to an ExecuTorch program: a table over the graph's ops.

Linears, norms and what is between them go into XNNPACK segments; each attention closes one and opens the next, so that
L layers make L + 1 delegates. What XNNPACK has no node for stays in a small outer module: the embedding, the rotary
tables, and the attention over a cache that is updated in place (ExecuTorch's ``llama::update_cache`` and
``llama::custom_sdpa``). Only that module goes through ``torch.export``.

The program is what ExecuTorch's own runners for Android and iOS expect: ``forward(tokens int64 [1, T], input_pos int64
[1]) -> logits float32 [1, T or 1, V]`` for any T from 1 to the context, and constant methods that describe the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporter.errors import LoweringError
from exporter.files import written_whole
from exporter.model.graph import EXPERT, Constant, Graph, Table, Weight
from exporter.model.ops import temperatures
from exporter.model.reference import Weights
from exporter.quantized import QuantizedTensor
from exporter.spec import FINAL_NORM, Logits, ModelSpec, Precision
from exporter.store import StoredWeight, plain
from targets.executorch import border
from targets.executorch.metadata import describe

with border.toolchain("be imported"):
    import executorch.extension.llm.custom_ops.custom_ops  # registers llama::*
    import executorch.kernels.quantized  # noqa: F401  (registers quantized_decomposed::*.out)
    from executorch.exir import (
        EdgeCompileConfig,
        EdgeProgramManager,
        ExecutorchBackendConfig,
        ExecutorchProgramManager,
        to_edge,
    )
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from executorch.exir.passes import MemoryPlanningPass

    from targets.executorch.outer import (
        Attention,
        ChunkMask,
        IfChosen,
        Int8Attention,
        LastPosition,
        Outer,
        RotaryTables,
        Route,
        Step,
        Steps,
        Temperatures,
        embedding_module,
    )
    from targets.executorch.plain import Spread
    from targets.executorch.xnnpack import Segment, Wire

EXAMPLE_LENGTH = 3
"""Tokens in the example that is traced: neither 0 nor 1, which would become constants."""


class Dequantized:
    """Weights with every code replaced by the float32 number that it stands for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str, /) -> StoredWeight:
        stored = self._weights[name]
        return stored.dequantize() if isinstance(stored, QuantizedTensor) else stored


def write_program(
    graph: Graph,
    weights: Weights,
    path: Path,
    *,
    context: int,
    logits: Logits,
    kv_cache: Precision | None = None,
    matrices: Weights | None = None,
    walk: type[Walk] | None = None,
) -> None:
    """Lower ``graph`` and write ``path``, whole or not at all. ``matrices``, where given, answers in place of
    ``weights`` for those of linears. Raises LoweringError."""
    with border.toolchain("lower the graph"):
        walked = (walk or Walk)(weights, matrices or weights, context=context, logits=logits, kv_cache=kv_cache)
        outer = walked.run(graph)
        described = describe(graph.spec, context=context, longest=context, custom_attention=True)
        program = compiled(outer, walked.example(graph.spec), described=described, copies_inputs=not graph.spec.images)
    write_compiled(program, outer, path)


def write_compiled(program: ExecutorchProgramManager, outer: nn.Module, path: Path) -> None:
    """``path``, whole or not at all; ``outer``, of which it was compiled, is emptied."""
    with written_whole(path) as temporary, border.toolchain("write the program"), temporary.open("wb") as file:
        program.write_to_file(file)
    _let_go(outer)


def _let_go(outer: nn.Module) -> None:
    """Empty the delegates. torch 2.13 keeps them for as long as the process lives, in the keys of caches (of fake
    tensors, of shapes) and in a table of the last export's nodes, and with them every weight: 5 GB at 8B."""
    for module in outer.modules():
        if isinstance(module, LoweredBackendModule):
            module.named_data_store_output.buffers.clear()


@dataclass(frozen=True, slots=True)
class Example:
    """What a program is traced with: its inputs, and which of their lengths are dynamic."""

    inputs: tuple[Tensor, ...]
    dynamic_shapes: tuple[Any, ...] | None = None


class BaseWalk:
    """One walk over a graph: the segment that is open, and the steps so far; the ops of decoders and others."""

    def __init__(self, weights: Weights, matrices: Weights) -> None:
        self._weights = weights
        self._matrices = matrices
        self._segment = Segment()
        self._steps: list[Step | _Delegate] = []

    def _table(self) -> Table:
        return {
            "linear": self._linear,
            "silu": self._in_segment(Segment.silu),
            "mul": self._in_segment(Segment.multiply),
            "add": self._in_segment(Segment.add),
            "head_norm": self._head_norm,
            "tanh_gate": lambda x, gate: self._segment.tanh_gate(x, gate.name, self._vector(gate)),
        }

    def _finished(self, *, inputs: Sequence[Wire], outputs: Sequence[Wire], context: int | None) -> Steps:
        """``context``: the length of a wire that stands for any up to it; None: every length is what it is."""
        for wire in outputs:
            if wire.source:
                wire.source.send(wire)
        self._close_segment()
        stand_ins = StandIns(context=context)
        steps = [step if isinstance(step, Step) else step.lowered(stand_ins) for step in self._steps]
        return Steps(steps, inputs=inputs, outputs=outputs)

    def _in_segment(self, method: Callable[..., Wire]) -> Callable[..., Wire]:
        """A method of the segment that is open when it is called."""
        return lambda *arguments: method(self._segment, *arguments)

    def _outside(self, module: nn.Module, *inputs: Wire, shape: tuple[int, ...]) -> Wire:
        """What ``module`` gives of ``inputs``: a step that no segment has a node for."""
        for wire in inputs:
            if wire.source:
                wire.source.send(wire)
        if any(wire.source is self._segment for wire in inputs):
            self._close_segment()
        result = Wire(shape)
        self._steps.append(Step(module, inputs, (result,)))
        return result

    def _linear(self, x: Wire, weight: Weight) -> Wire:
        return self._segment.linear(x, name=weight.name, weight=plain(self._matrices[weight.name]))

    def _head_norm(self, x: Wire, head_dim: int, eps: float, weight: Weight | None = None) -> Wire:
        heads = self._segment.normal(self._segment.split_heads(x, x.shape[-1] // head_dim), eps=eps)
        if weight:
            heads = self._segment.scale(heads, weight.name, self._vector(weight))
        return self._segment.join_heads(heads)

    def _vector(self, weight: Weight) -> Tensor:
        values = self._weights[weight.name]
        assert isinstance(values, Tensor)  # what is no matrix is float32 always
        return values

    def _close_segment(self) -> None:
        """A segment that gives nothing, as before the last norm of a model without layers, is none."""
        if self._segment.outputs:
            self._steps.append(_Delegate(self._segment))
        self._segment = Segment()


class Walk(BaseWalk):
    """Over a decoder."""

    def __init__(
        self, weights: Weights, matrices: Weights, *, context: int, logits: Logits, kv_cache: Precision | None
    ) -> None:
        super().__init__(weights, matrices)
        self._context = context
        self._logits = logits
        self._attends = Int8Attention if kv_cache is Precision.INT8 else Attention
        self._tokens, self._start = Wire((1, context)), Wire((1,))
        self._rotary: dict[str, tuple[Wire, Wire]] = {}
        self._masks: dict[int, Wire] = {}
        self._temperatures: Wire | None = None

    def _table(self) -> Table:
        return {
            **super()._table(),
            "embedding": self._embedding,
            "rms_norm": self._rms_norm,
            "attention": self._attention,
            "temper": self._temper,
            "route": self._route,
            "gate": lambda x, scores, expert: self._segment.scale_by(x, scores, column=expert),
            "spread": self._spread,
            EXPERT: self._expert,
        }

    def run(self, graph: Graph) -> Outer:
        """The outer module for ``graph``. Raises LoweringError for an op, or an argument of one, without a lowering."""
        caches = dict.fromkeys(graph.inputs)  # each attention keeps its own
        others = self._other_inputs(graph.spec)
        logits: Wire = graph.run(self._table(), {**caches, "ids": self._tokens, **others})["logits"]
        inputs = [self._tokens, self._start, *others.values()]
        return Outer(self._finished(inputs=inputs, outputs=[logits], context=self._context), context=self._context)

    def example(self, _spec: ModelSpec) -> Example:
        """Of what ``run`` gives."""
        tokens, start = torch.zeros(1, EXAMPLE_LENGTH, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        return Example((tokens, start), ({1: Dim("length", max=self._context)}, None))

    def _other_inputs(self, _spec: ModelSpec) -> dict[str, Wire]:
        """By our names, in the order in which the program takes them."""
        return {}

    def _embedding(self, ids: Wire, weight: Weight) -> Wire:
        table = embedding_module(plain(self._weights[weight.name]))
        return self._outside(table, ids, shape=(1, self._context, weight.shape[1]))

    def _rms_norm(self, x: Wire, weight: Weight, eps: float) -> Wire:
        if weight.name == FINAL_NORM and self._logits is Logits.LAST:
            x = self._outside(LastPosition(), x, shape=(1, 1, x.shape[-1]))
        return self._segment.rms_norm(x, name=weight.name, weight=self._vector(weight), eps=eps)

    def _attention(
        self,
        q: Wire,
        k: Wire,
        v: Wire,
        _past_k: None,
        _past_v: None,
        inv_freq: Constant | None,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
        chunk: int,
    ) -> tuple[Wire, None, None]:
        if window:
            raise LoweringError(
                f"attention with window {window} has no lowering: llama::custom_sdpa sees every key",
                hint="choose another target for this model",
            )
        masks = (self._chunk_mask(chunk),) if 0 < chunk < self._context else ()
        segment = self._segment
        q, k, v = segment.split_heads(q, heads), segment.split_heads(k, kv_heads), segment.split_heads(v, kv_heads)
        if inv_freq is not None:
            cos, sin = self._rotary_tables(inv_freq)
            q, k = segment.rotate(q, cos=cos, sin=sin), segment.rotate(k, cos=cos, sin=sin)
        for wire in (q, k, v):
            segment.send(wire)
        self._close_segment()
        module = self._attends(context=self._context, kv_heads=kv_heads, head_dim=k.shape[-1], scale=scale)
        context = Wire(q.shape)
        self._steps.append(Step(module, (q, k, v, self._start, *masks), (context,)))
        return self._segment.join_heads(context), None, None

    def _temper(self, q: Wire, _past_k: None, floor_scale: int, attn_scale: float) -> Wire:
        if self._context < floor_scale:  # all are 1
            return q
        if self._temperatures is None:
            table = temperatures(first=0, count=self._context, floor_scale=floor_scale, attn_scale=attn_scale)
            shape = (1, self._context, 1)
            self._temperatures = self._outside(Temperatures(table), self._tokens, self._start, shape=shape)
        return self._segment.multiply(q, self._temperatures)

    def _chunk_mask(self, chunk: int) -> Wire:
        if chunk not in self._masks:
            module, shape = ChunkMask(context=self._context, chunk=chunk), (self._context, self._context)
            self._masks[chunk] = self._outside(module, self._tokens, self._start, shape=shape)
        return self._masks[chunk]

    def _route(self, logits: Wire, count: int) -> Wire:
        return self._outside(Route(count), logits, shape=logits.shape)

    def _spread(self, logits: Wire, tokens: Constant, vocab_size: int) -> Wire:
        module = Spread(tokens.value, vocab_size=vocab_size)
        return self._outside(module, logits, shape=(*logits.shape[:-1], vocab_size))

    def _expert(self, x: Wire, scores: Wire, total: Wire, expert: int, inside: Callable[..., Wire]) -> Wire:
        """A delegate of its own, which the outer program passes over where no token chose the expert."""
        for wire in (x, total):
            if wire.source:
                wire.source.send(wire)
        self._close_segment()
        segment, self._segment = self._segment, Segment()
        added = inside(x, scores, total)
        segment, self._segment = self._segment, segment
        segment.send(added)
        result = Wire(total.shape)
        self._steps.append(_Delegate(segment, result=result, unless_chosen=(x, scores, total, expert)))
        return result

    def _rotary_tables(self, inv_freq: Constant) -> tuple[Wire, Wire]:
        if inv_freq.name not in self._rotary:
            shape = (1, self._context, 1, 2 * inv_freq.value.shape[0])
            tables = Wire(shape), Wire(shape)
            module = RotaryTables(inv_freq.value, context=self._context)
            self._steps.append(Step(module, (self._tokens, self._start), tables))
            self._rotary[inv_freq.name] = tables
        return self._rotary[inv_freq.name]


@dataclass(frozen=True, slots=True)
class _Delegate:
    """A segment that is to become a step."""

    segment: Segment
    result: Wire | None = None
    """What the outer program calls its only output."""
    unless_chosen: tuple[Wire, Wire, Wire, int] | None = None
    """Of an expert: what it reads, scores, the sum so far, and its number."""

    def lowered(self, stand_ins: StandIns) -> Step:
        module, segment = _lowered(self.segment, stand_ins), self.segment
        if self.unless_chosen is None or self.result is None:
            return Step(module, tuple(segment.inputs), tuple(segment.outputs))
        *inputs, expert = self.unless_chosen
        order = [inputs.index(wire) for wire in segment.inputs]
        chosen = IfChosen(module, order=order, expert=expert)
        return Step(chosen, tuple(inputs), (self.result,))


def _lowered(segment: Segment, stand_ins: StandIns) -> nn.Module:
    payload, constants = segment.serialize()
    shapes_in = tuple(wire.shape for wire in segment.inputs)
    shapes_out = tuple(wire.shape for wire in segment.outputs)
    module: nn.Module = LoweredBackendModule(
        stand_ins.program(shapes_in, shapes_out), "XnnpackBackend", payload, [], constants
    )
    return module


class StandIns:
    """Programs that give nothing but the shapes of a delegate's results: what ExecuTorch traces in its place."""

    def __init__(self, *, context: int | None) -> None:
        self._context = context
        self._made: dict[Any, ExportedProgram] = {}

    def program(self, inputs: tuple[tuple[int, ...], ...], outputs: tuple[tuple[int, ...], ...]) -> ExportedProgram:
        """For shapes whose second length is dynamic where it is the context; made once for each kind of segment."""
        if (inputs, outputs) not in self._made:
            self._made[inputs, outputs] = self._make(inputs, outputs)
        return self._made[inputs, outputs]

    def _make(self, inputs: tuple[tuple[int, ...], ...], outputs: tuple[tuple[int, ...], ...]) -> ExportedProgram:
        dynamic = {1: Dim("length", max=self._context)}
        dynamic_shapes = tuple(dynamic if shape[1] == self._context else None for shape in inputs)
        examples = tuple(
            torch.zeros(shape if fixed is None else (shape[0], EXAMPLE_LENGTH, *shape[2:]))
            for shape, fixed in zip(inputs, dynamic_shapes, strict=True)
        )
        return torch.export.export(
            _ShapesOnly(outputs, context=self._context), examples, dynamic_shapes=(dynamic_shapes,), strict=False
        )


class _ShapesOnly(nn.Module):
    def __init__(self, shapes: tuple[tuple[int, ...], ...], *, context: int | None) -> None:
        super().__init__()
        self._shapes, self._context = shapes, context

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        length = inputs[0].shape[1]  # [1, T, ...]
        lengths = (length if shape[1] == self._context else shape[1] for shape in self._shapes)
        return tuple(
            inputs[0].new_zeros((shape[0], own, *shape[2:])) for shape, own in zip(self._shapes, lengths, strict=True)
        )


def compiled(
    outer: nn.Module, example: Example, *, described: dict[str, Any], copies_inputs: bool = True
) -> ExecutorchProgramManager:
    """``copies_inputs``: whether the program has memory of its own for them."""
    exported = torch.export.export(outer, example.inputs, dynamic_shapes=example.dynamic_shapes, strict=False)
    unchecked = EdgeCompileConfig(_check_ir_validity=False)  # the outer module is always of the same dozen of ops
    edge: EdgeProgramManager = to_edge(exported, constant_methods=described, compile_config=unchecked)
    planned = MemoryPlanningPass(alloc_graph_input=copies_inputs)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planned))
