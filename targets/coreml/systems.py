"""What each version of Apple's systems lets an ML Program hold, from coremltools' op sets.

Those are ``coremltools/converters/mil/mil/ops/defs/{iOS16,iOS17,iOS18}`` (constexpr_ops.py, compression.py, states.py),
and ``ct.utils.save_multifunction``, which asks for iOS 18.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from exporter.spec import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSupport:
    """What an ML Program may hold where it has to run on that system."""

    ios: int
    macos: int
    int8_per_row: bool
    """``constexpr_affine_dequantize`` of iOS 16, or its successor of iOS 18."""
    palettes: bool
    """``constexpr_lut_to_dense`` of iOS 16: 1 to 8 bits, one table a tensor."""
    palettes_by_rows: bool
    """Its successor of iOS 18, with a table for some rows each."""
    int4: bool
    """``constexpr_blockwise_shift_scale`` of iOS 18, per row or by blocks: iOS 16's op has no 4-bit codes."""
    states: bool
    """``read_state`` and ``MLState``: a cache that the model keeps."""
    functions: bool
    """Several functions in one package, sharing weights."""


_NOT_YET = {"palettes_by_rows": False, "int4": False, "states": False, "functions": False}
SYSTEMS = (
    SystemSupport(ios=16, macos=13, int8_per_row=True, palettes=True, **_NOT_YET),
    SystemSupport(ios=17, macos=14, int8_per_row=True, palettes=True, **_NOT_YET),
    SystemSupport(
        ios=18,
        macos=15,
        int8_per_row=True,
        palettes=True,
        palettes_by_rows=True,
        int4=True,
        states=True,
        functions=True,
    ),
)

_WORDS = {
    "states": "a cache that the model keeps (states)",
    "functions": "several functions in a package",
    "int4": "int4 weights",
    "palettes_by_rows": "palettes with several tables",
}


def lacking(ios: int, *, precisions: Iterable[Precision] = (), functions: bool) -> list[str]:
    """What a package of these precisions (with ``functions``: of several functions) holds that this iOS does not know;
    nothing where it runs."""
    known = [system for system in SYSTEMS if system.ios <= ios]
    if not known:
        return ["ML Programs with compressed weights"]
    stored = set(precisions)
    wanted = {
        "states": True,
        "functions": functions,
        "int4": Precision.INT4 in stored,
        "palettes_by_rows": Precision.LUT4 in stored,
    }
    return [_WORDS[what] for what, asked in wanted.items() if asked and not getattr(known[-1], what)]
