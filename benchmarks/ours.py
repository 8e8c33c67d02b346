"""Run one of our own methods as the rivals are run: ``python -m benchmarks.ours METHOD --checkpoint ... --out ...``."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.rivals import peak_rss_mb
from benchmarks.rivals.__main__ import read_windows
from calibration.layers import Calibration, CalibrationText, quantize
from calibration.sensitivity import stored_bytes
from exporter.checkpoint import open_checkpoint
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor
from exporter.spec import Method, Precision, Recipe, WeightScheme

INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
BODY_BITS = 4 + 16 / 32
"""A code of four bits, and a bf16 scale for 32 of them."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description=__doc__)
    parser.add_argument("method", choices=list(Method))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    checkpoint, windows = open_checkpoint(args.checkpoint), read_windows(args.windows)
    method = Method(args.method)
    graph = trace(checkpoint.spec)
    calibration = None
    if method.needs_text:
        text = CalibrationText(identity=args.windows.name, source=args.windows.name, windows=lambda: windows)
        calibration = Calibration(recipe=Recipe(method=method), text=text, graph=graph)
    with tempfile.TemporaryDirectory() as root:
        began = time.perf_counter()
        store, _ = quantize(checkpoint, INT4, root=Path(root), calibration=calibration)
        seconds = time.perf_counter() - began
        weights = {
            name: weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.float().contiguous()
            for name, weight in ((name, store[name]) for name in checkpoint.spec.weights())
        }
    size = stored_bytes(checkpoint.spec, INT4)
    record = {
        "name": f"ours: {method}",
        "body_bits_per_weight": BODY_BITS,
        "file_bits_per_weight": 8 * size / checkpoint.spec.parameters,
        "seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
        "notes": ["bytes of codes, scales and norms in the store; the artifacts add their graph"],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "weights.safetensors")
    (args.out / "rival.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
