"""The latency figures: load, first token, prefill and decode, on this host, as medians with their spread."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence

from exporter.spec import Report, Verdict
from targets.base import Runner

DECODE_STEPS = "decode_steps_ms"
"""The figure that is a list for a plot: every decoded token of every counted run, in order."""

RUNS = 5
PROMPT_TOKENS = 128
DECODED_TOKENS = 32


def measure_latency(runner: Runner, ids: Sequence[int], *, context: int, threads: int) -> Report:
    """One warm-up and five counted runs of a prefill and some decoding, on ``ids`` as far as ``context`` has room."""
    prompt = ids[: min(PROMPT_TOKENS, context // 2)]
    decoded = ids[len(prompt) :][: min(DECODED_TOKENS, context - len(prompt))]
    first_token_s, prefill_rates, decode_rates, steps_ms = [], [], [], list[float]()
    for run in range(RUNS + 1):
        runner.rewind(0)
        runner.feed(prompt)
        prefill_s = sum(runner.steps_s)
        runner.feed_each(decoded)
        if run > 0:
            first_token_s.append(prefill_s)
            prefill_rates.append(len(prompt) / prefill_s)
            decode_rates.append(len(decoded) / sum(runner.steps_s))
            steps_ms += [1e3 * step_s for step_s in runner.steps_s]
    return Report(
        verdict=Verdict.PASSED,
        figures={
            "load_s": runner.load_s,
            "time_to_first_token_ms": 1e3 * statistics.median(first_token_s),
            "prefill_tokens_per_s": statistics.median(prefill_rates),
            "prefill_tokens_per_s_range": [min(prefill_rates), max(prefill_rates)],
            "decode_tokens_per_s": statistics.median(decode_rates),
            "decode_tokens_per_s_range": [min(decode_rates), max(decode_rates)],
            DECODE_STEPS: [float(f"{step_ms:.3g}") for step_ms in steps_ms],
            "prompt_tokens": len(prompt),
            "decoded_tokens": len(decoded),
            "threads": threads,
            "runs": RUNS,
            "host": host(),
        },
    )


def not_measured(reason: str) -> Report:
    """A latency that nobody measured, with every figure absent and the reason given."""
    absent = dict.fromkeys(
        ("load_s", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "threads", "runs")
    )
    return Report(verdict=Verdict.NOT_MEASURED, reason=reason, figures={**absent, "host": host()})


def host() -> str:
    """The operating system, its release and the processor architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"
