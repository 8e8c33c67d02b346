"""Round to nearest, with the scale of each group chosen to lose least: the baseline that needs no data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from exporter.quantized import CODE_RANGE, SMALLEST_SCALE, QuantizedTensor

_SHRINK_STEPS = {4: 24, 8: 12}
_SHRINK_LEAST = {4: 0.66, 8: 0.90}
"""How far, and in how many steps, the clipping point moves in from the largest magnitude of a group. Clipping a
little buys finer steps for the rest: at 4 bits the best point lies between 0.7 and 1, at 8 bits it hardly moves."""

_BLOCK_ELEMENTS = 1 << 20
"""Weights searched at once: bounds the temporaries at a few times 4 MiB, and keeps them in cache."""


def round_to_nearest(weight: Tensor, *, name: str, bits: int, group_size: int) -> QuantizedTensor:
    """Codes of ``weight`` (any float dtype, ``[N, K]``) with the scale of least squared error for each group.

    Each candidate scale is rounded to the bf16 grid *before* its codes are chosen, so that the error compared is the
    error shipped. ``group_size`` divides K; ``group_size == K`` gives one scale per row.
    """
    columns = weight.shape[1]
    scales = search_scales(weight, bits=bits, group_size=group_size)
    codes = [
        encode(block.float().view(-1, group_size), of_block.reshape(-1, 1), bits=bits).view(block.shape)
        for block, of_block in zip(_row_blocks(weight, columns), _row_blocks(scales, columns), strict=True)
    ]
    return QuantizedTensor(name=name, bits=bits, group_size=group_size, codes=torch.cat(codes), scales=scales)


def search_scales(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """float32 ``[N, K / group_size]`` on the scale grid: for each group that of least squared error after rounding."""
    rows, columns = weight.shape
    scales = [_search(block.float().view(-1, group_size), bits=bits) for block in _row_blocks(weight, columns)]
    return torch.cat(scales).view(rows, columns // group_size)


def to_scale_grid(scales: Tensor) -> Tensor:
    """The nearest scales that every target holds exactly: bf16 values of at least 2**-17, as float32."""
    return scales.to(torch.bfloat16).float().clamp_(min=SMALLEST_SCALE)


def encode(groups: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """int8 codes of ``groups`` ``[G, g]`` under ``scales`` ``[G, 1]``: divide, round half to even, clamp."""
    lowest, highest = CODE_RANGE[bits]
    return (groups / scales).round_().clamp_(lowest, highest).to(torch.int8)


def _row_blocks(matrix: Tensor, columns: int) -> Iterable[Tensor]:
    return matrix.split(max(1, _BLOCK_ELEMENTS // columns))


def _search(groups: Tensor, *, bits: int) -> Tensor:
    """Scales float32 ``[G, 1]`` of least squared error for ``groups`` ``[G, g]`` over the candidates."""
    largest = groups.abs().amax(dim=1, keepdim=True)
    lowest, highest = CODE_RANGE[bits]
    best_error = torch.full_like(largest, torch.inf)
    best_scales = torch.empty_like(largest)
    for shrink in torch.linspace(1.0, _SHRINK_LEAST[bits], _SHRINK_STEPS[bits]).tolist():
        scales = to_scale_grid(largest * (shrink / highest))
        decoded = (groups / scales).round_().clamp_(lowest, highest).mul_(scales)
        error = (decoded - groups).square_().sum(dim=1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
    return best_scales
