"""The part of a program that XNNPACK has no node for: one module for each step, and the module that runs them in order.

It is traced once by ``torch.export`` and never executed in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.model.rope import rope_table
from exporter.quantized import QuantizedTensor, pack_int4
from exporter.store import PlainWeight
from targets.executorch.xnnpack import NIBBLE_OFFSET, Wire


@dataclass(frozen=True, slots=True)
class Step:
    """``module`` applied to the values of ``inputs``, giving those of ``outputs``."""

    module: nn.Module
    inputs: tuple[Wire, ...]
    outputs: tuple[Wire, ...]


class Steps(nn.Module):
    """What runs the steps, each on what those before it gave."""

    def __init__(self, steps: Sequence[Step], *, inputs: Sequence[Wire], outputs: Sequence[Wire]) -> None:
        super().__init__()
        self.modules_in_order = nn.ModuleList(step.module for step in steps)
        self._steps = [(step.inputs, step.outputs) for step in steps]
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        values: dict[Wire, Any] = dict(zip(self._inputs, given, strict=True))
        for module, (inputs, outputs) in zip(self.modules_in_order, self._steps, strict=True):
            results = module(*[values[wire] for wire in inputs])
            values.update(zip(outputs, results if isinstance(results, tuple | list) else (results,), strict=True))
        return tuple(values[wire] for wire in self._outputs)


class Outer(nn.Module):
    """tokens int64 [1, T], input_pos int64 [1], what else there is -> logits float32 [1, T or 1, V]; the caches are
    buffers. Of ``steps`` the first two inputs are the tokens and where they start."""

    def __init__(self, steps: Steps, *, context: int) -> None:
        super().__init__()
        self.steps, self._context = steps, context

    def forward(self, tokens: Tensor, input_pos: Tensor, *others: Tensor) -> Tensor:
        start = input_pos[0].item()
        for held in (start >= 0, start < self._context, start + tokens.shape[1] <= self._context):
            torch._check(held)
        (logits,) = self.steps(tokens, start, *others)
        return logits


class FloatEmbedding(nn.Module):
    """tokens [1, T] -> float32 [1, T, H] from a float16 or float32 table, widened after the rows are taken."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.get_buffer("table")).float()


