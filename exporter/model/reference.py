"""The reference: the same graph, run in eager PyTorch with the same codes and the target's arithmetic.

So a difference between an artifact and its reference is a fault of the lowering, never "quantization noise".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.model.eager import eager_table
from exporter.model.graph import Graph, Weight, cache_names
from exporter.quantized import QuantizedTensor
from exporter.spec import SMALLEST_ABSMAX, Activations, Arithmetic, activation_block
from exporter.store import StoredWeight

FULL_PRECISION = Arithmetic(activations=Activations.FLOAT, compute_dtype="fp32", kv_dtype="fp32")
"""float32 throughout: with a float32 store, the model itself."""

KEEP_BYTES = 4 << 30
"""Dequantized weights that references keep between calls: most of a 1B model; what does not fit is dequantized again
at each call."""


class Weights(Protocol):
    """Whatever answers for the tensors of a model by name: a WeightStore, or a dict of them."""

    def __getitem__(self, name: str, /) -> StoredWeight: ...


class Reference:
    """One model with one key-value cache: ``feed`` token ids, get the logits of every one of them.

    ``noise`` multiplies each output of a linear by 1 + noise * N(0, 1): how far the reference moves under it is the
    floor under which no artifact can be expected to agree (a flipped rounding of an activation is amplified).
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        arithmetic: Arithmetic,
        *,
        noise: float = 0.0,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._arithmetic = arithmetic
        self._noise = noise
        self._generator = torch.Generator().manual_seed(0)
        self._kept: dict[str, _DenseWeight] = {}
        self._kept_bytes = 0
        self._keep_bytes = keep_bytes
        self._caches = self._empty_caches()
        self._table = eager_table(lambda weight: self._dense(weight).values, linear=self._linear)

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return next(iter(self._caches.values())).shape[2]

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Append ``ids`` (T of them) to the cache; float32 logits ``[T, V]``."""
        outputs = self._graph.run(self._table, {"ids": torch.tensor([list(ids)]), **self._caches})
        logits: Tensor = outputs.pop("logits")
        self._caches = {name.replace("present_", "past_"): value for name, value in outputs.items()}
        return logits[0]

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on."""
        self._caches = {name: cache[:, :, :position] for name, cache in self._caches.items()}

    def greedy(self, ids: Sequence[int], *, count: int, stops: Sequence[int]) -> list[tuple[int, float]]:
        """The most likely next tokens after ``ids``, up to ``count`` of them or a stop token, each with its margin: how
        far its logit is above the second best. Where that is small another runtime may rightly choose otherwise."""
        self.rewind(0)
        answer: list[tuple[int, float]] = []
        while len(answer) < count and not (answer and answer[-1][0] in stops):
            best = self.feed([answer[-1][0]] if answer else ids)[-1].topk(2)
            answer.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
        return answer

    def _empty_caches(self) -> dict[str, Tensor]:
        spec = self._graph.spec
        names = [f"past_{name}" for pair in cache_names(spec.num_hidden_layers) for name in pair]
        return {name: torch.zeros(1, spec.num_key_value_heads, 0, spec.head_dim) for name in names}

    def _linear(self, x: Tensor, weight: Weight) -> Tensor:
        dense = self._dense(weight)
        if dense.group_size:
            x = round_activations(x, self._arithmetic.rounding(weight.name), group_size=dense.group_size)
        y = F.linear(x, dense.values)
        if self._noise:
            y = y * (1 + self._noise * torch.randn(y.shape, generator=self._generator))
        return y

    def _dense(self, weight: Weight) -> _DenseWeight:
        """float32 values of a weight, rounded as the target rounds what it dequantizes."""
        if weight.name in self._kept:
            return self._kept[weight.name]
        stored = self._weights[weight.name]
        if isinstance(stored, QuantizedTensor):
            values = stored.dequantize()
            if self._arithmetic.dequantized_dtype == "fp16":
                values = values.half().float()
            dense = _DenseWeight(values=values, group_size=stored.group_size)
        else:
            dense = _DenseWeight(values=stored.float(), group_size=None)
        if self._kept_bytes + dense.values.nbytes <= self._keep_bytes:
            self._kept[weight.name] = dense
            self._kept_bytes += dense.values.nbytes
        return dense


@dataclass(frozen=True, slots=True, kw_only=True)
class _DenseWeight:
    values: Tensor
    group_size: int | None
    """Of the codes it came from, whose linear then sees a rounded input too; None if it was stored as floats."""


def round_activations(x: Tensor, activations: Activations, *, group_size: int) -> Tensor:
    """``x`` float32 ``[..., K]`` as a linear sees it whose weight is quantized in groups of ``group_size``."""
    match activations:
        case Activations.FLOAT:
            return x
        case Activations.INT8_PER_TOKEN:
            return _int8_per_token(x)
        case Activations.INT8_PER_BLOCK:
            return _int8_per_block(x, activation_block(columns=x.shape[-1], group_size=group_size))
        case Activations.INT8_SYMMETRIC_PER_TOKEN:
            return _int8_symmetric_per_token(x)


def _int8_per_token(x: Tensor) -> Tensor:
    """Asymmetric int8, one scale and zero point for each row: XNNPACK's ``qdint8``.

    The zero point is nudged from whichever end of the range loses less by it, as in XNNPACK's
    ``xnn_f32_qd8_asymmetric_quantization_params`` (src/xnnpack/quantization.h).
    """
    lowest, highest = x.amin(dim=-1, keepdim=True).clamp(max=0.0), x.amax(dim=-1, keepdim=True).clamp(min=0.0)
    span = highest - lowest
    # A tensor, not 255.0: torch divides a number by a tensor as number x reciprocal, which is off by a last place.
    inverse_scale = torch.where(span == 0, 1.0, torch.full_like(span, 255.0) / span)
    from_below, from_above = -128.0 - lowest * inverse_scale, 127.0 - highest * inverse_scale
    error_sum = (-128.0 + lowest * inverse_scale) + (127.0 + highest * inverse_scale)
    zero_point = torch.where(error_sum > 0, from_below, from_above).clamp(-128.0, 127.0).round()
    codes = (x * inverse_scale).round().clamp(-128.0 - zero_point, 127.0 - zero_point)
    return codes * (1.0 / inverse_scale)


def _int8_per_block(x: Tensor, block: int) -> Tensor:
    """Symmetric int8, one scale of absmax / 127 per ``block`` columns of a row: MatMulNBits at accuracy_level 4."""
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    codes = (blocks * torch.where(largest == 0, 0.0, torch.full_like(largest, 127.0) / largest)).round()
    return (codes * (largest / 127.0)).flatten(-2)


def _int8_symmetric_per_token(x: Tensor) -> Tensor:
    """Symmetric int8, one scale of absmax / 127 for each row, as ``targets/onnxruntime/lower.py`` spells it out for
    ONNX's QuantizeLinear: divided by the scale and rounded half to even."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ABSMAX) / 127.0
    return (x / scale).round() * scale
