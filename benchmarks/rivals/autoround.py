"""Intel's auto-round: rounding learned by signed gradient descent, block by block (arXiv:2309.05516)."""

from __future__ import annotations

import time
from importlib.metadata import version

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.rivals import Outcome, RivalError, Task, body_names

BATCH_SIZE = 8  # its default


def auto_round(task: Task) -> Outcome:
    """Symmetric int4 in groups of 32, 200 iterations for each block, every other setting its default."""
    from auto_round import AutoRound

    count, length = task.windows.shape
    options = {"bits": 4, "group_size": 32, "sym": True, "iters": 200, "nsamples": count, "seqlen": length}
    windows = list(task.windows.split(BATCH_SIZE))
    compressor = AutoRound(str(task.checkpoint.folder), dataset=windows, device_map="cpu", **options)
    start = time.perf_counter()
    compressor.quantize_and_save(str(task.scratch / "auto-round"), format="auto_round")
    seconds = time.perf_counter() - start
    (file,) = task.scratch.glob("auto-round/**/*.safetensors")  # in a folder that it names after the checkpoint's
    stored = load_file(file)
    weights: dict[str, Tensor] = {}
    stored_bytes: dict[str, int] = {}
    for name in body_names(task.spec):
        prefix = name.removesuffix("weight")
        parts = [stored.pop(prefix + part) for part in ("qweight", "qzeros", "scales")]
        weights[name], stored_bytes[name] = _dequantize(*parts), sum(part.nbytes for part in parts)
    for name in task.spec.weights().keys() - weights.keys():
        weights[name], stored_bytes[name] = stored[name].float(), stored.pop(name).nbytes
    if stored:
        raise RivalError(f"auto-round's file has tensors of unknown use, {min(stored)} among them")
    return Outcome(
        version=f"auto-round {version('auto-round')}",
        options={**options, "format": "auto_round"},
        weights=weights,
        stored_bytes=stored_bytes,
        file_bytes=file.stat().st_size,
        seconds=seconds,
        notes=(
            "embedding and head are not quantized by default; they and the norms are stored as the checkpoint has them",
            "on a processor with bf16 it casts the model to bf16 and tunes it so, even a float32 checkpoint",
            "scales are fp16; zero points are stored although all are 8",
        ),
    )


def _dequantize(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """GPTQ's packing: int32 ``[K / 8, N]``, int32 ``[K / g, N / 8]``, fp16 ``[K / g, N]`` -> float32 ``[N, K]``."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    rows = scales.shape[1]
    unpacked = ((codes.unsqueeze(1) >> shifts.view(1, -1, 1)) & 0xF).reshape(-1, rows)  # [K, N]
    zero_points = ((zeros.unsqueeze(2) >> shifts) & 0xF).reshape(-1, rows) + 1  # [K / g, N]; stored less 1
    grouped = unpacked.view(len(scales), -1, rows) - zero_points.unsqueeze(1)
    return (grouped.float() * scales.float().unsqueeze(1)).reshape(-1, rows).T
