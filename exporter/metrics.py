"""How far one next-token distribution is from another. Logits are float32 ``[T, V]``; natural logarithms throughout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POSITIONS_AT_ONCE = 64
"""That have logits in float64: of a vocabulary of 128,256 some five copies of 66 MB."""


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) at each position, in nats: two ``[T, V]`` -> float64 ``[T]``.

    Computed in float64: at the divergences that matter here (1e-7 nats) float32 sums over a vocabulary of 128,256
    are mostly rounding. Negative results of rounding are clamped to 0.
    """
    parts = zip(reference.split(_POSITIONS_AT_ONCE), candidate.split(_POSITIONS_AT_ONCE), strict=True)
    return torch.cat([_kl_divergence(p.double(), q.double()) for p, q in parts])


def _kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    log_p = torch.log_softmax(reference, dim=-1)
    log_q = torch.log_softmax(candidate, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_(min=0.0)


def top1_agreement(reference: Tensor, candidate: Tensor) -> Tensor:
    """Whether both prefer the same token, at each position: two ``[T, V]`` -> bool ``[T]``."""
    return reference.argmax(dim=-1) == candidate.argmax(dim=-1)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) at each position, in nats: ``[T, V]`` and int64 ``[T]`` -> float64 ``[T]``."""
    parts = zip(logits.split(_POSITIONS_AT_ONCE), targets.split(_POSITIONS_AT_ONCE), strict=True)
    return torch.cat(
        [torch.nn.functional.cross_entropy(some.double(), wanted, reduction="none") for some, wanted in parts]
    )


def perplexity(nll: Tensor) -> float:
    """exp of the mean negative log-likelihood (nats per token)."""
    return math.exp(nll.mean().item())


def bootstrap_interval(values: Tensor, *, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean of ``values`` ``[n]`` (Efron and Tibshirani 1993, 13.3)."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(resamples)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high
