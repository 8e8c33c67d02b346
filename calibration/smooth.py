"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): hand the outliers of int8 activations over to the weights."""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5
"""How much of the difficulty moves to the weights: alpha of equation 4, and the paper's choice for most models."""


def smooth_factors(weights: list[Tensor], largest: Tensor) -> Tensor:
    """Factors float32 ``[K]`` for the columns of ``weights`` (the inputs are divided by the same):
    max|x|^alpha / max|w|^(1 - alpha), equation 4. ``largest`` ``[K]`` is max|x| of each channel.

    A channel that is always zero, on either side, keeps a factor of one.
    """
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    silent = (largest == 0) | (columns == 0)
    factors = largest.clamp(min=1e-12) ** STRENGTH / columns.clamp(min=1e-12) ** (1 - STRENGTH)
    return torch.where(silent, 1.0, factors)
