"""The figures of ``benchmarks.bench`` as ``benchmarks.md``: tables, ratios of one run, plots, each aim met or not."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.run_once import DEPTHS, PROMPTS

Results = Mapping[str, Any]
RATES = [*(f"prefill {count}" for count in PROMPTS), *(f"decode at {depth}" for depth in DEPTHS)]
PAIRS = [
    ("onnxruntime", "int4", "genai: ours"),
    ("executorch", "int4", "export_llama: ours"),
    ("onnxruntime", "int4, head int4", "genai: ships"),
    ("executorch", "int4, head int4", "export_llama: ships"),
]
"""Runtime, our variant, and the peer that stores its weights alike."""
LONG_PAIRS = [
    (f"ours: {runtime}: int4, context 4096", f"ours: {runtime}: int4") for runtime in ("onnxruntime", "executorch")
]
"""A longer cache, and the same depth in it."""
GIB = 1 << 30
EXPORT_1B = {"seconds": 30.0, "bytes": 2.5 * GIB, "all_seconds": 60.0}
EXPORT_8B = {"seconds": 240.0, "bytes": 10.0 * GIB}


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Weights of the body and of the head, which a decoded token reads once each."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * heads * hidden + 2 * shared * hidden + 3 * config["intermediate_size"] * hidden
    return {"body": config["num_hidden_layers"] * layer, "head": config["vocab_size"] * hidden}


def write(results: Results, *, out: Path | None) -> str:
    """The report; with ``out`` also ``benchmarks.md`` and its plots in that folder."""
    lines = [
        "# Real shapes\n",
        f"Made by `make bench` (`benchmarks/bench.py`) on {platform.machine()}: random checkpoints with the shapes of "
        "Llama-3.2-1B, 3.2-3B and 3.1-8B, so only speed, size, memory and time mean anything. Exports start from the "
        "checkpoint on disk and round to nearest; nothing is proven in them. Tokens per second are medians, with "
        "the least and the most in brackets; one process per run, ours and peers in turn. `ships`: as the tool does "
        "it by default; `ours`: with our scheme, int4 in groups of 32 and an int8 head. Memory of ONNX Runtime is what "
        "it adds to its process, that of ExecuTorch all of a process of its own, which has torch in it.\n",
    ]
    for size, record in results.items():
        lines += [f"## {size.upper()}\n", *_machine(record), *_exports(record), *_runs(record), *_ratios(record)]
    lines += ["## What was aimed at\n", *_aims(results)]
    text = "\n".join(lines)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for size, record in results.items():
            _plot(record, out / f"benchmarks-{size}.svg")
            text += f"\n![tokens per second, {size}](benchmarks-{size}.svg)\n"
        (out / "benchmarks.md").write_text(text + "\n", encoding="utf-8")
    return text


def _machine(record: Results) -> Iterator[str]:
    for threads, kernels in record["bandwidth"].items():
        told = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in kernels.items())
        yield f"- reading memory with {threads} threads, GB/s: {told}"
    yield ""


def _exports(record: Results) -> Iterator[str]:
    yield "| export | MB | seconds | peak anonymous GiB (mapped) | by stage: seconds, anonymous GiB |"
    yield "|-|-:|-:|-:|-|"
    for name, told in record["exports"].items():
        if "failed" in told:
            yield f"| ours, {name} | | failed: {told['failed']} | | |"
            continue
        stages = {stage: figures for stage, figures in told["stages"].items() if "anonymous_bytes" in figures}
        each = "; ".join(f"{k} {v['seconds']:.1f}, {v['anonymous_bytes'] / GIB:.2f}" for k, v in stages.items())
        sizes = ", ".join(f"{target} {size / 1e6:.0f}" for target, size in told["artifact_bytes"].items())
        anonymous, mapped = (
            max(v[kind] for v in stages.values()) / GIB for kind in ("anonymous_bytes", "mapped_bytes")
        )
        yield f"| ours, {name} | {sizes} | {told['seconds']:.1f} | {anonymous:.2f} ({mapped:.2f}) | {each} |"
    for name, told in record["peers"].items():
        if "failed" in told:
            yield f"| {name} | | failed: {told['failed']} | | |"
            continue
        size = f"{told['artifact_bytes'] / 1e6:.0f}" if "artifact_bytes" in told else ""
        peak = f"{told['anonymous_bytes'] / GIB:.2f} ({told['mapped_bytes'] / GIB:.2f})"
        if name.startswith("llama.cpp"):
            peak = "not measured: in programs that it starts"
        yield f"| {name} | {size} | {told['seconds']:.1f} | {peak} | {told['version']}, {told['options']} |"
    yield ""


def _runs(record: Results) -> Iterator[str]:
    yield f"| run | threads | load s | {' | '.join(RATES)} | share of the limit | GiB after loading | peak GiB |"
    yield "|-|-:|-:|" + "-:|" * (len(RATES) + 3)
    for name, run in record["runs"].items():
        for threads, told in sorted((key, value) for key, value in run.items() if key != "bytes_per_token"):
            if "failed" in told:
                yield f"| {name} | {threads} | failed: {told['failed']} |" + " |" * (len(RATES) + 3)
                continue
            rates = " | ".join(_spread(told["tokens_per_s"][rate]) for rate in RATES)
            limit = max(record["bandwidth"][threads].values()) / run["bytes_per_token"]
            share = statistics.median(told["tokens_per_s"]["decode at 0"]) / limit
            memory = "not measured | not measured"
            if "peak_bytes" in told:
                memory = " | ".join(_added(told[when], told["idle_bytes"]) for when in ("loaded_bytes", "peak_bytes"))
            load = f"{told['load_s']:.1f}" if "load_s" in told else ""
            yield f"| {name} | {threads} | {load} | {rates} | {share:.0%} | {memory} |"
    yield "\nCore ML runs on Apple's systems only: not measured here.\n"


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def _added(held: list[int], idle: list[int]) -> str:
    """Anonymous and mapped, beyond what the process held before."""
    return " + ".join(f"{(now - before) / GIB:.2f}" for now, before in zip(held, idle, strict=True))


def ratio(record: Results, ours: str, peer: str, rate: str) -> float | None:
    """Our median over the peer's, with two threads; None where one of them is not there."""
    medians = [_median(record, name, rate) for name in (ours, peer)]
    return None if None in medians else medians[0] / medians[1]  # type: ignore[operator]


