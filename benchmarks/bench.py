"""``make bench``: real shapes, ours and what a user would take instead, measured in one run.

Random checkpoints with the shapes of Llama-3.2-1B, 3.2-3B and 3.1-8B are exported and run; so are the peers, on the
same files. Each export and each run is a process of its own; runs of ours and of peers alternate. Records are kept in
``benchmarks/.cache/bench/results.json``, step by step, so that ``--sizes`` and ``--peers`` can add to them and a run
that is cut short loses nothing; what a peer has exported is kept as well, since one of them takes minutes.
``--sizes toy`` is for work on the benchmark itself: two layers, a small vocabulary, a file of results of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import bench_report
from benchmarks.machine import describe, read_bandwidth
from benchmarks.peers import CONTEXT, SCHEMES
from benchmarks.processes import ProgramError, available_bytes, run
from benchmarks.rivals import CACHE, RivalError
from benchmarks.shapes import SHAPES, write_random
from benchmarks.variants import PREFILL, VARIANTS
from exporter.checkpoint.config import read_spec
from targets.footprint import footprint

FOLDER = CACHE / "bench"
TOY = {**SHAPES["1b"], "num_hidden_layers": 2, "vocab_size": 8192}
THREADS = (1, 2)
ROUNDS = {1: 1, 2: 2}
"""Times that everything is run, by threads: the ratios are taken with two."""
EXPORT_TIMEOUT_S, RUN_TIMEOUT_S = 3600, 1800


Keep = Callable[[], None]
"""Writes down what is known by now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How weights lie in a peer's file, for the bytes that a decoded token has to read."""

    body_bits: float
    head_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artifact to run."""

    name: str
    runtime: str
    file: Path
    bytes_per_token: float
    """Of weights, read for each decoded token."""
    logits: str = "last"
    context: int = CONTEXT


OUR_TARGETS = ("onnxruntime", "executorch", "coreml")
FILES = {"onnxruntime": "model.onnx", "executorch": "model.pte"}
PEERS = {"genai": "onnxruntime", "executorch": "executorch", "llamacpp": "llama.cpp", "coreml": "coreml"}
UNRUNNABLE = "coreml"
"""Its packages run on Apple's systems only: they are measured and thrown away."""
PEER_FILES = {"genai": "model.onnx", "executorch": "model.pte", "llamacpp": "model.gguf"}

