"""One artifact, ours or a peer's, run in a process of its own: ``python -m benchmarks.run_once TARGET FILE ...``.

Prints a JSON record: seconds to load, tokens per second of prefill and decode (one list entry for each repetition),
memory before and after. Peers' files have the inputs and outputs of ours, so that the same runner drives them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

import targets
from benchmarks.memory import Memory, resident_bytes
from benchmarks.ours import INT4
from benchmarks.peers import CONTEXT
from exporter.checkpoint.config import read_spec
from exporter.spec import Artifact, Logits

PROMPTS = (128, 1024)
DEPTHS = (0, 1024)
DECODED = 32


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_once", description=__doc__)
    parser.add_argument("target", choices=["onnxruntime", "executorch"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="whose shapes the file has")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--logits", choices=list(Logits), default=Logits.LAST)
    parser.add_argument("--context", type=int, default=CONTEXT, help="positions that the file's cache holds")
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    target, spec = targets.load(args.target), read_spec(args.checkpoint)
    artifact = Artifact(
        target=target.name,
        backend=target.backend,
        path=args.file,
        spec=spec,
        scheme=INT4,
        arithmetic=target.arithmetic(INT4),
        context=args.context,
        logits=Logits(args.logits),
    )
    ids = torch.randint(2000, (max(PROMPTS) + DECODED,), generator=torch.Generator().manual_seed(0)).tolist()
    idle = resident_bytes()
    with target.open(artifact, threads=args.threads) as runner:
        pid = getattr(runner, "pid", os.getpid())
        loaded = resident_bytes(pid)
        figures: dict[str, list[float]] = {}
        with Memory(pid) as memory:
            runner.feed(ids[: min(PROMPTS)])  # to warm up
            runner.feed_each(ids[:4])
            for _ in range(args.repetitions):
                for name, rate in _rates(runner, ids).items():
                    figures.setdefault(name, []).append(rate)
        record = {
            "load_s": runner.load_s,
            "tokens_per_s": figures,
            # A runtime in this process is charged with what it adds; one in its own with all that it holds.
            "idle_bytes": idle if pid == os.getpid() else (0, 0),
            "loaded_bytes": loaded,
            "peak_bytes": (memory.anonymous_bytes, memory.mapped_bytes),
        }
    print(json.dumps(record))


def _rates(runner: Any, ids: list[int]) -> dict[str, float]:
    rates = {}
    for count in PROMPTS:
        runner.rewind(0)
        runner.feed(ids[:count])
        rates[f"prefill {count}"] = count / sum(runner.steps_s)
    for depth in reversed(DEPTHS):  # the cache has 1,024 positions by now
        runner.rewind(depth)
        runner.feed_each(ids[depth : depth + DECODED])
        rates[f"decode at {depth}"] = DECODED / sum(runner.steps_s)
    return rates


if __name__ == "__main__":
    main()
