"""Matrices as ExecuTorch's own kernels take them, with no backend behind: codes stay codes in the file.

    float32          aten::linear
    float16          widened at each call, then aten::linear
    int8, int4       quantized_decomposed::mixed_linear: float32 x int8, a scale for each group of a row

No kernel of the wheel takes an int4 matrix, so its codes lie as one byte each. Those of an embedding are packed: there
is ``embedding_4bit``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.quantized import QuantizedTensor
from exporter.store import PlainWeight


class FloatLinear(nn.Module):
    """x float32 [1, T, K] -> float32 [1, T, N]"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float())


class CodesLinear(nn.Module):
    """x float32 [1, T, K] -> float32 [1, T, N]"""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        per_row = weight.group_size == weight.shape[1]
        self.codes = nn.Buffer(weight.codes)
        self.scales = nn.Buffer(weight.scales[:, 0].contiguous() if per_row else weight.scales)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = torch.ops.quantized_decomposed.mixed_linear(x[0], self.codes, self.scales, None)
        return rows.unsqueeze(0)


def linear_module(weight: PlainWeight) -> nn.Module:
    return CodesLinear(weight) if isinstance(weight, QuantizedTensor) else FloatLinear(weight)


def register_shapes() -> None:
    """Tell torch the shape of what ``mixed_linear`` gives: ExecuTorch 1.4.1 declares that op and implements it for its
    runtime only. To be called once quantized_decomposed is declared; a second time it does nothing."""
    name = "quantized_decomposed::mixed_linear"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.register_fake(name)(_mixed_linear_shape)


def _mixed_linear_shape(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
