"""``make bench``: real shapes, ours and what a user would take instead, measured in one run.

Random checkpoints with the shapes of Llama-3.2-1B, 3.2-3B and 3.1-8B are exported and run; so are the peers, on the
same files. Each export and each run is a process of its own; runs of ours and of peers alternate. Records are kept in
``benchmarks/.cache/bench/results.json``, size by size, so that ``--sizes`` and ``--peers`` can add to them; what a peer
has exported is kept as well, since one of them takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bench_report
from benchmarks.machine import read_bandwidth
from benchmarks.peers import CONTEXT, SCHEMES
from benchmarks.rivals import CACHE
from benchmarks.shapes import SHAPES, write_random

FOLDER = CACHE / "bench"
RESULTS = FOLDER / "results.json"
THREADS = (1, 2)
ROUNDS = {1: 1, 2: 2}
"""Times that everything is run, by threads: the ratios are taken with two."""
EXPORT_TIMEOUT_S, RUN_TIMEOUT_S = 3600, 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How weights lie in a file, for the bytes that a decoded token has to read."""

    body_bits: float
    head_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artifact to run."""

    name: str
    runtime: str
    file: Path
    stored: Stored
    logits: str = "last"
    context: int = CONTEXT


LONG = "int4, context 4096"
VARIANTS: dict[str, tuple[str, ...]] = {
    "int4": (),
    "int8": ("--precision", "int8"),
    "int4, head int4": ("--head", "int4"),
    "int4, groups of 128": ("--group-size", "128"),
    LONG: ("--context", "4096"),
}
OUR_TARGETS = ("onnxruntime", "executorch", "coreml")
FILES = {"onnxruntime": "model.onnx", "executorch": "model.pte"}
PEERS = {"genai": "onnxruntime", "executorch": "executorch", "llamacpp": "llama.cpp", "coreml": "coreml"}
PEER_FILES = {"genai": "model.onnx", "executorch": "model.pte", "llamacpp": "model.gguf"}

_ONNX = {"int4": 4 + 32 / 32, "g128": 4 + 32 / 128, "int8": 8 + 32 / 128, "int8 by 32": 8 + 32 / 32}
"""Bits per weight with float32 scales; int8 rows repeat theirs for blocks of 128."""
_XNNPACK = {"int4": 4 + 16 / 32, "g128": 4 + 16 / 128, "int8": 8.0}
STORED: dict[tuple[str, str], Stored] = {
    ("onnxruntime", "int4"): Stored(body_bits=_ONNX["int4"], head_bits=_ONNX["int8"]),
    ("onnxruntime", "int8"): Stored(body_bits=_ONNX["int8"], head_bits=_ONNX["int8"]),
    ("onnxruntime", "int4, head int4"): Stored(body_bits=_ONNX["int4"], head_bits=_ONNX["int4"]),
    ("onnxruntime", "int4, groups of 128"): Stored(body_bits=_ONNX["g128"], head_bits=_ONNX["int8"]),
    ("executorch", "int4"): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int8"]),
    ("executorch", "int8"): Stored(body_bits=_XNNPACK["int8"], head_bits=_XNNPACK["int8"]),
    ("executorch", "int4, head int4"): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int4"]),
    ("executorch", "int4, groups of 128"): Stored(body_bits=_XNNPACK["g128"], head_bits=_XNNPACK["int8"]),
    ("onnxruntime", LONG): Stored(body_bits=_ONNX["int4"], head_bits=_ONNX["int8"]),
    ("executorch", LONG): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int8"]),
    ("genai", "ships"): Stored(body_bits=_ONNX["int4"], head_bits=_ONNX["int4"]),
    ("genai", "ours"): Stored(body_bits=_ONNX["int4"], head_bits=_ONNX["int8 by 32"]),
    ("export_llama", "ships"): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int4"]),
    ("export_llama", "ours"): Stored(body_bits=_XNNPACK["int4"], head_bits=_XNNPACK["int8"]),
    ("llama.cpp", "ships"): Stored(body_bits=4 + 16 / 32, head_bits=8 * 210 / 256),  # Q4_0, and Q6_K for the head
}
PEER_NAMES = {"genai": "genai", "executorch": "export_llama", "llamacpp": "llama.cpp", "coreml": "ct.convert"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--sizes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; none for ours alone")
    parser.add_argument("--out", type=Path, help="a folder for benchmarks.md and its plots; default: only print")
    parser.add_argument("--report-only", action="store_true", help="write the report of what was measured before")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    peers = [name for name in args.peers.split(",") if name in PEERS]
    for size in [] if args.report_only else args.sizes.split(","):
        checkpoint = FOLDER / size / "checkpoint"
        if not (checkpoint / "model.safetensors.index.json").exists():
            shutil.rmtree(checkpoint, ignore_errors=True)
            _say(f"{size}: making the checkpoint")
            write_random(SHAPES[size], checkpoint)
        record = results.setdefault(size, {})
        record["bandwidth"] = {str(threads): read_bandwidth(threads=threads) for threads in THREADS}
        record["exports"] = _export_ours(size, checkpoint)
        record["peers"] = record.get("peers", {}) | _export_peers(size, checkpoint, peers)
        kept = {name: run for name, run in record.get("runs", {}).items() if not _runs_again(name, peers)}
        record["runs"] = kept | _run_all(size, checkpoint, _entries(size, peers, record))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report = bench_report.write(results, out=args.out)
    print(report)


def _runs_again(name: str, peers: list[str]) -> bool:
    return name.split(": ", maxsplit=1)[0] in ("ours", *(PEER_NAMES[peer] for peer in peers))


def _export_ours(size: str, checkpoint: Path) -> dict[str, Any]:
    """A record for each target alone, for all of them together, and for each other variant (at 1B)."""
    records = {}
    calls = [("int4", target) for target in OUR_TARGETS]
    if size == "1b":
        calls += [("int4", ",".join(OUR_TARGETS)), ("int8", ",".join(OUR_TARGETS))]
        calls += [(variant, "onnxruntime,executorch") for variant in list(VARIANTS)[2:]]
    for variant, names in calls:
        _say(f"{size}: exporting {variant} for {names}")
        out = FOLDER / size / f"ours-{variant}-{names}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = ["benchmarks.export_once", checkpoint, "--targets", names, "--out", out, *VARIANTS[variant]]
        records[f"{variant}: {names}"] = _run_module(command, result=out / "export.json", timeout_s=EXPORT_TIMEOUT_S)
    return records


def _export_peers(size: str, checkpoint: Path, peers: list[str]) -> dict[str, Any]:
    records = {}
    for peer in peers:
        for scheme in SCHEMES if peer in ("genai", "executorch") else SCHEMES[:1]:
            out = FOLDER / size / f"{peer}-{scheme}"
            if not (out / "export.json").exists():
                if size != "1b" and peer == "executorch":
                    # its float32 copy of the model alone is larger than this machine's memory at 8B
                    records[f"{PEER_NAMES[peer]}: {scheme}"] = {"failed": "not tried beyond 1B"}
                    continue
                _say(f"{size}: {PEER_NAMES[peer]} exports as it {scheme}")
                shutil.rmtree(out, ignore_errors=True)
                command = [f"benchmarks.peers.{peer}", checkpoint, "--scheme", scheme, "--out", out]
                record = _run_module(command, result=out / "export.json", timeout_s=EXPORT_TIMEOUT_S)
            else:
                record = json.loads((out / "export.json").read_text())
            file = out / PEER_FILES.get(peer, "model.mlpackage")
            if file.exists():
                record["artifact_bytes"] = sum(path.stat().st_size for path in _artifact(file))
            records[f"{PEER_NAMES[peer]}: {scheme}"] = record
    return records


def _artifact(file: Path) -> Iterator[Path]:
    if file.is_dir():
        yield from (path for path in file.rglob("*") if path.is_file())
    else:
        yield from file.parent.glob(f"{file.name}*")


def _entries(size: str, peers: list[str], record: dict[str, Any]) -> list[Entry]:
    """Ours and the peers of one runtime one after the other, so that both see the same noise."""
    entries = []
    for runtime, file in FILES.items():
        for key in record["exports"]:
            variant, names = key.split(": ")
            alone = names == runtime or (variant != "int4" and runtime in names)
            path = FOLDER / size / f"ours-{variant}-{names}" / runtime / file
            if alone and path.exists():
                stored = STORED[runtime, variant]
                context = 4096 if variant == LONG else CONTEXT
                name = f"ours: {runtime}: {variant}"
                entries.append(Entry(name=name, runtime=runtime, file=path, stored=stored, context=context))
        entries += _peer_entries(size, [peer for peer in peers if PEERS[peer] == runtime])
    return entries + _peer_entries(size, [peer for peer in peers if peer == "llamacpp"])


def _peer_entries(size: str, peers: list[str]) -> Iterator[Entry]:
    for peer in peers:
        for scheme in SCHEMES:
            path = FOLDER / size / f"{peer}-{scheme}" / PEER_FILES[peer]
            name = PEER_NAMES[peer]
            if path.exists():
                every = "all" if (peer, scheme) == ("genai", "ships") else "last"
                stored = STORED[name, scheme]
                yield Entry(name=f"{name}: {scheme}", runtime=PEERS[peer], file=path, stored=stored, logits=every)


def _run_all(size: str, checkpoint: Path, entries: list[Entry]) -> dict[str, Any]:
    """Records by name of the entry, then by number of threads; one that failed tells why."""
    runs: dict[str, Any] = {entry.name: {} for entry in entries}
    for threads in reversed(THREADS):
        for round_ in range(ROUNDS[threads]):
            for entry in entries:
                _say(f"{size}: {entry.name}, {threads} threads, round {round_ + 1} of {ROUNDS[threads]}")
                record = _run_one(entry, checkpoint, threads=threads)
                known = runs[entry.name].get(str(threads))
                if known and "tokens_per_s" in known and "tokens_per_s" in record:
                    for name, rates in record["tokens_per_s"].items():
                        known["tokens_per_s"][name] += rates
                else:
                    runs[entry.name][str(threads)] = record
    parameters = bench_report.parameters(SHAPES[size])
    for entry in entries:
        bits = parameters["body"] * entry.stored.body_bits + parameters["head"] * entry.stored.head_bits
        runs[entry.name]["bytes_per_token"] = bits / 8
    return runs


def _run_one(entry: Entry, checkpoint: Path, *, threads: int) -> dict[str, Any]:
    if entry.runtime == "llama.cpp":
        from benchmarks.peers.llamacpp import measure

        return measure(entry.file, threads=threads, repetitions=2)
    words = [entry.runtime, entry.file, "--checkpoint", checkpoint, "--threads", threads]
    words += ["--logits", entry.logits, "--context", entry.context]
    return _run_module(["benchmarks.run_once", *words], timeout_s=RUN_TIMEOUT_S)


def _run_module(words: list[Any], *, timeout_s: float, result: Path | None = None) -> dict[str, Any]:
    """What a module of ours writes to ``result``, or as the last line of stdout; or why it failed."""
    command = [sys.executable, "-m", *map(str, words)]
    log = FOLDER / "last.log"
    with log.open("w") as stderr:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout_s:.0f} s"}
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"failed": f"{ended}: {lines[-1][:200] if lines else 'it said nothing'}"}
    text = result.read_text() if result else done.stdout.strip().splitlines()[-1]
    record: dict[str, Any] = json.loads(text)
    return record


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