_XNNPACK = {"int4": 4 + 16 / 32, "int8": 8.0}
STORED: dict[tuple[str, str], Stored] = {
    ("genai", "ships"): Stored(body_bits=4 + 32 / 32, head_bits=4 + 32 / 32),
    ("genai", "ours"): Stored(body_bits=4 + 32 / 32, head_bits=8 + 32 / 32),
    ("export_llama", "ships"): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int4"]),
    ("export_llama", "ours"): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int8"]),
    ("llama.cpp", "Q4_0"): Stored(body_bits=4 + 16 / 32, head_bits=8 * 210 / 256),  # the head is Q6_K
    ("llama.cpp", "Q8_0"): Stored(body_bits=8 + 16 / 32, head_bits=8 + 16 / 32),
}
PEER_NAMES = {"genai": "genai", "executorch": "export_llama", "llamacpp": "llama.cpp", "coreml": "ct.convert"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--sizes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}; or toy")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; none for ours alone")
    parser.add_argument("--out", type=Path, help="a folder for benchmarks.md and its plots; default: only print")
    parser.add_argument("--remark", default="", help="what else the machine did, or was left out: stands in the report")
    parser.add_argument("--report-only", action="store_true", help="write the report of what was measured before")
    args = parser.parse_args()
    sizes, peers = args.sizes.split(","), [name for name in args.peers.split(",") if name != "none"]
    shapes = {"toy": TOY} if sizes == ["toy"] else SHAPES
    if strange := [*set(sizes).difference(shapes), *set(peers).difference(PEERS)]:
        parser.error(f"{', '.join(sorted(strange))}: known are {', '.join(SHAPES)}; {', '.join(PEERS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    file = FOLDER / ("results-toy.json" if shapes != SHAPES else "results.json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def keep() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n")

    for size in [] if args.report_only else sizes:
        record = results.setdefault(size, {})
        record["remark"] = args.remark
        _measure(size, shapes[size], peers, record=record, smaller=results.get("1b", {}), keep=keep)
    print(bench_report.write(results, out=args.out))


def _measure(
    size: str, shape: dict[str, Any], peers: list[str], *, record: dict[str, Any], smaller: dict[str, Any], keep: Keep
) -> None:
    """Everything about one size, into ``record``; ``smaller`` is that of 1B, which tells what peers need."""
    checkpoint = FOLDER / size / "checkpoint"
    if not (checkpoint / "model.safetensors.index.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        _say(f"{size}: making the checkpoint")
        write_random(shape, checkpoint)
    record |= {"machine": describe(), "parameters": read_spec(checkpoint).parameters}
    record["bandwidth"] = {str(threads): read_bandwidth(threads=threads) for threads in THREADS}
    record["exports"] = {}
    for name, told in _export_ours(size, checkpoint, record["parameters"]):
        record["exports"][name] = told
        keep()
    for name, told in _export_peers(size, checkpoint, peers, record["parameters"], smaller):
        record.setdefault("peers", {})[name] = told
        keep()
    entries = _entries(size, peers, record, shape)
    runs = record.setdefault("runs", {})
    measured = datetime.now().isoformat(timespec="seconds")
    for entry in entries:
        runs[entry.name] = {"measured": measured, "bytes_per_token": entry.bytes_per_token, "by_threads": {}}
    for name, threads, told in _run_all(size, checkpoint, entries):
        runs[name]["by_threads"].setdefault(str(threads), []).append(told)
        keep()
    if size not in ("1b", "toy"):  # gigabytes, made again in minutes
        for folder in (FOLDER / size).glob("ours-*"):
            shutil.rmtree(folder)


def _export_ours(size: str, checkpoint: Path, parameters: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A record for each target alone; at 1B also for all of them together, and for each other variant."""
    calls = [("int4", target) for target in OUR_TARGETS]
    if size in ("1b", "toy"):
        calls += [("int4", ",".join(OUR_TARGETS)), ("int8", ",".join(OUR_TARGETS))]
        calls += [(variant, "onnxruntime,executorch") for variant in list(VARIANTS)[2:-1]]
        calls += [(PREFILL, "onnxruntime")]
    for variant, names in calls:
        _say(f"{size}: exporting {variant} for {names}")
        out = FOLDER / size / f"ours-{variant}-{names}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = ["benchmarks.export_once", checkpoint, "--targets", names, "--out", out, *VARIANTS[variant].words]
        bits = 9 if variant == "int8" else 5
        needed = (1 + len(names.split(","))) * parameters * bits // 8  # the store, and the artifacts
        yield f"{variant}: {names}", _export(command, out, needed_bytes=needed)
        for target in OUR_TARGETS if (variant, names) == ("int4", ",".join(OUR_TARGETS)) else [UNRUNNABLE]:
            shutil.rmtree(out / target, ignore_errors=True)


def _export_peers(
    size: str, checkpoint: Path, peers: list[str], parameters: int, smaller: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for peer in peers:
        for scheme in SCHEMES[peer]:
            out = FOLDER / size / f"{peer}-{scheme}"
            name, record = f"{PEER_NAMES[peer]}: {scheme}", _made_before(peer, scheme, out)
            if record is None:
                _say(f"{size}: {PEER_NAMES[peer]} exports {scheme}")
                shutil.rmtree(out, ignore_errors=True)
                command = [f"benchmarks.peers.{peer}", checkpoint, "--scheme", scheme, "--out", out]
                # On disk a copy in bf16, and the artifact.
                expected = 0.0 if peer == "coreml" else _expected_bytes(smaller, name, parameters)
                record = _export(command, out, needed_bytes=3 * parameters, expected_bytes=expected)
                shutil.rmtree(out / "meta", ignore_errors=True)
            if peer != UNRUNNABLE and "failed" not in record:
                files = out.glob(f"{PEER_FILES[peer]}*")
                record["artifact_bytes"] = sum(path.stat().st_size for path in files)
            yield name, record


def _expected_bytes(smaller: dict[str, Any], name: str, parameters: int) -> float:
    """Anonymous memory of an export, in proportion to that at 1B; 0 where that is not known."""
    held: float = smaller.get("peers", {}).get(name, {}).get("anonymous_bytes", 0)
    return held * parameters / smaller["parameters"] if held else 0.0


def _made_before(peer: str, scheme: str, out: Path) -> dict[str, Any] | None:
    """The record of an earlier export by the same version with the same options."""
    file = out / "export.json"
    if not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_text())
    settings = import_module(f"benchmarks.peers.{peer}").settings(scheme)
    return record if settings.items() <= record.items() else None


def _export(words: Sequence[object], out: Path, *, needed_bytes: int, expected_bytes: float = 0.0) -> dict[str, Any]:
    """The ``export.json`` that a module of ours writes to ``out``, or why it did not: for one, because the disk has not
    ``needed_bytes`` or memory not ``expected_bytes``. What is left of a failed one is removed: it may not be whole."""
    try:
        if expected_bytes > (memory := available_bytes()):
            least, most = expected_bytes / 2**30, memory / 2**30
            raise ProgramError(f"not tried: about {least:.0f} GiB expected from its need at 1B, {most:.0f} available")
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes:
            raise ProgramError(
                f"not tried: about {needed_bytes / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} free"
            )
        run([sys.executable, "-m", *words], timeout_s=EXPORT_TIMEOUT_S)
        record: dict[str, Any] = json.loads((out / "export.json").read_text())
        return record
    except (ProgramError, OSError, ValueError) as error:
        shutil.rmtree(out, ignore_errors=True)
        return {"failed": str(error)}


def _entries(size: str, peers: list[str], record: dict[str, Any], shape: dict[str, Any]) -> list[Entry]:
    """Each of ours next to the peer that it is compared with, so that both see the same noise."""
    entries = {entry.name: entry for entry in (*_our_entries(size, record), *_peer_entries(size, peers, shape))}
    paired = [name for pair in bench_report.PAIRS for name in (pair.ours, pair.peer) if name in entries]
    return [entries[name] for name in dict.fromkeys([*paired, *entries])]


def _our_entries(size: str, record: dict[str, Any]) -> Iterator[Entry]:
    spec = read_spec(FOLDER / size / "checkpoint")
    for key in record["exports"]:
        variant, names = key.split(": ")
        for runtime, file in FILES.items():
            path = FOLDER / size / f"ours-{variant}-{names}" / runtime / file
            if path.exists():
                how, name = VARIANTS[variant], f"ours: {runtime}: {variant}"
                read = footprint(runtime, spec, how.scheme, context=how.context, prefer=how.prefer).token_bytes
                yield Entry(name=name, runtime=runtime, file=path, bytes_per_token=read, context=how.context)


def _peer_entries(size: str, peers: list[str], shape: dict[str, Any]) -> Iterator[Entry]:
    counts = bench_report.parameters(shape)
    for peer in peers:
        for scheme in SCHEMES[peer] if peer != UNRUNNABLE else ():
            path = FOLDER / size / f"{peer}-{scheme}" / PEER_FILES[peer]
            name = PEER_NAMES[peer]
            if path.exists():
                every = "all" if (peer, scheme) == ("genai", "ships") else "last"
                stored = STORED[name, scheme]
                read = (counts["body"] * stored.body_bits + counts["head"] * stored.head_bits) / 8
                yield Entry(
                    name=f"{name}: {scheme}", runtime=PEERS[peer], file=path, bytes_per_token=read, logits=every
                )


def _run_all(size: str, checkpoint: Path, entries: list[Entry]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, threads and record of each run: all entries in turn, then all of them again."""
    for threads in reversed(THREADS):
        for round_ in range(ROUNDS[threads]):
            for entry in entries:
                _say(f"{size}: {entry.name}, threads: {threads}, round {round_ + 1} of {ROUNDS[threads]}")
                yield entry.name, threads, _run_one(entry, checkpoint, threads=threads)


def _run_one(entry: Entry, checkpoint: Path, *, threads: int) -> dict[str, Any]:
    """The record of one run, or why it failed."""
    from benchmarks.peers import llamacpp

    try:
        if entry.runtime == "llama.cpp":
            return llamacpp.measure(entry.file, threads=threads, repetitions=2, timeout_s=RUN_TIMEOUT_S)
        words = [entry.runtime, entry.file, "--checkpoint", checkpoint, "--threads", threads]
        words += ["--logits", entry.logits, "--context", entry.context]
        done = run([sys.executable, "-m", "benchmarks.run_once", *words], timeout_s=RUN_TIMEOUT_S)
        record: dict[str, Any] = json.loads(done.output.strip().splitlines()[-1])
        return record
    except (ProgramError, RivalError, OSError, ValueError, IndexError) as error:
        return {"failed": str(error)}


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
