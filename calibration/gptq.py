"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): each column's rounding error is made up for by the columns after it.

What differs from the paper: scales are fixed before the first column is rounded, from the weights as they are (*static
groups*), so that columns can go in any order and no index has to be stored; and when the codes are chosen, scales and
codes are in turn fitted to each other once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calibration.palettes import between, find_tables
from calibration.rtn import search_scales, to_scale_grid
from exporter.errors import InputError
from exporter.quantized import CODE_RANGE, PalettizedTensor, QuantizedTensor
from exporter.spec import TABLE_ROWS

BLOCK = 128
"""Columns whose errors are passed on within the block at once and to all later columns together (section 3.3, step 2):
the rank-1 updates stay in cache, the rest is a matrix product."""

SWEEPS = 2
"""Times that every code is chosen again with all others fixed: the first takes about 2 % off the KL of the bundled
model, each later one less."""

_REFIT_ELEMENTS = 1 << 24
"""Elements of the normal equations solved at once when scales are refitted: 64 MiB."""
_REFIT_DAMPING = 1e-4
_LEAST_DAMPING = 1e-6
"""Taken where none was asked for and the matrix cannot be factored without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """The second moment of a linear's input, factored once for all linears that read it.

    ``hessian``: float32 ``[K, K]``, X^T X / n over n tokens, damped. ``inverse_factor``: upper ``U`` with
    ``U^T U = hessian[order][:, order]^-1``, which the recursion of GPTQ reads row by row.
    """

    hessian: Tensor
    inverse_factor: Tensor
    order: Tensor
    """int64 ``[K]``: the order in which columns are rounded."""

    def solve(self, right: Tensor) -> Tensor:
        """``right @ hessian^-1`` for float32 ``[N, K]``."""
        factor = self.inverse_factor
        solved = torch.empty_like(right)
        solved[:, self.order] = right[:, self.order] @ factor.T @ factor
        return solved


def factor(hessian: Tensor, *, damping: float, act_order: bool) -> Curvature:
    """Damp ``hessian`` by ``damping`` times its mean diagonal, and factor it.

    A channel that was always zero gets a diagonal of one. The damping is raised tenfold where rounding, or fewer tokens
    than channels, have left the matrix indefinite. ``act_order`` rounds the columns of most energy first, while most
    others can still make up for them. Raises InputError where the matrix is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise InputError(
            "the activations of calibration are not finite, or overflow when squared",
            hint="check the checkpoint, or take --calibration none",
        )
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(hessian))
    mean, backwards = diagonal.mean().item(), order.flip(0)
    failed = True
    while failed:
        diagonal.add_(damping * mean)
        # With J the reversal, J H J = L L^T makes U = J L^-1 J upper, and U^T U = H^-1: one factorization, one
        # triangular inverse, where the textbook has two factorizations and a full inverse.
        lower, info = torch.linalg.cholesky_ex(hessian[backwards][:, backwards])
        failed = bool(info)
        damping = max(10 * damping, _LEAST_DAMPING)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
    return Curvature(hessian=hessian, inverse_factor=inverse.flip(0, 1), order=order)


def gptq(weight: Tensor, curvature: Curvature, *, name: str, bits: int, group_size: int) -> QuantizedTensor:
    """Codes of ``weight`` float32 ``[N, K]`` that lose least of ``x @ weight.T`` for inputs x of that curvature."""
    columns = weight.shape[1]
    scales = search_scales(weight, bits=bits, group_size=group_size)  # [N, K/g]
    codes = _round_by_columns(weight, _Scaled(scales, bits=bits, columns=columns), curvature)
    scales = _refit_scales(weight, codes, scales, curvature.hessian)
    for _ in range(SWEEPS):
        codes = _choose_again(weight, codes, _Scaled(scales, bits=bits, columns=columns), curvature)
        scales = _refit_scales(weight, codes, scales, curvature.hessian)
    return QuantizedTensor(
        name=name, bits=bits, group_size=columns // scales.shape[1], codes=codes.to(torch.int8), scales=scales
    )


def gptq_palette(weight: Tensor, curvature: Curvature, *, name: str) -> PalettizedTensor:
    """The same for the indices of a palette, whose tables are those of k-means, each column weighted by the energy of
    its input."""
    tables = find_tables(weight, name=name, energy=curvature.hessian.diagonal())
    levels = _Tabled(tables)
    codes = _round_by_columns(weight, levels, curvature)
    for _ in range(SWEEPS):
        codes = _choose_again(weight, codes, levels, curvature)
    return PalettizedTensor(name=name, codes=codes.to(torch.int8), tables=tables)


