"""``python -m benchmarks.arm64 BUNDLE``: the bundle's artifact as emulated Arm cores compute it, beside this host.

Exit codes as llama-export's: 7 where a core misses the gates that the bundle was proven by.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.arm64.drift import Answers, as_table, compare, failed_cores, find_arithmetic, open_checked
from benchmarks.arm64.machine import CORES, HERE, HOST, NEEDS_MORE, ROOT, Machine, set_up
from exporter.errors import ExportError, LoweringError, ParityError

SAMPLE = ROOT / "samples" / "python"


def answer_here(bundle: Path, *, scratch: Path) -> Answers:
    """This host's answers, by the same program. Raises LoweringError."""
    out = scratch / f"{HOST}.npz"
    environment = {**os.environ, "PYTHONPATH": str(SAMPLE), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, HERE / "answer.py", bundle, out]
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LoweringError(f"on this host the runtime ended with {done.returncode}: {said}", hint="run make setup")
    return read_answers(out, core=HOST, about="this host")


def answer_emulated(machine: Machine, core: str, bundle: Path, *, scratch: Path) -> Answers:
    """An emulated core's answers. Raises LoweringError."""
    out = scratch / f"{core}.npz"
    machine.run(CORES[core], HERE / "answer.py", bundle.resolve(), out, paths=[SAMPLE])
    return read_answers(out, core=core, about=CORES[core].about)


def read_answers(path: Path, *, core: str, about: str) -> Answers:
    """What ``answer.py`` wrote."""
    with np.load(path) as written:
        told = json.loads(str(written["about"]))
        logits = torch.from_numpy(written["logits"])
    return Answers(
        core=core,
        about=about,
        runtime=told["runtime"],
        machine=told["machine"],
        features=tuple(told["features"]),
        logits=logits,
    )


def measure(bundle: Path, cores: Sequence[str], *, arithmetic: bool = True) -> dict[str, object]:
    """The report of a bundle on this host and on emulated cores, of those that the runtime is built for. Raises
    ExportError."""
    manifest, goldens = open_checked(bundle)
    machine = set_up(manifest["target"])
    needs = {core: NEEDS_MORE[manifest["target"], core] for core in cores if (manifest["target"], core) in NEEDS_MORE}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        answers = [answer_here(bundle, scratch=scratch)]
        for core in (core for core in cores if core not in needs):
            print(f"arm64: {manifest['target']} on an emulated {core}", file=sys.stderr)
            answers.append(answer_emulated(machine, core, bundle, scratch=scratch))
    report = compare(manifest, goldens, answers)
    if arithmetic:
        report["arithmetic"] = find_arithmetic(bundle, manifest, goldens, answers)
    report["not_measured"] = needs
    report["emulated_with"] = machine.packages()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64", description=__doc__)
    parser.add_argument("bundle", type=Path, help="what an export for onnxruntime or executorch has made")
    parser.add_argument("--cores", default=",".join(CORES), help="some of %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/arm64"), help="folder of the report")
    parser.add_argument("--no-arithmetic", action="store_true", help="ask no references how each core rounds")
    arguments = parser.parse_args()
    cores = arguments.cores.split(",")
    if unknown := [core for core in cores if core not in CORES]:
        parser.error(f"unknown core {unknown[0]!r}; known: {', '.join(CORES)}")
    try:
        report = measure(arguments.bundle, cores, arithmetic=not arguments.no_arithmetic)
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"{report['target']}.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(as_table(report))
        print(f"written to {path}", file=sys.stderr)
        if failed := failed_cores(report):
            raise ParityError(f"{', '.join(failed)} misses the bundle's gates", hint=f"see the reasons in {path}")
    except ExportError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
