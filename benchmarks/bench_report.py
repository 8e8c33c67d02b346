"""The figures of ``benchmarks.bench`` as ``benchmarks.md``: tables, ratios of one run, plots, each aim met or not."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run_once import DECODED, DEPTHS, PROMPTS
from benchmarks.shapes import SHAPES
from benchmarks.variants import VARIANTS
from exporter.checkpoint.config import read_spec
from exporter.spec import ModelSpec
from targets.footprint import footprint

Results = Mapping[str, Any]
RATES = [*(f"prefill {count}" for count in PROMPTS), *(f"decode at {depth}" for depth in DEPTHS)]
GIB = 1 << 30
EXPORT_1B = {"seconds": 30.0, "bytes": 2.5 * GIB, "all_seconds": 60.0}
EXPORT_8B = {"seconds": 240.0, "bytes": 10.0 * GIB}
TARGETS = ("onnxruntime", "executorch", "coreml")
BARE_WORKER = (150 << 20, 80 << 20)
"""Anonymous and mapped memory of ExecuTorch's process, but for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One of ours and what it is compared with."""

    ours: str
    peer: str
    note: str = ""
    aimed_at: bool = True
    """Whether the peer has our runtime and stores its weights as this one of ours does."""


PAIRS = (
    Pair(ours="ours: onnxruntime: int4", peer="genai: ours"),
    Pair(ours="ours: executorch: int4", peer="export_llama: ours"),
    Pair(
        ours="ours: onnxruntime: int4, head int4",
        peer="genai: ships",
        note="the peer computes the head for every token of a prompt, ours for the last",
    ),
    Pair(ours="ours: executorch: int4, head int4", peer="export_llama: ships"),
    Pair(ours="ours: onnxruntime: int4", peer="llama.cpp: Q4_0", aimed_at=False),
    Pair(ours="ours: executorch: int4", peer="llama.cpp: Q4_0", aimed_at=False),
    Pair(ours="ours: onnxruntime: int8", peer="llama.cpp: Q8_0", aimed_at=False),
    Pair(ours="ours: executorch: int8", peer="llama.cpp: Q8_0", aimed_at=False),
    # A longer cache, and the same depth in it:
    Pair(ours="ours: onnxruntime: int4, context 4096", peer="ours: onnxruntime: int4", aimed_at=False),
    Pair(ours="ours: executorch: int4, context 4096", peer="ours: executorch: int4", aimed_at=False),
)


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Weights of the body and of the head, which a decoded token reads once each."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * heads * hidden + 2 * shared * hidden + 3 * config["intermediate_size"] * hidden
    return {"body": config["num_hidden_layers"] * layer, "head": config["vocab_size"] * hidden}


def write(results: Results, *, out: Path | None) -> str:
    """The report; with ``out`` also ``benchmarks.md`` and its plots in that folder."""
    sizes = {size: record for size, record in results.items() if "runs" in record}
    lines = [
        "# Real shapes\n",
        "Made by `make bench` (`benchmarks/bench.py`): random checkpoints with the shapes of Llama-3.2-1B, 3.2-3B and "
        "3.1-8B, so only speed, size, memory and time mean anything. Exports start from the checkpoint on disk, with "
        "nothing kept from before, and round to nearest; nothing is proven in them. Tokens per second are medians, "
        f"with the least and the most in brackets: prompts of {' and '.join(map(str, PROMPTS))} tokens, and {DECODED} "
        f"tokens decoded with {' and '.join(map(str, DEPTHS))} in the cache. One process per run, ours and peers in "
        "turn. `ships`: as the tool does it by default; `ours`: with our scheme, int4 in groups of 32 and an int8 "
        "head. The limit is the best of the kernels that read memory, over the bytes of weights that a decoded token "
        "has to read. Memory of ONNX Runtime is what it adds to its process; that of ExecuTorch is all of a process "
        "of its own, which has torch in it; that of llama.cpp is all of llama-bench. Core ML runs on Apple's systems "
        "only: its packages are not run here.\n",
    ]
    for size, record in sizes.items():
        lines += [f"## {size.upper()}\n", *_machine(record)]
        lines += ["\n### Export\n", *_exports(record), "\n### Speed and memory\n", *_runs(record)]
        ratios = list(_ratios(record))
        lines += ["\n### Ratios\n", *ratios] if ratios else []
        if out:
            lines.append(f"\n![tokens per second, {size}](benchmarks-{size}.svg)\n")
    lines += ["\n## Growth with the model\n", *growth] if (growth := list(_growth(sizes))) else []
    lines += ["\n## Memory as `llama-export plan` foresees it\n", *_foreseen(sizes)]
    lines += ["\n## What was aimed at\n", *_aims(sizes)]
    text = "\n".join(lines) + "\n"
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for size, record in sizes.items():
            _plot(record, out / f"benchmarks-{size}.svg")
        (out / "benchmarks.md").write_text(text, encoding="utf-8")
    return text


