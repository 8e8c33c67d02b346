"""Exports a checkpoint for ONNX Runtime, proves it, and asks it something: python export_and_ask.py CHECKPOINT QUESTION

With llama-export at hand, five names are all of it: Plan, plan, export, validate, open_bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path

from exporter import Plan, export, open_bundle, plan, validate


def main(checkpoint: str, question: str) -> int:
    made: Plan = plan(checkpoint, target="onnxruntime", precision="int4", calibration="none", out="bundles")
    print(f"{made.scheme.body} in groups of {made.scheme.group_size}, {made.context} positions", file=sys.stderr)
    (outcome,) = export(made)
    if outcome.exit_code:
        print(f"{outcome.folder}: {outcome.error or 'a proof has failed, see its manifest.json'}", file=sys.stderr)
        return outcome.exit_code

    again = validate(outcome.folder)  # what a server does with a bundle that was copied to it
    assert again.manifest is not None
    print(f"parity {again.manifest['parity']['verdict']}", file=sys.stderr)
    return again.exit_code or ask(outcome.folder, question)


def ask(folder: Path, question: str) -> int:
    with open_bundle(folder) as bundle:
        for piece in bundle.stream([{"role": "user", "content": question}], max_tokens=40):
            print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
