"""Reads the weights of a GGUF file back, for the codes verdict.

By what reads foreign files (``exporter.checkpoint.gguf_file``), which shares no code with what has written it, nor with
the ``gguf`` package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace

from gguf import GGMLQuantizationType

from exporter.checkpoint.gguf_file import GGUFCodes, read_header, read_spec, stored_tensors
from exporter.spec import Artifact, ModelSpec, Report, Verdict
from exporter.store import StoredWeight


def read_weights(artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
    """Every tensor of the model, codes in blocks of 32. Raises InputError for a file that is none of GGUF."""
    for name, tensor in stored_tensors(read_header(artifact.path), artifact.spec):
        codes = GGUFCodes(tensor)
        yield name, replace(codes.coded(), name=name) if codes.kind else tensor.read()


_NOT_SAID = ("name", "bos_token_id", "eos_token_ids", "rope", "layer_numbers")
"""Fields of a ModelSpec that a file names by its own name, by its tokenizer, or in another way, or not at all."""
_FLOAT_OFF = 1e-6


def audit(artifact: Artifact) -> Report:
    """Whether the fields of the file, read as those of any other, say the model that the artifact was made of."""
    header = read_header(artifact.path)
    said = read_spec(header)
    wrong = [
        f"{field.name} is {getattr(said, field.name)}, {getattr(artifact.spec, field.name)} was expected"
        for field in fields(ModelSpec)
        if field.name not in _NOT_SAID and not _same(getattr(said, field.name), getattr(artifact.spec, field.name))
    ]
    kinds = Counter(GGMLQuantizationType(tensor.type).name for tensor in header.tensors.values())
    return Report(
        verdict=Verdict.FAILED if wrong else Verdict.PASSED, reason="; ".join(wrong), figures={"types": dict(kinds)}
    )


def _same(one: object, other: object) -> bool:
    """But for what float32 keeps of a number."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _FLOAT_OFF * abs(other)
    return one == other