def _median(record: Results, name: str, rate: str) -> float | None:
    rates = record["runs"].get(name, {}).get("2", {}).get("tokens_per_s", {}).get(rate)
    return statistics.median(rates) if rates else None


def _ratios(record: Results) -> Iterator[str]:
    rows = [(f"ours: {runtime}: {variant}", peer) for runtime, variant, peer in PAIRS]
    rows += [(f"ours: {runtime}: int4", "llama.cpp: ships") for runtime in ("onnxruntime", "executorch")]
    rows += LONG_PAIRS
    rows = [(ours, peer) for ours, peer in rows if ratio(record, ours, peer, RATES[0]) is not None]
    if not rows:
        return
    yield f"| two threads: ours over the peer | {' | '.join(RATES)} |"
    yield "|-|" + "-:|" * len(RATES)
    for ours, peer in rows:
        yield (
            f"| {ours.removeprefix('ours: ')} over {peer} | "
            + " | ".join(f"{ratio(record, ours, peer, rate) or math.nan:.2f}" for rate in RATES)
            + " |"
        )
    yield ""


def _aims(results: Results) -> Iterator[str]:
    for size, record in results.items():
        for runtime, variant, peer in PAIRS:
            for rate in RATES:
                found = ratio(record, f"ours: {runtime}: {variant}", peer, rate)
                if found is not None:
                    yield _aim(f"{size}, {runtime}, {variant}, {rate}: {found:.2f} x {peer}; at least 1", found >= 1.0)
            held = [_peak(record, name) for name in (f"ours: {runtime}: {variant}", peer)]
            if None not in held:
                text = (
                    f"{size}, {runtime}, {variant}: runtime memory {held[0] / GIB:.2f} GiB, {peer} {held[1] / GIB:.2f}"  # type: ignore[operator]
                )
                yield _aim(f"{text}; no more", held[0] <= held[1])  # type: ignore[operator]
    for size, limits in (("1b", EXPORT_1B), ("8b", EXPORT_8B)):
        exports = results.get(size, {}).get("exports", {})
        for target in ("onnxruntime", "executorch", "coreml"):
            told = exports.get(f"int4: {target}", {})
            if "stages" in told:
                peak = max(stage.get("anonymous_bytes", 0) for stage in told["stages"].values())
                text = f"{size}, export for {target}: {told['seconds']:.1f} s and {peak / GIB:.2f} GiB; at most "
                text += f"{limits['seconds']:.0f} s and {limits['bytes'] / GIB:.1f} GiB"
                yield _aim(text, told["seconds"] <= limits["seconds"] and peak <= limits["bytes"])
    together = results.get("1b", {}).get("exports", {}).get("int4: onnxruntime,executorch,coreml", {})
    if "seconds" in together:
        limit = EXPORT_1B["all_seconds"]
        text = f"1b, all three together: {together['seconds']:.1f} s; at most {limit:.0f} s"
        yield _aim(text, together["seconds"] <= limit)
    yield ""


def _peak(record: Results, name: str) -> int | None:
    told = record["runs"].get(name, {}).get("2", {})
    return sum(told["peak_bytes"]) - sum(told["idle_bytes"]) if "peak_bytes" in told else None


def _aim(text: str, met: bool) -> str:
    return f"- {'met' if met else '**missed**'}: {text}"


def _plot(record: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bench"
    figure, axes = plt.subplots(1, len(RATES), figsize=(4.5 * len(RATES), 4.5), sharey=True)
    names = [name for name, run in record["runs"].items() if "tokens_per_s" in run.get("2", {})]
    colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
    for axis, rate in zip(axes, RATES, strict=True):
        spread = [record["runs"][name]["2"]["tokens_per_s"][rate] for name in names]
        medians = [statistics.median(rates) for rates in spread]
        ends = [[m - min(r) for m, r in zip(medians, spread, strict=True)]]
        ends += [[max(r) - m for m, r in zip(medians, spread, strict=True)]]
        axis.barh(names, medians, xerr=ends, color=colours)
        axis.set_title(f"{rate}, tokens/s, 2 threads")
        axis.invert_yaxis() if rate == RATES[0] else None
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
