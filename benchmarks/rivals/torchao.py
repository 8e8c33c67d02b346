"""torchao's HQQ: what ExecuTorch's Llama exporter uses unless it is told otherwise."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals import Outcome, RivalError, Task, body_names
from exporter.spec import EMBEDDING, HEAD


def hqq_scale_only(task: Task) -> Outcome:
    """int4 in groups of 32 for the body; embedding and head int8 per row, as in ExecuTorch's recipe for Llama 3.2."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig as DynamicConfig
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(task.checkpoint.folder, dtype=torch.float32)
    hqq = {"intx_choose_qparams_algorithm": "hqq_scale_only"}
    int4: torch.dtype = getattr(torch, "int4")  # noqa: B009  (torch has it, its type stubs do not)
    body = DynamicConfig(weight_dtype=int4, weight_granularity=PerGroup(32), **hqq)
    head = DynamicConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0), **hqq)
    embedding = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0), **hqq)
    start = time.perf_counter()
    quantize_(model, body, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    quantize_(model, head, lambda _, name: name == "lm_head")
    quantize_(model, embedding, lambda module, _: isinstance(module, nn.Embedding))
    seconds = time.perf_counter() - start

    # remove_duplicate=False: transformers ties the head by sharing its Parameter, torchao gives each its own.
    stored = dict(model.named_parameters(remove_duplicate=False))
    read = {name: _read(stored[name], bits=4) for name in body_names(task.spec)}
    read |= {name: _read(stored[name], bits=8) for name in (EMBEDDING, HEAD)}
    read |= {name: (stored[name], stored[name].numel() * 4) for name in stored.keys() - read.keys()}
    weights: dict[str, Tensor] = {name: weight for name, (weight, _) in read.items()}
    stored_bytes = {name: size for name, (_, size) in read.items()}
    if task.spec.tie_word_embeddings and torch.equal(weights[EMBEDDING], weights[HEAD]):
        del weights[HEAD]  # the same numbers; its bytes count all the same, since a .pte has both
        stored_bytes[EMBEDDING] += stored_bytes.pop(HEAD)
    return Outcome(
        version=f"torchao {version('torchao')}",
        options={**hqq, "body": "8da4w, PerGroup(32)", "head": "8da8w, PerAxis(0)", "embedding": "int8, PerAxis(0)"},
        weights=weights,
        stored_bytes=stored_bytes,
        file_bytes=sum(stored_bytes.values()),
        seconds=seconds,
        notes=(
            "group scales are rounded to bf16, as ExecuTorch's XNNPACK backend does when it writes them",
            "no .pte is written: bytes are counted as its tensors store them (int4 packed, bf16 group scales, float32 "
            "row scales, embedding and head apart), without the program",
            "activations, which this scheme rounds to int8 when it runs, are not part of the comparison",
        ),
    )


def _read(stored: Any, *, bits: int) -> tuple[Tensor, int]:
    """A torchao tensor as float32 ``[N, K]``, and the bytes that a .pte has for it."""
    if bool(stored.zero_point.any()):
        raise RivalError("torchao's symmetric scheme has zero points other than 0, which XNNPACK would drop")
    scales = stored.scale.reshape(stored.shape[0], -1)  # [N, K / g], or [N, 1] for one per row
    if bits == 4:
        scales = scales.to(torch.bfloat16)
    grouped = stored.qdata.reshape(*scales.shape, -1).float()
    weight = (grouped * scales.float().unsqueeze(-1)).reshape(stored.shape)
    return weight, stored.numel() * bits // 8 + scales.numel() * scales.element_size()
