"""AWQ (Lin et al. 2023, arXiv:2306.00978): make the channels that matter larger before rounding, and divide them out of
what comes before."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 256
"""Rows of the weights, evenly spread, on which factors are compared: what is good for a channel shows in any of them,
and all rows of a 1B model would cost more than the rest of its calibration."""

_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SMALLEST = 1e-6
"""Of a channel's magnitude, relative to the mean: one that is silent is not to get an endless factor."""


def awq_factors(weights: list[Tensor], hessian: Tensor, *, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Factors float32 ``[K]`` for the columns of ``weights`` (float32 ``[N_i, K]``, inputs divided by the same) under
    which rounding to nearest loses least of the output; all ones where nothing helps.

    The candidates are x^a w^-b with x the root mean square of each input channel and w that of each column, a and b
    on a grid of five each: the paper's x^a (equation 4) and its code's x^a w^(a-1) are among them. The loss is the
    paper's, |(W - Q(W s) / s) X|^2, from the second moment of X (``hessian`` float32 ``[K, K]``).
    """
    rows = torch.cat(weights)
    rows = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()]
    x, w = _relative(hessian.diagonal().sqrt()), _relative(rows.square().mean(dim=0).sqrt())
    best, least = torch.ones_like(x), torch.inf
    for a, b in itertools.product(_EXPONENTS, repeat=2):
        factors = _centred(x**a * w**-b)
        error = rows - rounded(rows * factors) / factors
        loss = ((error @ hessian) * error).sum().item()
        if loss < least:
            best, least = factors, loss
    return best


def _relative(magnitudes: Tensor) -> Tensor:
    return (magnitudes / magnitudes.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=_SMALLEST)


def _centred(factors: Tensor) -> Tensor:
    """Of geometric mean one, so that neither side of the fold grows."""
    return (factors.log() - factors.log().mean()).exp()
