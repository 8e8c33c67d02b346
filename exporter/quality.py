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

MEAN_KL_NATS = {Precision.FP32: 1e-6, Precision.FP16: 1e-4, Precision.INT8: 2e-3, Precision.INT4: 5e-2}
"""Budgets by the precision of the body (``docs/decisions/0003-parity-gates.md``)."""

WINDOWS = 16
WINDOW_LENGTH = 256


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
    on_window: Callable[[int, int], None],
) -> dict[str, Report]:
    """A report for each of the ``candidates``, all of them compared with one pass of ``truth``; what is above
    ``budget_nats`` of mean KL has failed."""
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    nll: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    agree: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    truth_nll = []
    for done, window in enumerate(windows, start=1):
        targets = torch.tensor(window[1:])
        expected = _logits(truth, window)
        truth_nll.append(negative_log_likelihood(expected[:-1], targets))
        for name, candidate in candidates.items():
            got = _logits(candidate, window)
            kl[name].append(kl_divergence(expected, got))
            nll[name].append(negative_log_likelihood(got[:-1], targets))
            agree[name].append(top1_agreement(expected, got))
        on_window(done, len(windows))
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
                "perplexity": perplexity(torch.cat(nll[name])),
                "reference_perplexity": perplexity(torch.cat(truth_nll)),
                "positions": len(divergence),
            },
        )
    return reports


def _logits(reference: Reference, window: Sequence[int]) -> torch.Tensor:
    reference.rewind(0)
    return reference.feed(window)
