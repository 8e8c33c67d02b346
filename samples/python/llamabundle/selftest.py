"""Whether the artifact answers here as its reference did, by the rules of ``docs/bundle.md``, and how fast."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamabundle.assistant import Assistant
from llamabundle.bundle import Bundle, Goldens
from llamabundle.model import Model
from llamabundle.text import GOLDEN_DATE, Text

SCHEMA = "llama-export/device-report/1"
APP = "llama-export samples/python 0.1.0"
CLEAR_MARGIN = 0.25
"""In logits: nearer than that, another processor may rightly choose otherwise."""
LEAST_REST = 1e-12
"""Of probability that the kept tokens leave over: float32 logits know no less."""
PROMPT_TOKENS, DECODED_TOKENS, RUNS = 128, 32, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """``report`` is what ``llama-export validate BUNDLE --device-report`` reads; ``faults`` are sentences, none of them
    where it passes."""

    report: dict[str, Any]
    faults: list[str]

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")
        part.replace(path)


def self_test(assistant: Assistant) -> SelfTest:
    """Answer the bundle's own questions and compare. Leaves the cache empty."""
    bundle, model, text = assistant.bundle, assistant.model, assistant.text
    goldens = bundle.goldens()
    report = {
        "schema": SCHEMA,
        "manifest_sha256": bundle.manifest_sha256,
        "device": {
            "model": platform.processor() or platform.machine(),
            "os": platform.platform(),
            "runtime": model.runtime,
            "app": APP,
        },
        "parity": compare(goldens, answer_goldens(model, goldens)),
        "greedy": _greedy(model, goldens),
        "chats": _chats(text, goldens),
        "latency": _latency(model, goldens, bundle),
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    model.rewind(0)
    return SelfTest(report=report, faults=find_faults(report, bundle))


def find_faults(report: dict[str, Any], bundle: Bundle) -> list[str]:
    """What a report misses of the gates that the export had to keep; a figure that is not a number misses its own."""
    parity, greedy, chats = report["parity"], report["greedy"], report["chats"]
    gates = bundle.manifest["parity"]
    faults = []
    for name, what in (("mean_kl_nats", "mean KL"), ("worst_kl_nats", "KL at the worst position")):
        found, most = parity[name], gates[f"gate_{name}"]
        if not found <= most:
            faults.append(f"{what} is {found:.2g} nats, at most {most:.2g} was expected")
    least = gates["gate_decided_top1_agreement"]
    if not parity["decided_top1_agreement"] >= least:
        found = f"{parity['decided_top1_agreement']:.2%}"
        faults.append(f"the first choice is the reference's at {found} of decided positions, {least:.1%} was expected")
    for counts, what in ((greedy, "greedy tokens"), (chats, "chats")):
        if counts and counts["agreeing"] < counts["compared"]:
            wrong = counts["compared"] - counts["agreeing"]
            faults.append(f"{wrong} of {counts['compared']} {what} are not the reference's")
    return faults


def answer_goldens(model: Model, goldens: Goldens) -> NDArray[np.float32]:
    """Logits ``[m, V]``: two prefills, the second one twice to see that going back works, then token by token."""
    first, second = goldens.prefills
    ids = goldens.ids
    model.rewind(0)
    rows = [model.feed(ids[:first])]
    model.feed(ids[first : first + second])
    model.rewind(first)
    rows.append(model.feed(ids[first : first + second]))
    rows += [model.feed([token]) for token in ids[first + second :]]
    return np.stack(rows)


def compare(goldens: Goldens, logits: NDArray[np.float32]) -> dict[str, Any]:
    """The figures of parity of logits ``[m, V]``."""
    got = logits.astype(np.float64)
    best = got.max(axis=1, keepdims=True)
    log_q = got - best - np.log(np.exp(got - best).sum(axis=1, keepdims=True))
    log_q = np.take_along_axis(log_q, goldens.top_ids.astype(np.int64), axis=1)  # [m, k]
    log_p = goldens.top_logits.astype(np.float64) - goldens.logsumexp.astype(np.float64)[:, None]
    rest_p, rest_q = (np.maximum(1 - np.exp(kept).sum(axis=1), LEAST_REST) for kept in (log_p, log_q))
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q), 0)

    same = logits.argmax(axis=1) == goldens.top_ids[:, 0]
    highest, next_one = goldens.top_logits[:, 0], goldens.top_logits[:, 1]
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(highest), 2.0**-14))) - 10)  # of fp16 at that magnitude
    decided = highest - next_one > 2 * spacing
    kept = np.take_along_axis(logits, goldens.top_ids.astype(np.int64), axis=1)
    return {
        "positions": len(logits),
        "mean_kl_nats": float(kl.mean()),
        "worst_kl_nats": float(kl.max()),
        "top1_agreement": float(same.mean()),
        "decided_top1_agreement": float(same[decided].mean()) if decided.any() else 1.0,
        "decided_positions": int(decided.sum()),
        "max_abs_logit_diff": float(np.abs(kept - goldens.top_logits).max()),
    }


def _greedy(model: Model, goldens: Goldens) -> dict[str, int]:
    """Each golden prompt continued, as far as the reference's choices are clear."""
    compared = agreeing = 0
    for prompt in goldens.prompts:
        model.rewind(0)
        logits = model.feed(prompt["ids"])
        for token, margin in zip(prompt["greedy_ids"], prompt["greedy_margins"], strict=True):
            if margin < CLEAR_MARGIN:
                break
            compared += 1
            if int(logits.argmax()) != token:
                break
            agreeing += 1
            if not model.room:
                break
            logits = model.feed([token])
    return {"prompts": len(goldens.prompts), "compared": compared, "agreeing": agreeing}


def _chats(text: Text, goldens: Goldens) -> dict[str, int] | None:
    """Golden renders by template and tokenizer; None where the bundle has none."""
    if not goldens.chats:
        return None
    return {"compared": len(goldens.chats), "agreeing": sum(_agrees(text, chat) for chat in goldens.chats)}


def _agrees(text: Text, chat: dict[str, Any]) -> bool:
    try:
        rendered = text.render_text(chat["messages"], date=GOLDEN_DATE)
    except ValueError:
        return False
    same: bool = rendered == chat["text"] and text.encode(rendered, bare=False) == chat["ids"]
    return same


def _latency(model: Model, goldens: Goldens, bundle: Bundle) -> dict[str, float | int | None]:
    """One warm-up and three counted runs; each time is that of the whole call, as the program sees it."""
    prompt = goldens.ids[: min(PROMPT_TOKENS, bundle.context // 2)]
    decoded = goldens.ids[len(prompt) :][: min(DECODED_TOKENS, bundle.context - len(prompt))]
    reads, writes = [], []
    for run in range(RUNS + 1):
        model.rewind(0)
        started = time.perf_counter()
        model.feed(prompt)
        read = time.perf_counter()
        for token in decoded:
            model.feed([token])
        if run > 0:
            reads.append(read - started)
            writes.append(time.perf_counter() - read)
    return {
        "load_s": model.load_s,
        "time_to_first_token_ms": 1e3 * statistics.median(reads),
        "prefill_tokens_per_s": len(prompt) / statistics.median(reads),
        "decode_tokens_per_s": len(decoded) / statistics.median(writes) if decoded else None,
        "prompt_tokens": len(prompt),
        "decoded_tokens": len(decoded),
        "threads": model.threads,
        "runs": RUNS,
    }


def _peak_memory_bytes() -> int | None:
    """The most that this process has held; None on Windows, which has other means."""
    if os.name == "nt":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
