"""What the emitters of all backends share: constants, states, casts, and coremltools' errors turned into ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from exporter.errors import ExportError, LoweringError
from exporter.quantized import CodedTensor, PalettizedTensor
from exporter.spec import TABLE_VALUES
from targets.coreml.toolchain import mb, quiet, types, without_progress_bars

_NEARLY_FULL_BYTES = 1 << 20

MilVar = Any
"""A value of the program under construction: coremltools has no types."""


class State:
    """A state of all layers, float16, and the value it has at the point that the emission has come to.

    Each update builds on the value that the one before it left. A second ``read_state`` would be the same op as the
    first, which the default passes of coremltools merge: the update would then undo every one before it.
    """

    def __init__(self, state: MilVar) -> None:
        self._state = state
        self.value = mb.read_state(input=state)

    def update(self, new: MilVar, *, begin: MilVar, end: MilVar) -> None:
        updated = mb.slice_update(x=self.value, update=new, begin=begin, end=end)
        self.value = mb.coreml_update_state(state=self._state, value=updated)


@dataclass(frozen=True, slots=True)
class Slot:
    """The part of a state that belongs to one layer: what the graph passes around as ``past_k.i`` or ``past_v.i``."""

    state: State
    layer: int


@contextmanager
def conversion(path: Path) -> Iterator[None]:
    """Around all that coremltools does to make the package at ``path``: in silence, its errors as LoweringError."""
    try:
        with quiet(), without_progress_bars():
            mb.name_count.clear()  # left over from a conversion that failed, it would give the ops other names
            yield
    except (ExportError, OSError):
        raise
    except Exception as error:  # coremltools raises whatever its builder, passes and writers happen to raise
        raise _mapped(error, path) from error


def _mapped(error: Exception, path: Path) -> Exception:
    """Our error for one of coremltools'. Its writer in C++ says "filesystem error" of any trouble with the disk."""
    if "filesystem error" in str(error):
        disk = os.statvfs(path.parent)
        number = errno.ENOSPC if disk.f_bavail * disk.f_frsize < _NEARLY_FULL_BYTES else errno.EIO
        return OSError(number, os.strerror(number), str(path))
    return LoweringError(
        f"coremltools could not make the package: {type(error).__name__}: {error}",
        hint="this is a fault of llama-export: please report it with the model's config.json",
    )


def code_arrays(name: str, stored: CodedTensor, *, kernel: bool = False) -> dict[str, NDArray[Any]]:
    """The arguments of ``decoded`` for a weight [N, K], or [N, K, 1, 1] as the ``kernel`` of a 1x1 convolution: codes
    in MIL's own int4 or int8, float16 scales [N, K / g], and offsets like codes where there are zero points; or indices
    in its uint4 and tables [N / 8, 1, 16, 1]. Raises LoweringError for scales that float16 cannot hold."""
    behind = (1, 1) if kernel else ()
    if isinstance(stored, PalettizedTensor):
        indices = stored.codes.numpy().astype(types.nptype_from_builtin(types.uint4))
        tables = stored.tables.to(torch.float16).numpy()
        return {
            "indices": indices.reshape(*stored.shape, *behind),
            "lut": tables.reshape(len(tables), 1, *behind, TABLE_VALUES, 1),
        }
    scales = stored.scales.to(torch.float16)
    if not torch.equal(scales.float(), stored.scales):
        raise LoweringError(
            f"{name} has scales that float16 cannot hold: the largest is {stored.scales.max().item():.3g}",
            hint="take --precision fp32 for this model, or another target",
        )
    parts = {"data": stored.codes, "scale": scales}
    if stored.zeros is not None:
        parts["offset"] = stored.zeros
    arrays = {key: part.numpy().reshape(*part.shape, *behind) for key, part in parts.items()}
    if stored.bits == 4:
        int4 = types.nptype_from_builtin(types.int4)
        arrays |= {key: array.astype(int4) for key, array in arrays.items() if key != "scale"}
    return arrays


def decoded(arrays: Mapping[str, NDArray[Any]], *, name: str) -> MilVar:
    """The constant that ``code_arrays`` stand for, called ``name``, decoded where it is read."""
    decoder = mb.constexpr_lut_to_dense if "lut" in arrays else mb.constexpr_blockwise_shift_scale
    return decoder(**arrays, name=name)


def dtype_of(x: MilVar) -> str:
    return str(types.builtin_to_string(x.dtype))


def cast(x: MilVar, dtype: str) -> MilVar:
    return x if dtype_of(x) == dtype else mb.cast(x=x, dtype=dtype)


def sizes_of(*sizes: int | MilVar) -> MilVar:
    """A rank-1 tensor of sizes, some of them known only when the program runs."""
    if all(isinstance(size, int) for size in sizes):
        return list(sizes)
    return mb.concat(values=[[size] if isinstance(size, int) else size for size in sizes], axis=0)


def refuse_unknown_attention(head_dim: int, *, scale: float, window: int, chunk: int, layer: int | None) -> None:
    """scaled_dot_product_attention has no scale of its own, and the mask comes from the app."""
    op = "'cross_attention'" if layer is None else f"'attention' of layer {layer}"
    found = {"scale": scale, "window": window, "chunk": chunk}
    wanted = {"scale": head_dim**-0.5, "window": 0, "chunk": 0}
    for name, value in found.items():
        if abs(value - wanted[name]) > 1e-9:
            raise LoweringError(
                f"the Core ML target cannot lower op {op}: {name} is {value:g}, only {wanted[name]:g} works",
                hint="choose another target for this model",
            )
