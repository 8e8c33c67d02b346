"""onnxruntime.quantization's weight-only GPTQ and HQQ, on the float32 graph that onnxruntime-genai builds.

That graph is the whole model, so that GPTQ sees the inputs that each MatMul really gets; both take any ONNX model, but
neither comes with a way from a checkpoint to one.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import (
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from benchmarks.rivals import Outcome, Task, genai, onnxfile

BLOCK_SIZE = 32


def gptq(task: Task) -> Outcome:
    """GPTQ at its default settings: asymmetric, damping 0.01, no act-order."""
    # A list does as CalibrationDataReader: it is copied and iterated over, nothing else.
    algorithm = GPTQWeightOnlyQuantConfig(calibration_data_reader=graph_inputs(task))
    note = (
        "onnxruntime 1.31's GPTQ indexes its upper Cholesky factor as if it were lower, so that no error is carried on "
        "to later columns: this is rounding to nearest, whatever windows it is given"
    )
    return _quantize(task, algorithm=algorithm, name="GPTQWeightOnlyQuantConfig()", note=note)


def hqq(task: Task) -> Outcome:
    algorithm = HQQWeightOnlyQuantConfig(block_size=BLOCK_SIZE, bits=4)
    note = "zero points are float32, one for each block, which costs a whole bit per weight"
    return _quantize(task, algorithm=algorithm, name="HQQWeightOnlyQuantConfig(block_size=32, bits=4)", note=note)


def graph_inputs(task: Task) -> list[dict[str, np.ndarray]]:
    """The calibration windows, one at a time, with an empty key-value cache."""
    empty = np.zeros((1, task.spec.num_key_value_heads, 0, task.spec.head_dim), np.float32)
    layers = range(task.spec.num_hidden_layers)
    cache = {f"past_key_values.{layer}.{part}": empty for layer in layers for part in ("key", "value")}
    windows = task.windows.unsqueeze(1).numpy()  # [W, 1, T]
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids), **cache} for ids in windows]


def _quantize(task: Task, *, algorithm: Any, name: str, note: str) -> Outcome:
    out = task.scratch / "fp32"
    genai.build_model(task.checkpoint.folder, out, precision="fp32", options=[], cache=task.scratch / "cache")
    source = out / "model.onnx"
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=BLOCK_SIZE, algo_config=algorithm)
    start = time.perf_counter()
    quantizer.process()
    seconds = time.perf_counter() - start
    file = task.scratch / "quantized" / "model.onnx"
    file.parent.mkdir()
    quantizer.model.save_model_to_file(str(file), use_external_data_format=True)
    weights, stored_bytes = onnxfile.read(file, task.spec)
    return Outcome(
        version=f"onnxruntime {version('onnxruntime')}",
        options={"algo_config": name, "block_size": BLOCK_SIZE},
        weights=weights,
        stored_bytes=stored_bytes,
        file_bytes=sum(path.stat().st_size for path in file.parent.iterdir()),
        seconds=seconds,
        notes=(note, "scales are float32; the head is quantized like the body, the embedding, a Gather, stays float32"),
    )