def _machine(record: Results) -> Iterator[str]:
    told = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in told.items() if name not in ("processor", "system"))
    yield f"- {told['processor']}; {told['system']}; {versions}"
    for threads, kernels in record["bandwidth"].items():
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in kernels.items())
        yield f"- reading memory with {_threads(threads)}, GB/s: {rates}"
    if record.get("remark"):
        yield f"- {record['remark']}"


def _threads(count: str) -> str:
    return f"{count} thread{'' if count == '1' else 's'}"


def _exports(record: Results) -> Iterator[str]:
    yield "| export | MB | seconds | peak GiB, anonymous (mapped) | by stage: seconds, anonymous GiB |"
    yield "|-|-:|-:|-:|-|"
    for name, told in record["exports"].items():
        if "failed" in told:
            yield f"| ours, {name} | | failed: {_cell(told['failed'])} | | |"
            continue
        each = "; ".join(
            f"{stage} {figures['seconds']:.1f}"
            + (f", {figures['anonymous_bytes'] / GIB:.2f}" if "anonymous_bytes" in figures else "")
            for stage, figures in told["stages"].items()
        )
        sizes = ", ".join(f"{target} {size / 1e6:.0f}" for target, size in told["artifact_bytes"].items())
        peak = f"{export_peak(told) / GIB:.2f} ({export_peak(told, 'mapped_bytes') / GIB:.2f})"
        yield f"| ours, {name} | {sizes} | {told['seconds']:.1f} | {peak} | {each} |"
    for name, told in record.get("peers", {}).items():
        if "failed" in told:
            yield f"| {name} | | failed: {_cell(told['failed'])} | | |"
            continue
        size = f"{told['artifact_bytes'] / 1e6:.0f}" if "artifact_bytes" in told else ""
        peak = f"{told['anonymous_bytes'] / GIB:.2f} ({told['mapped_bytes'] / GIB:.2f})"
        yield f"| {name} | {size} | {told['seconds']:.1f} | {peak} | {told['version']}, {_options(told['options'])} |"


def _options(options: Any) -> str:
    if isinstance(options, Mapping):
        options = [f"{name} {value}" for name, value in options.items()]
    return _cell("; ".join(map(str, options)) or "no options")


def _cell(text: str) -> str:
    return text.replace("|", "/")


