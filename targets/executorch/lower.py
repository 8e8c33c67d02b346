"""The traced graph to an ExecuTorch program: a table over the graph's ops.

Linears, norms and what is between them go into XNNPACK segments; each attention closes one and opens the next, so that
L layers make L + 1 delegates. What XNNPACK has no node for stays in a small outer module: the embedding, the rotary
tables, and the attention over a cache that is updated in place (ExecuTorch's ``llama::update_cache`` and
``llama::custom_sdpa``). Only that module goes through ``torch.export``.

The program is what ExecuTorch's own runners for Android and iOS expect: ``forward(tokens int64 [1, T], input_pos int64
[1]) -> logits float32 [1, T or 1, V]`` for any T from 1 to the context, and constant methods that describe the model.
"""

from __future__ import annotations

from collections.abc import Callable
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
from exporter.spec import FINAL_NORM, Logits, Precision
from exporter.store import StoredWeight, plain
from targets.executorch import border
from targets.executorch.metadata import describe

with border.toolchain("be imported"):
    import executorch.extension.llm.custom_ops.custom_ops  # registers llama::*
    import executorch.kernels.quantized  # noqa: F401  (registers quantized_decomposed::*.out)
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchProgramManager, to_edge
    from executorch.exir.lowered_backend_module import LoweredBackendModule

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
        Temperatures,
        embedding_module,
    )
    from targets.executorch.plain import Spread
    from targets.executorch.xnnpack import Segment, Wire

_EXAMPLE_LENGTH = 3
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
) -> None:
    """Lower ``graph`` and write ``path``, whole or not at all. ``matrices``, where given, answers in place of
    ``weights`` for those of linears. Raises LoweringError."""
    with border.toolchain("lower the graph"):
        outer = Walk(weights, matrices or weights, context=context, logits=logits, kv_cache=kv_cache).run(graph)
        described = describe(graph.spec, context=context, longest=context, custom_attention=True)
        program = _compile(outer, context=context, described=described)
    with written_whole(path) as temporary, border.toolchain("write the program"), temporary.open("wb") as file:
        program.write_to_file(file)
    _let_go(outer)


def _let_go(outer: Outer) -> None:
    """Empty the delegates. torch 2.13 keeps them for as long as the process lives, in the keys of caches (of fake
    tensors, of shapes) and in a table of the last export's nodes, and with them every weight: 5 GB at 8B."""
    for module in outer.modules():
        if isinstance(module, LoweredBackendModule):
            module.named_data_store_output.buffers.clear()


