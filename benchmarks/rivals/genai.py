"""onnxruntime-genai's model builder: the shortest way from a checkpoint to ONNX Runtime."""

from __future__ import annotations

import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from benchmarks.rivals import Outcome, Task, onnxfile


def build_model(source: Path, out: Path, *, precision: str, options: list[str], cache: Path) -> float:
    """The builder's ONNX file for the CPU, ``model.onnx`` in ``out``; the seconds that its quantizer took."""
    from onnxruntime_genai.models import builder  # puts its folder on sys.path, where `builders` is found  # isort: skip
    from builders.base import Model

    seconds = 0.0
    to_nbits = Model.to_nbits

    def timed(self: object) -> object:
        nonlocal seconds
        start = time.perf_counter()
        quantized = to_nbits(self)
        seconds = time.perf_counter() - start
        return quantized

    Model.to_nbits = timed  # create_model loads, builds, quantizes and saves in one call
    arguments = (None, str(source), str(out), precision, "cpu", str(cache))
    # hf_token=false: by default it asks for a login, even for a folder.
    parsed = builder.parse_extra_options(*arguments, ["hf_token=false", *options])
    builder.create_model(*arguments, **parsed)
    Model.to_nbits = to_nbits
    return seconds


def _quantize(task: Task, *, options: list[str]) -> Outcome:
    out = task.scratch / "int4"
    cache = task.scratch / "cache"
    seconds = build_model(task.checkpoint.folder, out, precision="int4", options=options, cache=cache)
    file = out / "model.onnx"
    weights, stored_bytes = onnxfile.read(file, task.spec)
    ends = "embedding and head are one quantized table" if task.spec.tie_word_embeddings else "embedding stays float32"
    return Outcome(
        version=f"onnxruntime-genai {version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}",
        options={"precision": "int4", "execution_provider": "cpu", "extra_options": options},
        weights=weights,
        stored_bytes=stored_bytes,
        file_bytes=sum(path.stat().st_size for path in file.parent.glob("model.onnx*")),
        seconds=seconds,
        notes=(f"blocks of 32; scales are float32; {ends}, as is its default",),
    )


default = partial(_quantize, options=[])  # symmetric, the scale from the largest weight of a block
k_quant = partial(_quantize, options=["algo_config=k_quant"])  # scale and zero point by llama.cpp's search
# The same, with int8 for the head and for those linears that llama.cpp's Q4_K_M gives more bits:
k_quant_mixed = partial(_quantize, options=["algo_config=k_quant_mixed"])