def export_peak(told: Results, kind: str = "anonymous_bytes") -> int:
    """Of all stages of one of our exports."""
    peak: int = max(stage.get(kind, 0) for stage in told["stages"].values())
    return peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All runs of one artifact with so many threads, taken together."""

    rates: Mapping[str, list[float]]
    load_s: float | None
    loaded_bytes: tuple[int, int] | None
    """Anonymous and mapped."""
    peak_bytes: tuple[int, int]
    failures: tuple[str, ...]


def together(record: Results, name: str, threads: str) -> Run | None:
    """None where no run went well."""
    every = record["runs"].get(name, {}).get("by_threads", {}).get(threads, [])
    good = [told for told in every if "failed" not in told]
    if not good:
        return None
    return Run(
        rates={rate: [one for told in good for one in told["tokens_per_s"][rate]] for rate in RATES},
        load_s=statistics.median(told["load_s"] for told in good) if "load_s" in good[0] else None,
        loaded_bytes=_most(good, "loaded_bytes") if "loaded_bytes" in good[0] else None,
        peak_bytes=_most(good, "peak_bytes"),
        failures=tuple(told["failed"] for told in every if "failed" in told),
    )


def _most(runs: Iterable[Results], when: str) -> tuple[int, int]:
    """What the runtime held at most, anonymous and mapped, beyond what its process held before."""
    anonymous, mapped = zip(
        *((told[when][kind] - told["idle_bytes"][kind] for kind in (0, 1)) for told in runs), strict=True
    )
    return max(anonymous), max(mapped)


def _runs(record: Results) -> Iterator[str]:
    yield (
        f"| run | threads | load s | {' | '.join(RATES)} | share of the limit | GiB after loading, anonymous + mapped "
        "| peak GiB |"
    )
    yield "|-|-:|-:|" + "-:|" * (len(RATES) + 3)
    for name, told in record["runs"].items():
        for threads in sorted(told["by_threads"]):
            run = together(record, name, threads)
            if run is None:
                failure = _cell(told["by_threads"][threads][-1]["failed"])
                yield f"| {name} | {threads} | failed: {failure} |" + " |" * (len(RATES) + 3)
                continue
            rates = " | ".join(_spread(run.rates[rate]) for rate in RATES)
            load = "not measured" if run.load_s is None else f"{run.load_s:.1f}"
            loaded = "not measured" if run.loaded_bytes is None else _held(run.loaded_bytes)
            note = f" ({len(run.failures)} more failed: {_cell(run.failures[-1])})" if run.failures else ""
            yield (
                f"| {name}{note} | {threads} | {load} | {rates} | {_share(record, name, threads, run):.0%} | {loaded} "
                f"| {_held(run.peak_bytes)} |"
            )


def _share(record: Results, name: str, threads: str, run: Run) -> float:
    """Of the tokens per second at which memory could be read, what decoding reaches with an empty cache."""
    limit: float = max(record["bandwidth"][threads].values()) / record["runs"][name]["bytes_per_token"]
    return statistics.median(run.rates[f"decode at {DEPTHS[0]}"]) / limit


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def _held(held: tuple[int, int]) -> str:
    return f"{held[0] / GIB:.2f} + {held[1] / GIB:.2f}"


def ratios(record: Results, pair: Pair) -> dict[str, float] | None:
    """Our median over the peer's with two threads, by rate; None where one of them was not measured."""
    ours, peer = (together(record, name, "2") for name in (pair.ours, pair.peer))
    if ours is None or peer is None:
        return None
    return {rate: statistics.median(ours.rates[rate]) / statistics.median(peer.rates[rate]) for rate in RATES}


def _title(record: Results, pair: Pair) -> str:
    apart = len({record["runs"][name]["measured"] for name in (pair.ours, pair.peer)}) > 1
    notes = "; ".join(filter(None, [pair.note, "not measured in the same run" if apart else ""]))
    return f"{pair.ours.removeprefix('ours: ')} over {pair.peer}" + (f" ({notes})" if notes else "")


def _ratios(record: Results) -> Iterator[str]:
    found = [(pair, rates) for pair in PAIRS if (rates := ratios(record, pair))]
    if found:
        yield f"| two threads: ours over the peer | {' | '.join(RATES)} |"
        yield "|-|" + "-:|" * len(RATES)
    for pair, rates in found:
        yield f"| {_title(record, pair)} | " + " | ".join(f"{rates[rate]:.2f}" for rate in RATES) + " |"


def _growth(sizes: Results) -> Iterator[str]:
    """Of the int4 exports, from the smallest size to the others."""
    exported = {size: record for size, record in sizes.items() if record["exports"]}
    if len(exported) < 2:
        return
    first = min(exported, key=lambda size: exported[size]["parameters"])
    yield f"| int4 export, times that of {first} | parameters | {' | '.join(f'{t}: s, GiB' for t in TARGETS)} |"
    yield "|-|-:|" + "-:|" * len(TARGETS)
    for size, record in exported.items():
        cells = []
        for target in TARGETS:
            one, other = (r["exports"].get(f"int4: {target}", {}) for r in (exported[first], record))
            if "stages" not in one or "stages" not in other:
                cells.append("not measured")
                continue
            cells.append(f"{other['seconds'] / one['seconds']:.1f}, {export_peak(other) / export_peak(one):.1f}")
        yield f"| {size} | {record['parameters'] / exported[first]['parameters']:.1f} | {' | '.join(cells)} |"


def _foreseen(sizes: Results) -> Iterator[str]:
    """Of ours, beside what a run held at most."""
    yield (
        "At most that a run held with two threads, anonymous and mapped, beside the sum that is foreseen from the "
        f"model's shapes (`targets/footprint.py`). {sum(BARE_WORKER) >> 20} MiB are taken off for ExecuTorch's process "
        "with torch in it, as measured with a model of 3 MB.\n"
    )
    yield "| artifact | measured, MiB | foreseen, MiB | foreseen / measured |"
    yield "|-|-:|-:|-:|"
    for size, record in sizes.items():
        for name in record["runs"]:
            run, (whose, _, told) = together(record, name, "2"), name.partition(": ")
            runtime, _, variant = told.partition(": ")
            if whose != "ours" or run is None or size not in SHAPES:
                continue
            how = VARIANTS[variant]
            sum_bytes = footprint(
                runtime, spec_of(SHAPES[size]), how.scheme, context=how.context, prefer=how.prefer
            ).memory_bytes
            held = sum(run.peak_bytes) - (sum(BARE_WORKER) if runtime == "executorch" else 0)
            yield f"| {size}: {told} | {held / 2**20:,.0f} | {sum_bytes / 2**20:,.0f} | {sum_bytes / held:.3f} |"


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Of a ``config.json``'s content."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return read_spec(Path(folder))