class Int8Embedding(nn.Module):
    """tokens [1, T] -> float32 [1, T, H] from int8 rows with a scale each."""

    def __init__(self, table: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("codes", table.codes)
        self.register_buffer("scales", table.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        embed = torch.ops.quantized_decomposed.embedding_byte
        rows: Tensor = embed(self.get_buffer("codes"), self.get_buffer("scales"), None, -128, 127, tokens)
        return rows


class Int4Embedding(nn.Module):
    """tokens [1, T] -> float32 [1, T, H] from int4 codes, scaled by group or by row; the *high* nibble comes first."""

    def __init__(self, table: QuantizedTensor) -> None:
        super().__init__()
        packed = pack_int4(table.codes) ^ NIBBLE_OFFSET
        self.register_buffer("codes", (packed << 4) | (packed >> 4))
        self.register_buffer("scales", table.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        embed = torch.ops.quantized_decomposed.embedding_4bit
        rows: Tensor = embed(self.get_buffer("codes"), self.get_buffer("scales"), None, -8, 7, tokens)
        return rows


def embedding_module(table: PlainWeight) -> nn.Module:
    if isinstance(table, QuantizedTensor):
        return Int8Embedding(table) if table.bits == 8 else Int4Embedding(table)
    return FloatEmbedding(table)


class RotaryTables(nn.Module):
    """tokens [1, T], start -> [cos, cos] and [-sin, sin] of those positions: two float32 [1, T, 1, D]."""

    def __init__(self, inv_freq: Tensor, *, context: int) -> None:
        super().__init__()
        cos, sin = rope_table(inv_freq, first=0, count=context)
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1)[None, :, None])
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1)[None, :, None])

    def forward(self, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        length = tokens.shape[1]
        return self.get_buffer("cos").narrow(1, start, length), self.get_buffer("sin").narrow(1, start, length)


class Attention(nn.Module):
    """q [1, T, H, D], k and v [1, T, KV, D] (q and k rotated), start -> context [1, T, H, D]; keeps the cache.

    With a mask, that alone says what a query sees."""

    def __init__(self, *, context: int, kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("keys", torch.zeros(1, context, kv_heads, head_dim))
        self.register_buffer("values", torch.zeros(1, context, kv_heads, head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
        keys, values = self.get_buffer("keys"), self.get_buffer("values")
        torch.ops.llama.update_cache(k, keys, start)
        torch.ops.llama.update_cache(v, values, start)
        dropout, causal = 0.0, mask is None
        context: Tensor = torch.ops.llama.custom_sdpa(q, keys, values, start, mask, dropout, causal, self.scale)
        return context


class Int8Attention(nn.Module):
    """As ``Attention``, its cache int8: queries, keys and values each have a scale and a zero point for each head of a
    token, [1, T, heads, 1]."""

    def __init__(self, *, context: int, kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, context, kv_heads, head_dim, dtype=torch.int8))
            self.register_buffer(f"{name}_zero_points", torch.zeros(1, context, kv_heads, 1, dtype=torch.int8))
            self.register_buffer(f"{name}_scales", torch.ones(1, context, kv_heads, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
        for name, new in (("keys", k), ("values", v)):
            for part, tensor in zip(("", "_zero_points", "_scales"), _int8(new), strict=True):
                torch.ops.llama.update_cache(tensor, self.get_buffer(name + part), start)
        cached = {
            name + part: self.get_buffer(name + part)
            for name in ("keys", "values")
            for part in ("", "_zero_points", "_scales")
        }
        codes, zero_points, scales = _int8(q)
        dropout, causal = 0.0, mask is None
        context: Tensor = torch.ops.llama.custom_quantized_sdpa(
            *(codes, cached["keys"], cached["values"], start, mask, dropout, causal, self.scale),
            *(zero_points, scales),
            *(cached["keys_zero_points"], cached["keys_scales"]),
            *(cached["values_zero_points"], cached["values_scales"]),
        )
        return context


def _int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of the shape of ``x``, zero points int8 and scales float32, one of each for each row."""
    library = torch.ops.quantized_decomposed
    scales, zero_points = library.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = library.quantize_per_token(x, scales, zero_points, -128, 127, torch.int8)
    return codes, zero_points.to(torch.int8), scales.to(torch.float32)


class ChunkMask(nn.Module):
    """tokens [1, T], start -> float32 [T, context]: 0 for the keys of a query's own chunk up to itself, else -inf."""

    def __init__(self, *, context: int, chunk: int) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(context))
        self.register_buffer("chunks", torch.arange(context) // chunk)

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        positions, chunks = self.get_buffer("positions"), self.get_buffer("chunks")
        length = tokens.shape[1]
        queries, own = (x.narrow(0, start, length).unsqueeze(1) for x in (positions, chunks))
        return torch.where((positions <= queries) & (chunks == own), 0.0, -torch.inf)


class Temperatures(nn.Module):
    """tokens [1, T], start -> what queries at those positions are multiplied by: float32 [1, T, 1]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table.view(1, -1, 1))

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        return self.get_buffer("table").narrow(1, start, tokens.shape[1])


class Route(nn.Module):
    """logits [1, T, E] -> scores [1, T, E]: see ``exporter.model.ops.route``."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, logits: Tensor) -> Tensor:
        largest, chosen = logits.topk(self.count, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen, largest.sigmoid())


class IfChosen(nn.Module):
    """x [1, T, H], scores [1, T, E], sum so far [1, T, H] -> what an expert's delegate gives, which adds to the sum;
    where no token of the call chose it, the sum as it is.

    ``order`` says where the inputs of the delegate stand among these three.
    """

    def __init__(self, delegate: nn.Module, *, order: Sequence[int], expert: int) -> None:
        super().__init__()
        self.delegate, self.order, self.expert = delegate, tuple(order), expert

    def forward(self, *given: Tensor) -> Tensor:
        _, scores, _ = given

        def compute(*given: Tensor) -> tuple[Tensor]:
            (added,) = self.delegate(*[given[place] for place in self.order])
            return (added,)

        def keep(_x: Tensor, _scores: Tensor, total: Tensor) -> tuple[Tensor]:
            return (total.clone(),)

        # What ``torch.cond`` comes to, without a pass of Dynamo over each branch: half a second for each expert.
        (result,) = torch.ops.higher_order.cond(scores[..., self.expert].amax() > 0, compute, keep, given)
        return result


class LastPosition(nn.Module):
    """[1, T, H] -> [1, 1, H], so that the head is computed once a call."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:]