class Walk:
    """One walk over a graph: the table, the segment that is open, and the steps so far."""

    def __init__(
        self, weights: Weights, matrices: Weights, *, context: int, logits: Logits, kv_cache: Precision | None
    ) -> None:
        self._weights = weights
        self._matrices = matrices
        self._context = context
        self._logits = logits
        self._attends = Int8Attention if kv_cache is Precision.INT8 else Attention
        self._tokens, self._start = Wire((1, context)), Wire((1,))
        self._rotary: dict[str, tuple[Wire, Wire]] = {}
        self._masks: dict[int, Wire] = {}
        self._temperatures: Wire | None = None
        self._segment = Segment()
        self._steps: list[Step | _Delegate] = []
        self._table: Table = {
            "embedding": self._embedding,
            "linear": self._linear,
            "rms_norm": self._rms_norm,
            "silu": self._silu,
            "mul": self._multiply,
            "add": self._add,
            "attention": self._attention,
            "head_norm": self._head_norm,
            "temper": self._temper,
            "route": self._route,
            "gate": lambda x, scores, expert: self._segment.scale_by(x, scores, column=expert),
            "spread": self._spread,
            EXPERT: self._expert,
        }

    def run(self, graph: Graph) -> Outer:
        """The outer module for ``graph``. Raises LoweringError for an op, or an argument of one, without a lowering."""
        caches = dict.fromkeys(graph.inputs)  # each attention keeps its own
        logits: Wire = graph.run(self._table, {**caches, "ids": self._tokens})["logits"]
        if logits.source:
            logits.source.send(logits)
        self._close_segment()
        stand_ins = StandIns(context=self._context)
        steps = [step if isinstance(step, Step) else step.lowered(stand_ins) for step in self._steps]
        return Outer(steps, tokens=self._tokens, start=self._start, logits=logits, context=self._context)

    def _embedding(self, ids: Wire, weight: Weight) -> Wire:
        rows = Wire((1, self._context, weight.shape[1]))
        self._steps.append(Step(embedding_module(plain(self._weights[weight.name])), (ids,), (rows,)))
        return rows

    def _linear(self, x: Wire, weight: Weight) -> Wire:
        return self._segment.linear(x, name=weight.name, weight=plain(self._matrices[weight.name]))

    def _rms_norm(self, x: Wire, weight: Weight, eps: float) -> Wire:
        if weight.name == FINAL_NORM and self._logits is Logits.LAST:
            x = self._last_position(x)
        values = self._weights[weight.name]
        assert isinstance(values, Tensor)  # norms are float32 always
        return self._segment.rms_norm(x, name=weight.name, weight=values, eps=eps)

    def _silu(self, x: Wire) -> Wire:
        return self._segment.silu(x)

    def _multiply(self, a: Wire, b: Wire) -> Wire:
        return self._segment.multiply(a, b)

    def _add(self, a: Wire, b: Wire) -> Wire:
        return self._segment.add(a, b)

    def _last_position(self, x: Wire) -> Wire:
        if x.source:
            x.source.send(x)
        self._close_segment()
        last = Wire((1, 1, x.shape[-1]))
        self._steps.append(Step(LastPosition(), (x,), (last,)))
        return last

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

    def _head_norm(self, x: Wire, head_dim: int, eps: float) -> Wire:
        heads = self._segment.split_heads(x, x.shape[-1] // head_dim)
        return self._segment.join_heads(self._segment.normal(heads, eps=eps))

    def _temper(self, q: Wire, _past_k: None, floor_scale: int, attn_scale: float) -> Wire:
        if self._context < floor_scale:  # all are 1
            return q
        if self._temperatures is None:
            table = temperatures(first=0, count=self._context, floor_scale=floor_scale, attn_scale=attn_scale)
            self._temperatures = Wire((1, self._context, 1))
            self._steps.append(Step(Temperatures(table), (self._tokens, self._start), (self._temperatures,)))
        return self._segment.multiply(q, self._temperatures)

    def _chunk_mask(self, chunk: int) -> Wire:
        if chunk not in self._masks:
            self._masks[chunk] = Wire((self._context, self._context))
            module = ChunkMask(context=self._context, chunk=chunk)
            self._steps.append(Step(module, (self._tokens, self._start), (self._masks[chunk],)))
        return self._masks[chunk]

    def _route(self, logits: Wire, count: int) -> Wire:
        self._segment.send(logits)
        self._close_segment()
        scores = Wire(logits.shape)
        self._steps.append(Step(Route(count), (logits,), (scores,)))
        return scores

    def _spread(self, logits: Wire, tokens: Constant, vocab_size: int) -> Wire:
        self._segment.send(logits)
        self._close_segment()
        of_all = Wire((*logits.shape[:-1], vocab_size))
        self._steps.append(Step(Spread(tokens.value, vocab_size=vocab_size), (logits,), (of_all,)))
        return of_all

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

    def _close_segment(self) -> None:
        """A segment that gives nothing, as before the last norm of a model without layers, is none."""
        if self._segment.outputs:
            self._steps.append(_Delegate(self._segment))
        self._segment = Segment()


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

    def __init__(self, *, context: int) -> None:
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
            torch.zeros(shape if fixed is None else (shape[0], _EXAMPLE_LENGTH, *shape[2:]))
            for shape, fixed in zip(inputs, dynamic_shapes, strict=True)
        )
        return torch.export.export(_ShapesOnly(outputs), examples, dynamic_shapes=(dynamic_shapes,), strict=False)


class _ShapesOnly(nn.Module):
    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self._shapes = shapes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        length = inputs[0].shape[1]  # [1, T, ...]
        return tuple(inputs[0].new_zeros((shape[0], length, *shape[2:])) for shape in self._shapes)


def _compile(outer: Outer, *, context: int, described: dict[str, Any]) -> ExecutorchProgramManager:
    examples = torch.zeros(1, _EXAMPLE_LENGTH, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    length = Dim("length", max=context)
    exported = torch.export.export(outer, examples, dynamic_shapes=({1: length}, None), strict=False)
    unchecked = EdgeCompileConfig(_check_ir_validity=False)  # the outer module is always of the same dozen of ops
    edge: EdgeProgramManager = to_edge(exported, constant_methods=described, compile_config=unchecked)
    return edge.to_executorch()
