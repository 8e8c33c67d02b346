"""Round to nearest, with the scale of each group chosen to lose least: the baseline that needs no data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from exporter.quantized import CODE_RANGE, SMALLEST_SCALE, QuantizedTensor

_SHRINK_STEPS = 12
_SHRINK_LEAST = {4: 0.70, 8: 0.90}
"""In how many steps, and how far, the clipping point moves in from the largest magnitude of a group. Clipping a
little buys finer steps for the rest: at 4 bits the best point lies between 0.7 and 1, at 8 bits it hardly moves. Twice
as many steps take 0.5 % off the squared error, and twice the time."""

_BLOCK_ELEMENTS = 1 << 18
"""Weights searched at once: their float copy and the one temporary of that size, a MiB each, stay in cache."""


def round_to_nearest(weight: Tensor, *, name: str, bits: int, group_size: int) -> QuantizedTensor:
    """Codes of ``weight`` (any float dtype, ``[N, K]``) with the scale of least squared error for each group.

    Each candidate scale is rounded to the bf16 grid *before* its codes are chosen, so that the error compared is the
    error shipped. ``group_size`` divides K; ``group_size == K`` gives one scale per row.
    """

    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // group_size)
    for rows, rows_codes, rows_scales in row_blocks(weight, codes, scales):
        groups = rows.float().reshape(-1, group_size)
        found = _search(groups.T, bits=bits)
        rows_scales.copy_(found.view_as(rows_scales))
        rows_codes.copy_(encode(groups, found.unsqueeze(1), bits=bits).view_as(rows_codes))
    return QuantizedTensor(name=name, bits=bits, group_size=group_size, codes=codes, scales=scales)


def search_scales(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """float32 ``[N, K / group_size]`` on the scale grid: for each group that of least squared error after rounding."""
    scales = [_search(block.float().reshape(-1, group_size).T, bits=bits) for (block,) in row_blocks(weight)]
    return torch.cat(scales).view(len(weight), -1)


def to_scale_grid(scales: Tensor) -> Tensor:
    """The nearest scales that every target holds exactly: bf16 values of at least 2**-17, as float32."""
    return scales.to(torch.bfloat16).float().clamp_(min=SMALLEST_SCALE)


def encode(groups: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """int8 codes of ``groups`` ``[G, g]`` under ``scales`` ``[G, 1]``: divide, round half to even, clamp."""
    lowest, highest = CODE_RANGE[bits]
    return (groups / scales).round_().clamp_(lowest, highest).to(torch.int8)


def row_blocks(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Matrices of as many rows, cut alike: so many rows at once as the first has ``_BLOCK_ELEMENTS`` in."""
    rows = max(1, _BLOCK_ELEMENTS // matrices[0].shape[1])
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def _search(groups: Tensor, *, bits: int) -> Tensor:
    """Scales float32 ``[G]`` of least squared error for ``groups`` ``[g, G]`` over the candidates.

    Groups stand in columns, so that one vector instruction works on many of them with a scale each.
    """
    groups = groups.contiguous()
    lowest, highest = CODE_RANGE[bits]
    shrinks = torch.linspace(1.0, _SHRINK_LEAST[bits], _SHRINK_STEPS) / highest
    candidates = to_scale_grid(groups.abs().amax(dim=0) * shrinks.unsqueeze(1))  # [C, G]
    best_scales, least_loss = candidates[0], torch.full_like(candidates[0], torch.inf)
    error = torch.empty_like(groups)
    for scales in candidates:
        codes = torch.div(groups, scales, out=error).round_().clamp_(lowest, highest)
        loss = torch.addcmul(groups, codes, scales, value=-1, out=error).square_().sum(dim=0)
        best_scales = torch.where(loss < least_loss, scales, best_scales)
        least_loss = torch.minimum(loss, least_loss)
    return best_scales
