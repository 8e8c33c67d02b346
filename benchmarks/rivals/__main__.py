"""Run one rival: ``python -m benchmarks.rivals NAME --checkpoint FOLDER --windows FILE --out FOLDER``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from benchmarks.rivals import RIVALS, Outcome, RivalError, Task, bits_per_weight, check, peak_rss_mb
from exporter.checkpoint import open_checkpoint
from exporter.errors import ExportError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("name", nargs="?", help=", ".join(RIVALS))
    parser.add_argument("--checkpoint", type=Path, help="folder in Hugging Face layout")
    parser.add_argument("--windows", type=Path, help='safetensors with the calibration tokens, int64 "ids" [W, T]')
    parser.add_argument("--out", type=Path, help="folder for weights.safetensors and rival.json")
    parser.add_argument("--build-llama-cpp", action="store_true", help="build llama.cpp ahead of its first use")
    args = parser.parse_args()
    if not (args.build_llama_cpp or (args.name and args.checkpoint and args.windows and args.out)):
        parser.error("a rival needs its NAME, --checkpoint, --windows and --out")
    try:
        if args.build_llama_cpp:
            from benchmarks.rivals import llamacpp

            llamacpp.build()
        else:
            run(args.name, checkpoint_folder=args.checkpoint, windows_file=args.windows, out=args.out)
    except (RivalError, ExportError, ModuleNotFoundError) as error:
        hint = "; pip install -r benchmarks/rivals/requirements.txt" if isinstance(error, ModuleNotFoundError) else ""
        print(f"{args.name or 'llama.cpp'}: {error}{hint}", file=sys.stderr)
        return 1
    return 0


def run(name: str, *, checkpoint_folder: Path, windows_file: Path, out: Path) -> None:
    """Quantize with rival ``name``, check what came out, and write it. Raises RivalError and InputError."""
    if name not in RIVALS:
        raise RivalError(f"there is no such rival; there are {', '.join(RIVALS)}")
    module, function = RIVALS[name].split(":")
    quantize: Callable[[Task], Outcome] = getattr(import_module(f"benchmarks.rivals.{module}"), function)
    checkpoint, windows = open_checkpoint(checkpoint_folder.resolve()), read_windows(windows_file)
    with tempfile.TemporaryDirectory() as scratch:
        outcome = quantize(Task(checkpoint=checkpoint, windows=windows, scratch=Path(scratch)))
    own_peak = peak_rss_mb()
    check(outcome, checkpoint)
    body_bits, file_bits = bits_per_weight(outcome, checkpoint.spec)
    told = ("version", "options", "file_bytes", "seconds", "peak_rss_mb", "notes")
    record = {"name": name, **{key: getattr(outcome, key) for key in told}}
    record |= {"body_bits_per_weight": body_bits, "file_bits_per_weight": file_bits}
    record["peak_rss_mb"] = outcome.peak_rss_mb or own_peak
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: weight.float().contiguous() for key, weight in outcome.weights.items()}
    save_file(weights, out / "weights.safetensors")
    (out / "rival.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def read_windows(file: Path) -> torch.Tensor:
    """int64 ``[W, T]``. Raises RivalError."""
    try:
        windows = load_file(file)["ids"]
    except (OSError, SafetensorError, KeyError) as error:
        raise RivalError(f'{file} is no safetensors file with a tensor "ids": {error}') from error
    if windows.dtype != torch.int64 or windows.ndim != 2 or not windows.numel():
        raise RivalError(f'"ids" is {windows.dtype} {list(windows.shape)}, int64 [windows, tokens] was expected')
    return windows


if __name__ == "__main__":
    sys.exit(main())
