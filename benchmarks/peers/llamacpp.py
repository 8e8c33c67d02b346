"""llama.cpp: its converter and ``llama-quantize``, and its own ``llama-bench`` to run the file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import arguments, recorded
from benchmarks.rivals.llamacpp import FOLDER, SOURCE, THREADS, build, convert

KINDS = {"ships": "Q4_0", "ours": "Q4_0"}
"""Blocks of 32 with one scale of 16 bits; the head gets Q6_K. There is no closer one to ours."""


def main() -> None:
    args = arguments("llamacpp")
    programs, float_file = build(), args.out / "model-bf16.gguf"
    kind = KINDS[args.scheme]
    with recorded(args.out, version=f"llama.cpp from {SOURCE}", options={"type": kind}):
        convert(args.checkpoint, float_file, kind="bf16")
        command = [programs / "llama-quantize", float_file, args.out / "model.gguf", kind, THREADS]
        subprocess.run(list(map(str, command)), check=True)
    float_file.unlink()


def measure(file: Path, *, threads: int, repetitions: int) -> dict[str, Any]:
    """The record of ``benchmarks.run_once`` for a GGUF file; llama-bench tells no memory."""
    from benchmarks.run_once import DECODED, DEPTHS, PROMPTS

    program = FOLDER / "build" / "bin" / "llama-bench"
    common = ["-m", file, "-t", threads, "-r", repetitions, "-o", "json"]
    rates: dict[str, list[float]] = {}
    calls = [
        ["-p", ",".join(map(str, PROMPTS)), "-n", 0],
        ["-p", 0, "-n", DECODED, "-d", ",".join(map(str, DEPTHS))],
    ]
    for call in calls:
        command = list(map(str, [program, *common, *call]))
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for test in json.loads(done.stdout):
            prompt, depth = test["n_prompt"], test["n_depth"]
            rates[f"prefill {prompt}" if prompt else f"decode at {depth}"] = test["samples_ts"]
    return {"tokens_per_s": rates}


if __name__ == "__main__":
    main()
