"""The layer-by-layer driver: fills a WeightStore, one decoder layer in memory at a time, resuming where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from calibration.rtn import round_to_nearest
from exporter.checkpoint import Checkpoint
from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import WeightScheme
from exporter.store import StoreKey, WeightStore

ALGORITHM = "round-to-nearest, MSE scale search"


def quantize(
    checkpoint: Checkpoint, scheme: WeightScheme, *, root: Path, on_part: Callable[[int, int], None] | None = None
) -> tuple[WeightStore, int]:
    """A complete store for ``checkpoint`` under ``scheme`` in the folder ``root``, and how many parts it had to make.

    A part is one decoder layer, or the ends (embedding and head); 0 made means that the whole store was found there.
    ``on_part(done, total)`` is called after each part. Raises InputError for a weight that is not finite.
    """
    key = StoreKey(source_sha256=checkpoint.sha256, scheme=scheme, algorithm=ALGORITHM)
    store = WeightStore(checkpoint=checkpoint, key=key, root=root)
    parts = [layer for layer in (*range(checkpoint.spec.num_hidden_layers), None) if store.quantized_names(layer)]
    made = 0
    for done, layer in enumerate(parts, start=1):
        if not store.part_file(layer).exists():
            _quantize_part(store, layer)
            made += 1
        if on_part:
            on_part(done, len(parts))
    if made:
        store.write_summary()
    return store, made


def _quantize_part(store: WeightStore, layer: int | None) -> None:
    tensors, errors = [], {}
    for name in store.quantized_names(layer):
        weight = store.checkpoint.read(name)
        if not torch.isfinite(weight).all():
            raise InputError(
                f"{name} holds values that are not finite, which no integer code can stand for",
                hint="check the checkpoint: it may have been cut off, or have diverged in training",
            )
        bits = store.scheme.precision(name).bits
        assert bits is not None  # quantized_names gives no other
        group_size = store.scheme.groups(name, columns=weight.shape[1])
        tensor = round_to_nearest(weight, name=name, bits=bits, group_size=group_size)
        errors[name] = relative_error(weight, tensor)
        tensors.append(tensor)
    store.write_part(layer, tensors, errors=errors)


def relative_error(weight: Tensor, quantized: QuantizedTensor) -> float:
    """|W - Q|^2 / |W|^2 in Frobenius norm, row by row in blocks so that no second float copy of W is held."""
    error = total = 0.0
    rows = max(1, (1 << 22) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        codes = quantized.codes[start : start + rows].view(len(part), -1, quantized.group_size)
        decoded = (codes.float() * quantized.scales[start : start + rows].unsqueeze(-1)).view_as(part)
        error += (part - decoded).square().sum().item()
        total += part.square().sum().item()
    return error / total if total else 0.0
