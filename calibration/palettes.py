"""Palettes: tables of 16 values chosen by k-means over the weights of some rows, and each weight the index of one.

Weights count by the energy of their column's input where a text has shown it, as errors in them count in the output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from calibration.rtn import row_blocks
from exporter.errors import InputError
from exporter.quantized import PalettizedTensor
from exporter.spec import TABLE_ROWS, TABLE_VALUES

_STEPS = 100
"""Of Lloyd's algorithm at most."""
_STILL = 1e-4
"""It ends where no value of a table moves further than this part of the table's span."""

_QUIETEST = 1e-4
"""What a column counts as at least, relative to the mean: one that a text left silent may speak in another."""


def palettize(weight: Tensor, *, name: str, energy: Tensor | None = None) -> PalettizedTensor:
    """Codes of ``weight`` (any float dtype, ``[N, K]``, N a multiple of ``TABLE_ROWS``) for the values nearest in the
    tables of ``find_tables``."""
    tables = find_tables(weight, name=name, energy=energy)
    bounds = between(tables.repeat_interleave(TABLE_ROWS, dim=0))
    codes = [torch.searchsorted(ends, rows.float()).to(torch.int8) for rows, ends in row_blocks(weight, bounds)]
    return PalettizedTensor(name=name, codes=torch.cat(codes), tables=tables)


def find_tables(weight: Tensor, *, name: str, energy: Tensor | None = None) -> Tensor:
    """float32 ``[N / TABLE_ROWS, 16]`` on the float16 grid, ascending: tables of least squared error for ``weight``,
    each column weighted by its ``energy`` (float32 ``[K]``, mean square of its input; None: all alike).

    k-means in one dimension: Lloyd 1982 (doi:10.1109/TIT.1982.1056489) over sorted weights, whose running sums give
    each mean at once. Raises InputError for a value that float16 cannot hold.
    """
    shares = torch.ones(weight.shape[1]) if energy is None else energy / energy.mean().clamp(min=_TINY)
    shares = shares.clamp(min=_QUIETEST).repeat(TABLE_ROWS)
    rows = max(1, _ELEMENTS // (TABLE_ROWS * weight.shape[1])) * TABLE_ROWS
    found = [_lloyd(block.float().reshape(-1, len(shares)), shares) for block in weight.split(rows)]
    tables = torch.cat(found).to(torch.float16).float()
    if not torch.isfinite(tables).all():
        raise InputError(
            f"{name} holds {weight.abs().max().item():.3g}, the float16 of its tables ends at 65504",
            hint="take --precision int8 or int4",
        )
    return tables


def between(tables: Tensor) -> Tensor:
    """``[n, 15]`` of ``[n, 16]``: half-way from each value to the next, where the index of the nearest changes."""
    return ((tables[:, :-1] + tables[:, 1:]) / 2).contiguous()


_TINY = torch.finfo(torch.float32).tiny
_ELEMENTS = 1 << 20
"""Weights that are clustered at once: each takes some 40 bytes meanwhile."""
_BINS = 128


def _lloyd(values: Tensor, shares: Tensor) -> Tensor:
    """``[G, 16]``, ascending: what ``values`` ``[G, n]`` cluster around, column j counting ``shares[j]``."""
    ascending, order = values.sort(dim=1)
    mass = _running(shares[order].double())  # [G, n + 1]
    moment = _running(shares[order].double() * ascending)
    tables = _first_tables(ascending, mass, moment)
    span = (ascending[:, -1:] - ascending[:, :1]).clamp(min=_TINY)
    for _ in range(_STEPS):
        edges = pad(torch.searchsorted(ascending, between(tables)), (1, 0))
        edges = pad(edges, (0, 1), value=ascending.shape[1])
        moved = _means(edges, mass, moment, empty=tables)
        still = ((moved - tables).abs() <= _STILL * span).all()
        tables = moved
        if still:
            break
    return tables.sort(dim=1).values


def _running(values: Tensor) -> Tensor:
    return pad(values.cumsum(dim=1), (1, 0))


def _first_tables(ascending: Tensor, mass: Tensor, moment: Tensor) -> Tensor:
    """The best tables whose cells end where one of a few hundred bins does, by dynamic programming as in Ckmeans.1d.dp
    (Wang and Song 2011, doi:10.32614/RJ-2011-015): Lloyd's algorithm alone stays in poor optima of heavy tails."""
    ends = _bins(ascending, mass)  # [G, B + 1]
    masses, moments = mass.gather(1, ends), moment.gather(1, ends)
    weights = masses.unsqueeze(1) - masses.unsqueeze(2)  # [G, from, to]
    gains = (moments.unsqueeze(1) - moments.unsqueeze(2)).square_().div_(weights.clamp(min=_TINY))
    # What a cell takes off the squared error: nothing where it is empty. None runs backwards.
    gains.masked_fill_(torch.ones(gains.shape[1:], dtype=torch.bool).tril(-1), -torch.inf)
    best, cuts = gains[:, 0], []
    for _ in range(TABLE_VALUES - 1):
        best, cut = (best.unsqueeze(2) + gains).max(dim=1)
        cuts.append(cut)
    cell = torch.full((len(ends), 1), ends.shape[1] - 1)
    found = [cell]
    for cut in reversed(cuts):
        cell = cut.gather(1, cell)
        found.append(cell)
    edges = ends.gather(1, torch.cat([torch.zeros_like(cell), *reversed(found)], dim=1))
    return _means(edges, mass, moment, empty=ascending.gather(1, edges[:, 1:].clamp(min=1) - 1))


def _bins(ascending: Tensor, mass: Tensor) -> Tensor:
    """int64 ``[G, B + 1]``: where bins end among the values, half of them at quantiles, half evenly over the span."""
    shares = torch.linspace(0, 1, _BINS // 2 + 1)
    low, high = ascending[:, :1], ascending[:, -1:]
    at_quantiles = torch.searchsorted(mass, mass[:, -1:] * shares.double()).clamp_(max=ascending.shape[1])
    evenly = torch.searchsorted(ascending, low + (high - low) * shares[1:-1])
    ends = torch.cat([at_quantiles, evenly], dim=1).sort(dim=1).values
    ends[:, 0], ends[:, -1] = 0, ascending.shape[1]
    return ends


def _means(edges: Tensor, mass: Tensor, moment: Tensor, *, empty: Tensor) -> Tensor:
    """``[G, 16]`` of the cells between ``edges`` ``[G, 17]``; that of ``empty`` where a cell has nothing in it."""
    weights, sums = (total.gather(1, edges).diff(dim=1) for total in (mass, moment))
    return torch.where(weights > 0, sums / weights.clamp(min=_TINY), empty.double()).float()
