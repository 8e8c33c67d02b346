"""What a user would take instead: other exporters on the same checkpoint, each in a process of its own.

A module here is run as ``python -m benchmarks.peers.NAME CHECKPOINT --scheme SCHEME --out FOLDER`` and writes its
artifact and ``export.json``: seconds, peak memory, version and options. Its ``settings`` tell version and options
beforehand, so that what it made earlier is known for what it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.memory import Memory

SCHEMES: Mapping[str, tuple[str, ...]] = {
    "genai": ("ships", "ours"),
    "executorch": ("ships", "ours"),
    "llamacpp": ("Q4_0", "Q8_0"),
    "coreml": ("ships",),
}
"""``ships``: as the tool does it by default for a phone. ``ours``: int4 in groups of 32 with an int8 head, as far as it
can."""
CONTEXT = 2048


def arguments(name: str) -> argparse.Namespace:
    """``checkpoint``, ``scheme`` and ``out``, a folder that is made."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{name}")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scheme", choices=SCHEMES[name], required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


@contextmanager
def recorded(out: Path, *, settings: Mapping[str, Any]) -> Iterator[None]:
    """The block exports: its seconds, and the peak memory of this process and of those that it starts, go to
    ``export.json`` in ``out``, with the settings."""
    began = time.perf_counter()
    with Memory(children=True) as memory:
        yield
    record = {
        "seconds": time.perf_counter() - began,
        "anonymous_bytes": memory.anonymous_bytes,
        "mapped_bytes": memory.mapped_bytes,
        **settings,
    }
    write_record(out, record)


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """``export.json``, which is written last: an export without one is not whole."""
    (out / "export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
