"""``make bench-calibration``: time and memory of the default calibration on layers of Llama-3.2-1B's shape.

A model of a few such layers, with random weights and a small vocabulary, is calibrated on 32 windows of 512 tokens. A
layer costs the same whatever stands before it, so the whole model is extrapolated: its number of layers times the
seconds of one, and embedding and head by the seconds per parameter of rounding.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.memory import Memory
from benchmarks.ours import INT4
from benchmarks.shapes import SHAPES, write_random
from calibration.anatomy import dissect
from calibration.layers import Calibration, CalibrationText, quantize
from calibration.rtn import round_to_nearest
from exporter.checkpoint import open_checkpoint
from exporter.model.trace import trace
from exporter.spec import Method, ModelSpec, Recipe

LLAMA_32_1B = SHAPES["1b"]
LAYERS, VOCABULARY = LLAMA_32_1B["num_hidden_layers"], LLAMA_32_1B["vocab_size"]
SMALL_VOCABULARY = 4096
WINDOWS, WINDOW_LENGTH = 32, 512
LIMIT_S_PER_MPARAM = 2.0
BASE_BYTES = 3 << 29
"""1.5 GiB: interpreter, torch, hidden states up to the limit beyond which they are mapped, activations of a chunk."""


def layer_bytes(spec: ModelSpec) -> int:
    """What one layer needs: eight float32 matrices as wide as its widest input (second moment, lag, and what factoring
    them holds), six float32 copies of its largest weight (target, codes, errors and the products that measure them),
    and the codes of the whole layer."""
    shapes = [shape for name, shape in spec.weights().items() if ".layers.0." in name and len(shape) == 2]
    widest, largest = max(shape[1] for shape in shapes), max(map(math.prod, shapes))
    return 4 * (8 * widest**2 + 6 * largest) + sum(map(math.prod, shapes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_random({**LLAMA_32_1B, "num_hidden_layers": args.layers, "vocab_size": SMALL_VOCABULARY}, folder)
        checkpoint = open_checkpoint(folder)
        graph = trace(checkpoint.spec)
        ids = torch.randint(SMALL_VOCABULARY, (WINDOWS, WINDOW_LENGTH), generator=torch.Generator().manual_seed(0))
        text = CalibrationText(identity="random", source="random", windows=lambda: ids)
        calibration = Calibration(recipe=Recipe(method=Method.AWQ_GPTQ), text=text, graph=graph)
        peak = matmul_flops()
        began = time.perf_counter()
        with Memory() as memory:
            store, _ = quantize(checkpoint, INT4, root=Path(scratch) / "store", calibration=calibration)
        seconds = time.perf_counter() - began
        timings = store.read_timings()
    ends = torch.randn(8192, checkpoint.spec.hidden_size)
    began = time.perf_counter()
    round_to_nearest(ends, name="", bits=8, group_size=ends.shape[1])
    ends_s_per_mparam = (time.perf_counter() - began) / ends.numel() * 1e6

    linears = {name for group in dissect(graph, 0).groups for name in group.linears}
    per_layer = sum(math.prod(checkpoint.spec.weights()[name]) for name in linears) / 1e6
    s_per_mparam = seconds / (per_layer * args.layers)
    ends_mparam = VOCABULARY * checkpoint.spec.hidden_size / 1e6
    whole = LAYERS * per_layer * s_per_mparam + ends_mparam * ends_s_per_mparam
    needed = BASE_BYTES + layer_bytes(checkpoint.spec)

    print(
        f"{args.layers} layers of {per_layer:.1f} Mparam, {WINDOWS} x {WINDOW_LENGTH} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"matmul of this machine: {peak / 1e9:.0f} GFLOP/s in float32")
    for stage, taken in sorted(timings["seconds"].items(), key=lambda item: -item[1]):
        share = timings["flops"][stage] / taken / peak if taken else 0.0
        print(f"  {stage:12} {taken:7.1f} s  {timings['flops'][stage] / 1e12:6.2f} TFLOP  {share:5.0%} of matmul speed")
    flops = sum(timings["flops"].values())
    print(f"  {'all':12} {seconds:7.1f} s  {flops / 1e12:6.2f} TFLOP  {flops / seconds / peak:5.0%} of matmul speed")
    verdict = "met" if s_per_mparam <= LIMIT_S_PER_MPARAM else "MISSED"
    print(f"{s_per_mparam:.2f} s per Mparam of the body; limit {LIMIT_S_PER_MPARAM}: {verdict}")
    print(
        f"extrapolated to {LAYERS} layers and {VOCABULARY} rows of embedding: {whole:.0f} s, "
        f"{whole / (LAYERS * per_layer + ends_mparam):.2f} s per Mparam of the model"
    )
    print(
        f"peak RssAnon {memory.anonymous_bytes / 2**30:.2f} GiB, RssFile {memory.mapped_bytes / 2**30:.2f} GiB; "
        f"formula {needed / 2**30:.2f} GiB: {'met' if memory.anonymous_bytes <= needed else 'MISSED'}"
    )
    if memory.anonymous_bytes > needed or s_per_mparam > LIMIT_S_PER_MPARAM:
        raise SystemExit(8)


def matmul_flops() -> float:
    """FLOP/s of the best of five float32 products of 2048 x 2048 x 8192."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 8192)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2.0 * 2048 * 2048 * 8192 / best


if __name__ == "__main__":
    main()
