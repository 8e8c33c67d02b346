"""Names of targets and their backends -> what serves them, imported only when asked for.

A *label* names one of both: ``executorch`` for the default backend, ``executorch-portable`` for another. It is the name
of the bundle's folder, and of a row in every report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from exporter.errors import UsageError
from exporter.spec import INT8_STATIC, TABLE_ROWS, ModelSpec, Plan, Precision

if TYPE_CHECKING:
    from targets.base import Target

BACKENDS: dict[str, tuple[str, ...]] = {
    "executorch": (
        *("xnnpack", "portable", "coreml", "vulkan", "mps", "arm"),
        *("openvino", "ethos-u", "vgf", "qnn", "mediatek"),
    ),
    "onnxruntime": ("cpu", "qnn", "webgpu", "wasm", "coreml", "nnapi", "xnnpack"),
    "coreml": ("gpu", "ane"),
}
"""What executes inside each target; the first is the default."""

NAMES = tuple(BACKENDS)

INT8_CACHES = {"executorch": "int8", "onnxruntime": INT8_STATIC}
"""Labels whose runtime can keep keys and values as int8, and the ``Arithmetic.kv_dtype`` that this is."""

PALETTES = ("coreml", "coreml-ane")
"""Labels that take ``Precision.LUT4``."""


def label(target: str, backend: str) -> str:
    return target if backend == BACKENDS[target][0] else f"{target}-{backend}"


LABELS = tuple(label(target, backend) for target, backends in BACKENDS.items() for backend in backends)


def load(name: str) -> Target:
    """What serves the label ``name``. Raises UsageError, naming the known ones."""
    target, backend = split(name)
    served: Target = importlib.import_module(f"targets.{target}").load(backend)
    return served


def refusal(name: str, served: Target, spec: ModelSpec, plan: Plan) -> str | None:
    """Why ``served``, behind the label ``name``, cannot carry out ``plan``, in one sentence; None if it can."""
    if plan.kv_cache and name not in INT8_CACHES:
        return f"it has no cache of {plan.kv_cache}; those that have: {', '.join(INT8_CACHES)}"
    if plan.kv_cache and INT8_CACHES[name] == INT8_STATIC and not plan.recipe.method.needs_text:
        return f"a cache of {plan.kv_cache} has scales here that a calibration text gives, and nothing is calibrated"
    palettes = {
        weight: shape[0]
        for weight, shape in spec.weights().items()
        if len(shape) == 2 and plan.scheme.precision(weight) is Precision.LUT4
    }
    if palettes and name not in PALETTES:
        return f"it takes no palettes, --precision {Precision.LUT4}; those that do: {', '.join(PALETTES)}"
    for weight, rows in palettes.items():
        if rows % TABLE_ROWS:
            return f"{TABLE_ROWS} rows share a table of --precision {Precision.LUT4}, but {weight} has {rows}"
    return served.refuse(spec, plan)


def split(name: str) -> tuple[str, str]:
    """Target and backend of a label; a backend may be told even where it is the default. Raises UsageError."""
    target = next((known for known in NAMES if name == known or name.startswith(f"{known}-")), None)
    if target is None:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(NAMES)}, all", hint="choose one with --target")
    backend = name.removeprefix(target).removeprefix("-") or BACKENDS[target][0]
    if backend not in BACKENDS[target]:
        raise UsageError(
            f"target {target} has no backend {backend!r}; known: {', '.join(BACKENDS[target])}",
            hint="choose one with --backend",
        )
    return target, backend