class _Levels(Protocol):
    """What the codes of a column may stand for. Codes and values are float32 ``[N]``."""

    def code(self, column: int, values: Tensor) -> Tensor:
        """Of the levels nearest to ``values``."""

    def value(self, column: int, codes: Tensor) -> Tensor: ...

    def moved(self, column: int, codes: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The codes nearest to the values of ``codes`` plus ``gradient`` over ``curvature`` (a number)."""


class _Scaled:
    """Multiples of a scale for each group, ``[N, K/g]``."""

    def __init__(self, scales: Tensor, *, bits: int, columns: int) -> None:
        self._by_group = scales.T.contiguous()  # [K/g, N]
        self._group_size = columns // scales.shape[1]
        self._range = CODE_RANGE[bits]

    def code(self, column: int, values: Tensor) -> Tensor:
        return (values / self._scales(column)).round_().clamp_(*self._range)

    def value(self, column: int, codes: Tensor) -> Tensor:
        return codes * self._scales(column)

    def moved(self, column: int, codes: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        moved = codes + gradient / (curvature * self._scales(column))
        return moved.round_().clamp_(*self._range)

    def _scales(self, column: int) -> Tensor:
        return self._by_group[column // self._group_size]


class _Tabled:
    """The values of a table, ``[N / TABLE_ROWS, 16]``, the same for every column."""

    def __init__(self, tables: Tensor) -> None:
        self._by_row = tables.repeat_interleave(TABLE_ROWS, dim=0)
        self._between = between(self._by_row)

    def code(self, _column: int, values: Tensor) -> Tensor:
        return torch.searchsorted(self._between, values.unsqueeze(1)).squeeze(1).float()

    def value(self, _column: int, codes: Tensor) -> Tensor:
        return self._by_row.gather(1, codes.long().unsqueeze(1)).squeeze(1)

    def moved(self, column: int, codes: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        return self.code(column, self.value(column, codes) + gradient / curvature)


def _round_by_columns(weight: Tensor, levels: _Levels, curvature: Curvature) -> Tensor:
    """float32 ``[N, K]`` codes. Works on the transpose, whose rows (the columns of the weight) are contiguous."""
    factor, order = curvature.inverse_factor, curvature.order
    columns = order.tolist()
    left = weight.T[order].contiguous()  # [K, N], in the order of rounding
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        block = left[start:end]
        errors = torch.empty_like(block)
        for row in range(end - start):
            column = start + row
            code = levels.code(columns[column], block[row])
            error = (block[row] - levels.value(columns[column], code)) / factor[column, column]
            block[row + 1 :].addr_(factor[column, column + 1 : end], error, alpha=-1)
            codes[column], errors[row] = code, error
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    unordered = torch.empty_like(weight)
    unordered[:, order] = codes.T
    return unordered


def _choose_again(weight: Tensor, codes: Tensor, levels: _Levels, curvature: Curvature) -> Tensor:
    """One sweep of coordinate descent: each code in turn takes the value of least output error, given all others as
    they are by then (QuantEase, Behdin et al. 2023, arXiv:2309.01885, algorithm 1). GPTQ looks at later columns only.
    """
    order = curvature.order
    columns = order.tolist()
    hessian = curvature.hessian[order][:, order]
    chosen = codes.T[order].contiguous()  # [K, N], in the order of rounding, as in _round_by_columns
    stored = torch.stack([levels.value(column, codes_of) for column, codes_of in zip(columns, chosen, strict=True)])
    error = weight.T[order].sub_(stored)
    del stored
    gradient = hessian @ error  # [K, N]: half of that of the loss, negated
    del error
    for start in range(0, len(chosen), BLOCK):
        end = min(start + BLOCK, len(chosen))
        block, steps = gradient[start:end], torch.empty(end - start, chosen.shape[1])
        for row in range(end - start):
            column = start + row
            place, now = columns[column], chosen[column]
            best = levels.moved(place, now, block[row], hessian[column, column])
            steps[row] = levels.value(place, best) - levels.value(place, now)
            chosen[column] = best
            block.addr_(hessian[column, start:end], steps[row], alpha=-1)
        gradient[end:].addmm_(hessian[end:, start:end], steps, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[:, order] = chosen.T
    return unordered


def _refit_scales(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """The scales that, with these codes, lose least of the output: for each row the normal equations of
    min_s (w - C s)^T H (w - C s), where column g of C holds the codes of group g and zeros elsewhere; solved for the
    step from the scales at hand.

    Damped towards the scales at hand, rounded to the grid, and kept only where the row is the better for it.
    """
    rows, columns = weight.shape
    groups = scales.shape[1]
    step = max(1, _REFIT_ELEMENTS // max(groups * groups, columns))
    blocks = []
    for start in range(0, rows, step):
        w, s = weight[start : start + step], scales[start : start + step]
        c = codes[start : start + step].view(len(w), groups, -1)
        error = w - (c * s.unsqueeze(2)).view_as(w)
        right = (c * (error @ hessian).view_as(c)).sum(dim=2)  # [n, G]
        normal = torch.empty(len(w), groups, groups)
        for group in range(groups):
            own = slice(group * c.shape[2], (group + 1) * c.shape[2])
            normal[:, group] = ((c[:, group] @ hessian[own]).view_as(c) * c).sum(dim=2)
        damping = _REFIT_DAMPING * normal.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
        damping += torch.finfo(torch.float32).tiny  # a row of zeros
        normal.diagonal(dim1=1, dim2=2).add_(damping)
        fitted = s + torch.linalg.solve(normal, right)
        normal.diagonal(dim1=1, dim2=2).sub_(damping)
        fitted = torch.where(fitted > 0, to_scale_grid(fitted), s)
        better = _gain(fitted - s, normal, right) > 0
        blocks.append(torch.where(better.unsqueeze(1), fitted, s))
    return torch.cat(blocks)


def _gain(step: Tensor, normal: Tensor, right: Tensor) -> Tensor:
    """By how much the output error of each row falls when its scales move by ``step``: 2 m^T b - m^T A m. Of the step,
    not of the scales, since the errors before and after may differ by less than their own rounding."""
    quadratic = (step.unsqueeze(1) @ normal @ step.unsqueeze(2)).flatten()
    return 2 * (step * right).sum(dim=1) - quadratic
