"""llama.cpp: its converter and ``llama-quantize``, and its own ``llama-bench`` to run the file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import arguments, recorded
from benchmarks.processes import run
from benchmarks.rivals.llamacpp import FOLDER, SOURCE, THREADS, build, convert


def settings(scheme: str) -> dict[str, Any]:
    return {"version": f"llama.cpp from {SOURCE.replace('==', ' ')}", "options": {"type": scheme}}


def main() -> None:
    args = arguments("llamacpp")
    programs, float_file = build(), args.out / "model-bf16.gguf"
    with recorded(args.out, settings=settings(args.scheme)):
        convert(args.checkpoint, float_file, kind="bf16")
        command = [programs / "llama-quantize", float_file, args.out / "model.gguf", args.scheme, THREADS]
        subprocess.run(list(map(str, command)), check=True)
    float_file.unlink()


def measure(file: Path, *, threads: int, repetitions: int, timeout_s: float) -> dict[str, Any]:
    """The record of ``benchmarks.run_once`` for a GGUF file, but for the time to load, which llama-bench does not tell.
    Raises ProgramError."""
    from benchmarks.run_once import DECODED, DEPTHS, PROMPTS

    program = FOLDER / "build" / "bin" / "llama-bench"
    common = ["-m", file, "-t", threads, "-r", repetitions, "-o", "json"]
    rates: dict[str, list[float]] = {}
    peaks = [0, 0]
    calls = [
        ["-p", ",".join(map(str, PROMPTS)), "-n", 0],
        ["-p", 0, "-n", DECODED, "-d", ",".join(map(str, DEPTHS))],
    ]
    for call in calls:
        done = run([program, *common, *call], timeout_s=timeout_s)
        peaks = [max(peaks[0], done.memory.anonymous_bytes), max(peaks[1], done.memory.mapped_bytes)]
        for test in json.loads(done.output):
            prompt, depth = test["n_prompt"], test["n_depth"]
            rates[f"prefill {prompt}" if prompt else f"decode at {depth}"] = test["samples_ts"]
    return {"tokens_per_s": rates, "idle_bytes": (0, 0), "peak_bytes": peaks}


if __name__ == "__main__":
    main()
