"""``make bench-calibration``: time and memory of the default calibration on layers of Llama-3.2-1B's shape.

A model of a few such layers, with random weights and a small vocabulary, is calibrated on 32 windows of 512 tokens. A
layer costs the same whatever stands before it, so the whole model is extrapolated: its number of layers times the
seconds of one, and embedding and head by the seconds per parameter of rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.ours import INT4
from calibration.anatomy import dissect
from calibration.layers import Calibration, CalibrationText, quantize
from calibration.rtn import round_to_nearest
from exporter.checkpoint import open_checkpoint
from exporter.checkpoint.config import read_spec
from exporter.model.trace import trace
from exporter.spec import Method, ModelSpec, Recipe

LLAMA_32_1B = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": True},
}
"""The figures of the released config.json, but for the layers and the vocabulary."""
LAYERS, VOCABULARY = 16, 128256
SMALL_VOCABULARY = 4096
WINDOWS, WINDOW_LENGTH = 32, 512
LIMIT_S_PER_MPARAM = 2.0
BASE_BYTES = 3 << 29
"""1.5 GiB: interpreter, torch, hidden states up to the limit beyond which they are mapped, activations of a chunk."""


class Memory:
    """Peak of anonymous and of mapped memory while the block runs, from /proc/self/status every 10 ms."""

    def __enter__(self) -> Memory:
        self.anonymous_bytes = self.mapped_bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous_bytes = max(self.anonymous_bytes, int(lines["RssAnon"].split()[0]) * 1024)
            self.mapped_bytes = max(self.mapped_bytes, int(lines["RssFile"].split()[0]) * 1024)


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
        write_random(folder, layers=args.layers)
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


def write_random(folder: Path, *, layers: int) -> None:
    """A checkpoint with normal weights in bf16, scaled as a fresh Llama's."""
    config = {**LLAMA_32_1B, "model_type": "llama", "num_hidden_layers": layers, "vocab_size": SMALL_VOCABULARY}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500000.0}))
    shapes = read_spec(folder).weights()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.ones(shape)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")


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
