"""The schemes of ours that are measured, by the names that they have in the report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.ours import INT4
from benchmarks.peers import CONTEXT
from exporter.spec import Precision, Prefer, WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A scheme, and the words by which ``benchmarks.export_once`` knows it."""

    words: tuple[str, ...] = ()
    scheme: WeightScheme = INT4
    context: int = CONTEXT
    prefer: Prefer = Prefer.QUALITY


_INT8 = replace(INT4, body=Precision.INT8)
_LONG_CONTEXT = 4096
LONG = f"int4, context {_LONG_CONTEXT}"
PREFILL = "int8, prefill preferred"
VARIANTS: dict[str, Variant] = {
    "int4": Variant(),
    "int8": Variant(words=("--precision", "int8"), scheme=_INT8),
    "int4, head int4": Variant(
        words=("--head", "int4"), scheme=replace(INT4, head=Precision.INT4, embedding=Precision.INT4)
    ),
    "int4, groups of 128": Variant(words=("--group-size", "128"), scheme=replace(INT4, group_size=128)),
    LONG: Variant(words=("--context", str(_LONG_CONTEXT)), context=_LONG_CONTEXT),
    PREFILL: Variant(words=("--precision", "int8", "--prefer", "prefill"), scheme=_INT8, prefer=Prefer.PREFILL),
}
"""An int4 head of a model whose embedding is tied to it, as at 1B and 3B."""
