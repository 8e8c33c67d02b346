"""The codes verdict: what lies in the artifact's file is what the store holds, bit for bit, every tensor and no other.

It is the only proof that sees one wrong scale: the KL of a whole model does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from exporter.quantized import PalettizedTensor, QuantizedTensor
from exporter.spec import Report, Verdict, WeightScheme
from exporter.store import StoredWeight, WeightStore

_SHOWN = 3


def weight_digests(store: WeightStore) -> dict[str, str]:
    """The digest of every tensor of the model as the store holds it."""
    return {name: digest(store[name]) for name in store}


def digest(weight: StoredWeight) -> str:
    """SHA-256 of a stored tensor: kind, shape, and every bit of its codes with scales or tables, or of its floats."""
    if isinstance(weight, QuantizedTensor):
        header = f"int{weight.bits} {weight.shape} group {weight.group_size}"
        header += "" if weight.zeros is None else " with zero points"
        tensors = [weight.codes, weight.scales.float(), *([] if weight.zeros is None else [weight.zeros])]
    elif isinstance(weight, PalettizedTensor):
        header = f"lut4 {weight.shape}"
        tensors = [weight.codes, weight.tables.float()]
    else:
        header = f"{weight.dtype} {tuple(weight.shape)}"
        tensors = [weight]
    result = hashlib.sha256(header.encode())
    for tensor in tensors:
        result.update(tensor.contiguous().numpy().data)
    return result.hexdigest()


def check_codes(
    found: Iterable[tuple[str, StoredWeight]], *, expected: Mapping[str, str], scheme: WeightScheme
) -> Report:
    """Compare weights read back from an artifact with the ``expected`` digests; one stored twice counts once."""
    seen: set[str] = set()
    wrong: dict[str, str] = {}
    for name, weight in found:
        seen.add(name)
        if name not in expected:
            wrong[name] = "is not a weight of the model"
        elif digest(_in_scheme_groups(weight, scheme, name=name)) != expected[name]:
            wrong[name] = f"differs from the store ({_describe(weight)})"
    wrong |= dict.fromkeys(expected.keys() - seen, "is missing")
    figures = {"tensors": len(seen), "wrong": sorted(wrong)}
    if not wrong:
        return Report(verdict=Verdict.PASSED, figures=figures)
    shown = "; ".join(f"{name} {what}" for name, what in sorted(wrong.items())[:_SHOWN])
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return Report(verdict=Verdict.FAILED, reason=shown + more, figures=figures)


def _in_scheme_groups(weight: StoredWeight, scheme: WeightScheme, *, name: str) -> StoredWeight:
    """The same codes in the scheme's groups, where a target repeats one scale for each of its finer blocks."""
    if not isinstance(weight, QuantizedTensor) or not scheme.precision(name).bits:
        return weight
    group_size = scheme.groups(name, columns=weight.shape[1])
    repeats = group_size // weight.group_size
    if repeats <= 1:
        return weight
    parts = [weight.scales, *([] if weight.zeros is None else [weight.zeros])]
    blocks = [part.unflatten(1, (-1, repeats)) for part in parts]
    if not all((block == block[..., :1]).all() for block in blocks):
        return weight  # the scales of one group differ: its digest will not be the expected one
    scales, zeros = (*(block[..., 0].contiguous() for block in blocks), None)[:2]
    return replace(weight, group_size=group_size, scales=scales, zeros=zeros)


def _describe(weight: StoredWeight) -> str:
    if isinstance(weight, QuantizedTensor):
        points = "" if weight.zeros is None else ", with zero points"
        return f"int{weight.bits} in groups of {weight.group_size}{points}"
    if isinstance(weight, PalettizedTensor):
        return "indices into tables"
    return str(weight.dtype).removeprefix("torch.")