def _aims(sizes: Results) -> Iterator[str]:
    for size, record in sizes.items():
        for pair in PAIRS:
            yield from _aims_of_pair(size, record, pair)
    yield from _aims_of_exports("1b", sizes.get("1b"), EXPORT_1B)
    yield from _aims_of_exports("8b", sizes.get("8b"), EXPORT_8B)


def _aims_of_pair(size: str, record: Results, pair: Pair) -> Iterator[str]:
    found = ratios(record, pair)
    if found is None:
        if pair.aimed_at and (pair.ours in record["runs"] or pair.peer in record["runs"]):
            yield f"- not measured: {size}, {pair.ours.removeprefix('ours: ')} over {pair.peer}"
        return
    title = f"{size}, {_title(record, pair)}"
    if not pair.aimed_at:
        yield f"- {title}: {', '.join(f'{rate} {found[rate]:.2f}' for rate in RATES)}; a figure, not an aim"
        return
    for rate in RATES:
        text = f"{title}, {rate}: {found[rate]:.2f}, at least 1 was aimed at"
        yield _aim(text, missed_by=1 - found[rate])
    held = [together(record, name, "2") for name in (pair.ours, pair.peer)]
    ours, peer = (sum(run.peak_bytes) / GIB for run in held if run)
    text = f"{title}, runtime memory: {ours:.2f} GiB, no more than {peer:.2f} was aimed at"
    yield _aim(text, missed_by=ours / peer - 1)


def _aims_of_exports(size: str, record: Results | None, limits: Mapping[str, float]) -> Iterator[str]:
    if record is None:
        yield f"- not measured: {size}, exports"
        return
    for target in TARGETS:
        told = record["exports"].get(f"int4: {target}", {"failed": "not measured"})
        if "failed" in told:
            yield f"- **missed**: {size}, int4 export for {target}: {told['failed']}"
            continue
        seconds, peak = told["seconds"], export_peak(told)
        text = f"{size}, int4 export for {target}: {seconds:.1f} s, at most {limits['seconds']:.0f} were aimed at"
        yield _aim(text, missed_by=seconds / limits["seconds"] - 1)
        text = f"{size}, int4 export for {target}: {peak / GIB:.2f} GiB, at most {limits['bytes'] / GIB:.1f} aimed at"
        yield _aim(text, missed_by=peak / limits["bytes"] - 1)
    if "all_seconds" in limits:
        told = record["exports"].get(f"int4: {','.join(TARGETS)}", {"failed": "not measured"})
        if "failed" in told:
            yield f"- **missed**: {size}, all three in one process: {told['failed']}"
            return
        text = (
            f"{size}, all three in one process: {told['seconds']:.1f} s, at most {limits['all_seconds']:.0f} aimed at"
        )
        yield _aim(text, missed_by=told["seconds"] / limits["all_seconds"] - 1)


def _aim(text: str, *, missed_by: float) -> str:
    """``missed_by``: as a share of the limit; 0 or less is met."""
    return f"- met: {text}" if missed_by <= 0 else f"- **missed** by {missed_by:.1%}: {text}"


def _plot(record: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bench"
    figure, axes = plt.subplots(1, len(RATES), figsize=(4.5 * len(RATES), 4.5), sharey=True)
    runs = {name: run for name in record["runs"] if (run := together(record, name, "2"))}
    colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in runs]
    for axis, rate in zip(axes, RATES, strict=True):
        spread = [run.rates[rate] for run in runs.values()]
        medians = [statistics.median(rates) for rates in spread]
        ends = [[m - min(r) for m, r in zip(medians, spread, strict=True)]]
        ends += [[max(r) - m for m, r in zip(medians, spread, strict=True)]]
        axis.barh(list(runs), medians, xerr=ends, color=colours)
        axis.set_title(f"{rate}, tokens/s, 2 threads")
    axes[0].invert_yaxis()  # of all, since they share it
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
