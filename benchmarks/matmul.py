"""How fast one core multiplies: ONNX Runtime's int4 product by rows of its input, beside what else it can do.

``python -m benchmarks.matmul`` prints a Markdown table of 1e9 operations (a product and a sum are two) in a second, the
best of seven, for the shape of Llama-3.2-1B's ``gate_proj``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

COLUMNS, OUTPUTS = 2048, 8192
ROWS = (1, 4, 16, 128, 512)
REPETITIONS = 7

Multiply = Callable[[int], Any]
"""Multiplies that many rows once."""


def main() -> None:
    torch.set_num_threads(1)
    print(f"| {COLUMNS} x {OUTPUTS}, one thread; rows: | " + " | ".join(map(str, ROWS)) + " |")
    print("|-|" + "-:|" * len(ROWS))
    for name, multiply in kernels():
        rates = (2 * rows * COLUMNS * OUTPUTS / seconds(multiply, rows) / 1e9 for rows in ROWS)
        print(f"| {name} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")


def kernels() -> Iterator[tuple[str, Multiply]]:
    generator = np.random.default_rng(0)
    for block in (32, 128):
        codes = generator.integers(0, 256, (OUTPUTS, COLUMNS // block, block // 2), dtype=np.uint8)
        scales = generator.random(OUTPUTS * COLUMNS // block, dtype=np.float32)
        attributes = {"K": COLUMNS, "N": OUTPUTS, "bits": 4, "block_size": block, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **attributes)
        session = open_node(node, {"b": codes, "s": scales}, TensorProto.FLOAT, TensorProto.FLOAT)
        yield f"MatMulNBits, int4 in blocks of {block}, int8 activations", runs(session, np.float32)
    node = helper.make_node("MatMulInteger", ["x", "b"], ["y"])
    weight = generator.integers(-127, 128, (COLUMNS, OUTPUTS), dtype=np.int8)
    session = open_node(node, {"b": weight}, TensorProto.UINT8, TensorProto.INT32)
    yield "MatMulInteger, uint8 by int8", runs(session, np.uint8)
    full = torch.randn(OUTPUTS, COLUMNS)
    yield "torch, float32", lambda rows: torch.nn.functional.linear(torch.ones(rows, COLUMNS), full)


def open_node(node: Any, constants: dict[str, np.ndarray], taken: int, given: int) -> ort.InferenceSession:
    graph = helper.make_graph(
        [node],
        "one product",
        [helper.make_tensor_value_info("x", taken, ["rows", COLUMNS])],
        [helper.make_tensor_value_info("y", given, ["rows", OUTPUTS])],
        [
            helper.make_tensor(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.tobytes(), raw=True
            )
            for name, value in constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runs(session: ort.InferenceSession, dtype: type[np.generic]) -> Multiply:
    return lambda rows: session.run(None, {"x": np.ones((rows, COLUMNS), dtype)})


def seconds(multiply: Multiply, rows: int) -> float:
    """Of the fastest run, after one that does not count."""
    multiply(rows)
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        multiply(rows)
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
