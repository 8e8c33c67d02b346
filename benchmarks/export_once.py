"""One export in a process of its own, without proofs: ``python -m benchmarks.export_once CHECKPOINT --targets ...``.

From the checkpoint on disk with nothing kept from before, rounded to nearest. Writes the artifacts, and a JSON record
with seconds and peak memory of each stage.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import targets  # noqa: E402  (the time of imports is part of an export)
from benchmarks.memory import Memory  # noqa: E402
from benchmarks.peers import CONTEXT  # noqa: E402
from calibration.layers import quantize  # noqa: E402
from exporter.checkpoint import open_checkpoint  # noqa: E402
from exporter.model.trace import trace  # noqa: E402
from exporter.spec import Method, Plan, Precision, Prefer, Recipe, Sampling, WeightScheme  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_once", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--targets", required=True, help="a comma list")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--head", default="int8")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--prefer", default="quality")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    stages: dict[str, Any] = {"imports": {"seconds": time.perf_counter() - BEGAN}}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        with Memory() as memory:
            yield
        seconds = time.perf_counter() - began
        peaks = {"anonymous_bytes": memory.anonymous_bytes, "mapped_bytes": memory.mapped_bytes}
        stages[name] = {"seconds": seconds, **peaks}

    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [targets.load(name) for name in args.targets.split(",")]
    with tempfile.TemporaryDirectory(dir=args.out.parent) as root:
        with stage("opening"):
            checkpoint = open_checkpoint(args.checkpoint)
            _ = checkpoint.sha256  # reads every byte: the name of the store depends on it
        ends = Precision(args.head)
        embedding = ends if checkpoint.spec.tie_word_embeddings else Precision.INT8
        scheme = WeightScheme(
            body=Precision(args.precision), embedding=embedding, head=ends, group_size=args.group_size
        )
        with stage("quantizing"):
            store, _ = quantize(checkpoint, scheme, root=Path(root))
        with stage("tracing"):
            graph = trace(checkpoint.spec)
        plan = Plan(
            checkpoint=args.checkpoint,
            targets=tuple(target.name for target in chosen),
            scheme=scheme,
            context=args.context,
            prefer=Prefer(args.prefer),
            recipe=Recipe(method=Method.ROUND),
            sampling=Sampling(),
            out=args.out,
            store=Path(root),
            evaluation_text=None,
            threads=1,
        )
        for target in chosen:
            folder = args.out / target.name
            folder.mkdir(parents=True)
            with stage(target.name):
                target.lower(graph, store, plan, folder)
    sizes = {
        target.name: sum(path.stat().st_size for path in (args.out / target.name).rglob("*") if path.is_file())
        for target in chosen
    }
    record = {"seconds": time.perf_counter() - BEGAN, "stages": stages, "artifact_bytes": sizes}
    (args.out / "export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
