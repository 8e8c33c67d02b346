"""The quality verdict: how far quantization moved the model, on text that calibration did not see.

Measured on the reference with each target's arithmetic, against the model at full precision; parity carries the result
to the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from exporter.metrics import bootstrap_interval, kl_divergence, negative_log_likelihood, perplexity, top1_agreement
from exporter.model.reference import Reference
from exporter.spec import Precision, Report, Verdict

MEAN_KL_NATS = {
    Precision.FP32: 1e-6,
    Precision.FP16: 1e-4,
    Precision.INT8: 2e-3,
    Precision.INT4: 5e-2,
    Precision.LUT4: 5e-2,
}
"""Budgets by the precision of the body (``docs/decisions/0003-parity-gates.md``)."""

WINDOWS = 16
WINDOW_LENGTH = 256

HEAD_POSITIONS = 1024
"""That have logits at a time, of two references: 2 x 525 MB for a vocabulary of 128,256."""


def evaluation_windows(ids: Sequence[int], *, bos: int | None, context: int) -> list[list[int]]:
    """Up to 16 windows of up to 256 tokens, each headed by the begin token if there is one."""
    head = [] if bos is None else [bos]
    length = min(WINDOW_LENGTH, context) - len(head)
    body = [token for token in ids if token != bos]
    return [head + body[start : start + length] for start in range(0, len(body) - length + 1, length)][:WINDOWS]


def measure_quality(
    windows: Sequence[Sequence[int]],
    *,
    truth: Reference,
    candidates: Mapping[str, Reference],
    budget_nats: float,
    on_layer: Callable[[], None],
) -> dict[str, Report]:
    """A report for each of the ``candidates``, all of them compared with one pass of ``truth``; what is above
    ``budget_nats`` of mean KL has failed. A head of some tokens has all figures over these alone: the model's own
    distribution, of which theirs is the part that is left and made whole again; and perplexity where one of them
    follows.

    Each reference computes one decoder layer for all windows, which have one length, before the next; then all heads
    compute a few windows at a time, whose logits are compared and forgotten. ``on_layer`` is called after each layer of
    each reference.
    """
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    nll: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    agree: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    truth_nll: list[torch.Tensor] = []
    kept = truth.spec.head_tokens
    ids = torch.tensor(windows)  # [W, T]
    at_once = max(1, HEAD_POSITIONS // ids.shape[1])
    exact = truth.before_head(ids, on_layer).split(at_once)
    lossy = {name: candidate.before_head(ids, on_layer).split(at_once) for name, candidate in candidates.items()}
    for part, some in enumerate(ids.split(at_once)):
        expected = truth.head(exact[part])  # [w, T, V]
        truth_nll += [_nll(row, window, kept) for row, window in zip(expected, some, strict=True)]
        for name, candidate in candidates.items():
            got = candidate.head(lossy[name][part])
            for wanted, found, window in zip(expected, got, some, strict=True):
                kl[name].append(kl_divergence(wanted, found))
                nll[name].append(_nll(found, window, kept))
                agree[name].append(top1_agreement(wanted, found))
    reports = {}
    for name in candidates:
        divergence = torch.cat(kl[name])
        low, high = bootstrap_interval(divergence)
        mean = divergence.mean().item()
        passed = mean <= budget_nats
        reports[name] = Report(
            verdict=Verdict.PASSED if passed else Verdict.FAILED,
            reason="" if passed else f"mean KL is {mean:.2g} nats, the budget is {budget_nats:.1g}",
            figures={
                "mean_kl_nats": mean,
                "mean_kl_nats_interval": [low, high],
                "p99_kl_nats": torch.quantile(divergence, 0.99).item(),
                "budget_mean_kl_nats": budget_nats,
                "top1_agreement": torch.cat(agree[name]).double().mean().item(),
                "perplexity": _perplexity(nll[name]),
                "reference_perplexity": _perplexity(truth_nll),
                "positions": len(divergence),
                **({"head_tokens": len(kept)} if kept else {}),
            },
        )
    return reports


def _nll(logits: torch.Tensor, ids: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Of each token of ``ids`` ``[T]`` but the first, by the logits ``[T, V]`` before it; of those alone that are
    ``kept``, where some are."""
    before, after = logits[:-1], ids[1:]
    if kept:
        count = torch.isin(after, torch.tensor(kept))
        before, after = before[count], after[count]
    return negative_log_likelihood(before, after)


def _perplexity(nll: Sequence[torch.Tensor]) -> float | None:
    """None where the text has no token that counts."""
    together = torch.cat([*nll])
    return perplexity(together) if len(together) else None
