"""Names of targets and their backends -> what serves them, imported only when asked for.

A *label* names one of both: ``executorch`` for the default backend, ``executorch-portable`` for another. It is the name
of the bundle's folder, and of a row in every report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from exporter.errors import UsageError
from exporter.spec import INT8_STATIC, TABLE_ROWS, ModelSpec, Plan, Precision, Prefer
from targets.keepers import cannot_keep

if TYPE_CHECKING:
    from targets.base import Target

BACKENDS: dict[str, tuple[str, ...]] = {
    "executorch": (
        *("xnnpack", "portable", "coreml", "vulkan", "mps", "arm"),
        *("openvino", "ethos-u", "vgf", "qnn", "mediatek"),
    ),
    "onnxruntime": ("cpu", "qnn", "webgpu", "wasm", "coreml", "nnapi", "xnnpack"),
    "coreml": ("gpu", "ane"),
    "gguf": ("llamacpp",),
}
"""What executes inside each target; the first is the default."""

NAMES = tuple(BACKENDS)
COMPILED = ("executorch", "onnxruntime", "coreml")
"""What ``all`` stands for: the targets that a toolchain lowers a graph for."""

INT8_CACHES = {"executorch": "int8", "onnxruntime": INT8_STATIC}
"""Labels whose runtime can keep keys and values as int8, and the ``Arithmetic.kv_dtype`` that this is."""

PALETTES = ("coreml", "coreml-ane")
"""Labels that take ``Precision.LUT4``."""

EXPERTS = ("executorch", "onnxruntime", "coreml", "gguf")
"""Labels that take a model with experts, and attention that differs from layer to layer."""


SEEING = ("executorch", "onnxruntime", "coreml")
"""Labels that take what looks at images (``targets.base.SeeingTarget``)."""

EMBEDDINGS_OF_THE_HEAD = ("gguf",)
"""Labels whose runtime wants an embedding as long as the head: rows of tokens that are read and never written are left
out."""

PRUNED_HEADS = ("executorch", "executorch-portable", "onnxruntime", "coreml")
"""Labels that take a head of some tokens only."""


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
    return (
        _not_taken(name, spec, plan)
        or _refusal_of_cache(name, plan)
        or _refusal_of_codes(name, plan)
        or _refusal_of_palettes(name, spec, plan)
        or served.refuse(spec, plan)
    )


def _refusal_of_cache(name: str, plan: Plan) -> str | None:
    if plan.kv_cache and name not in INT8_CACHES:
        return f"it has no cache of {plan.kv_cache}; those that have: {', '.join(INT8_CACHES)}"
    if plan.kv_cache and INT8_CACHES[name] == INT8_STATIC and not plan.recipe.method.needs_text:
        return f"a cache of {plan.kv_cache} has scales here that a calibration text gives, and nothing is calibrated"
    return None


def _refusal_of_codes(name: str, plan: Plan) -> str | None:
    for codes in plan.scheme.kept:
        if why := cannot_keep(name, codes.kind):
            return f"{why}, and {codes.names[0]} is of {codes.kind.source}, {codes.kind}: pass --requantize"
    return None


def _refusal_of_palettes(name: str, spec: ModelSpec, plan: Plan) -> str | None:
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
    return None


def _not_taken(name: str, spec: ModelSpec, plan: Plan) -> str | None:
    """Of a model that is more than dense text."""
    if spec.experts and name not in EXPERTS:
        return f"it takes dense models only, this one has experts; those that take them: {', '.join(EXPERTS)}"
    if spec.head_tokens and name not in PRUNED_HEADS:
        return f"it takes no pruned head, --head-tokens; those that do: {', '.join(PRUNED_HEADS)}"
    if not plan.images:
        return None
    if name not in SEEING:
        return f"it takes no images; those that do: {', '.join(SEEING)}; without --images it takes the text part"
    if plan.kv_cache or plan.prefer is Prefer.PREFILL or spec.head_tokens:
        option = "--kv-cache int8" if plan.kv_cache else "--head-tokens" if spec.head_tokens else "--prefer prefill"
        return f"{option} has not been tried on a model that sees images"
    return None


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
