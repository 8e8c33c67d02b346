"""What a run will give before any of it is done, from the shapes in ``config.json`` alone: size, memory, speed, cost.

Memory is foreseen as ``targets.footprint`` says. Time and memory of the export are straight lines through what was
measured at 1B and 8B (``docs/benchmarks.md``); decoding is told by the bandwidth of the device's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import targets
from exporter.devices import Device
from exporter.errors import CapacityError, MissingToolError
from exporter.spec import ModelSpec, Plan, Precision, WeightScheme
from exporter.systems import System, too_old
from targets.footprint import Footprint, footprint

GIB = 2**30

DECODE_SHARE = (0.4, 0.7)
"""Of the bandwidth's limit that phones were seen to reach with ExecuTorch on their CPUs, reckoned from published rates
of Llama 3.2 1B and the bytes it reads: iPhone 15 Pro 25.8 tokens/s (0.41), OnePlus 12 50.2 (0.53), Galaxy S22 44.9
(0.71); ExecuTorch's and optimum-executorch's own figures."""

APP_STORE_BYTES = 4_000_000_000
"""An app's uncompressed size at most (App Store Connect Help, Maximum build file sizes)."""

_SETUP_S = 4.0
_QUANTIZE_S = 13.1e-9
"""A parameter, rounded to nearest on two cores."""
_LOWER_S = {"onnxruntime": (0.0, 3.9e-9), "executorch": (6.3, 3.3e-9), "coreml": (3.2, 4.7e-9), "gguf": (0.0, 4.5e-9)}
"""Seconds at once and for a parameter."""
_LOWER_BYTES = {
    "onnxruntime": (0.32, 0.136),
    "executorch": (0.78, 0.60),
    "coreml": (0.60, 0.956),
    "gguf": (0.40, 0.122),
}
"""GiB of anonymous memory at once and for 1e9 parameters."""

PALETTES_MAY_CRASH = (
    "palettes with states were reported to crash after some hundred predictions (coremltools issue 2716): let this one "
    "write a few thousand tokens on the phone before you ship it"
)
_LEAST_CONTEXT = 512
_ROOMY = 4
"""int8 is chosen for a device where it takes no more than this part of what an app gets: there is no need to lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one target and backend."""

    label: str
    footprint: Footprint
    precisions: dict[str, int]
    """Weight matrices by the precision that they are stored in."""
    refusal: str | None
    """Why the target cannot take this plan."""
    missing: str | None
    lints: tuple[str, ...]
    limit_bytes: int | None
    limit_told: str
    fits: bool | None
    """None: nothing is known to compare with."""
    decode_limit: float | None
    """Tokens per second if every byte of weights came at the full bandwidth of the device's memory."""
    export_s: float
    """Rounded to nearest; calibration comes on top."""
    export_bytes: float

    @property
    def decode_range(self) -> tuple[float, float] | None:
        if self.decode_limit is None:
            return None
        least, most = DECODE_SHARE
        return least * self.decode_limit, most * self.decode_limit

    def to_json(self) -> dict[str, Any]:
        foreseen = self.footprint
        return {
            "target": self.label,
            "artifact_bytes": foreseen.artifact_bytes,
            "memory": {
                "parts": [
                    {"name": part.name, "bytes": part.size_bytes, "mapped": part.mapped} for part in foreseen.parts
                ],
                "bytes": foreseen.memory_bytes,
                "compared_with_runs": foreseen.compared,
                "limit_bytes": self.limit_bytes,
                "limit": self.limit_told,
                "fits": self.fits,
            },
            "decode_tokens_per_s_estimate": list(self.decode_range) if self.decode_range else None,
            "decode_tokens_per_s_limit": self.decode_limit,
            "export_estimate": {"seconds": self.export_s, "anonymous_bytes": self.export_bytes},
            "precisions": self.precisions,
            "refused": self.refusal,
            "missing": self.missing,
            "lints": list(self.lints),
        }


def foresee(plan: Plan, spec: ModelSpec, device: Device | None) -> list[Forecast]:
    """Of every target of the plan. Reads no weight and imports no toolchain."""
    return [_foresee(label, plan, spec, device) for label in plan.targets]


def _foresee(label: str, plan: Plan, spec: ModelSpec, device: Device | None) -> Forecast:
    target = targets.load(label)
    name, _ = targets.split(label)
    foreseen = footprint(label, spec, plan.scheme, context=plan.context, prefer=plan.prefer, kv_cache=plan.kv_cache)
    limit, told = (device.limit if device else None) or (None, "")
    once_s, each_s = _LOWER_S[name]
    once_gib, each_gib = _LOWER_BYTES[name]
    quantize_s = _QUANTIZE_S if plan.scheme.body.bits else 0.0
    return Forecast(
        label=label,
        footprint=foreseen,
        precisions=_precisions(spec, plan.scheme),
        refusal=targets.refusal(label, target, spec, plan),
        missing=target.missing(),
        lints=(*_lints(label, spec, plan.scheme, foreseen), *(_device_lints(foreseen, device) if device else ())),
        limit_bytes=limit,
        limit_told=told,
        fits=_fits(foreseen, device),
        decode_limit=device.bandwidth_bytes_per_s / foreseen.token_bytes
        if device and device.bandwidth_bytes_per_s
        else None,
        export_s=_SETUP_S + once_s + spec.parameters * (each_s + quantize_s),
        export_bytes=GIB * (once_gib + each_gib * spec.parameters / 1e9),
    )


def _fits(foreseen: Footprint, device: Device | None) -> bool | None:
    limit = device.limit if device else None
    if device is None or limit is None:
        return None
    if foreseen.memory_bytes > limit[0]:
        return False
    return True if device.limit_is_of_an_app else None


def _precisions(spec: ModelSpec, scheme: WeightScheme) -> dict[str, int]:
    matrices = [name for name, shape in spec.weights().items() if len(shape) == 2]
    return dict(Counter(scheme.precision(name).value for name in matrices))


def _lints(label: str, spec: ModelSpec, scheme: WeightScheme, foreseen: Footprint) -> list[str]:
    found = []
    if scheme.body is Precision.LUT4:
        found.append(PALETTES_MAY_CRASH)
    if label == "onnxruntime-wasm" and foreseen.artifact_bytes > 2**32:
        found.append(f"{foreseen.artifact_bytes / 1e9:.1f} GB are beyond the 4 GiB that WebAssembly addresses")
    if label == "executorch" and spec.tie_word_embeddings:
        found.append("the tied embedding is stored twice: as a table of the program, and packed for the head")
    return found


def _device_lints(foreseen: Footprint, device: Device) -> list[str]:
    found = []
    if device.os in ("ios", "ipados") and foreseen.artifact_bytes > APP_STORE_BYTES:
        found.append(
            f"{foreseen.artifact_bytes / 1e9:.1f} GB do not fit an app of 4 GB: download the bundle at first start"
        )
    entitled, plain = device.app_bytes_entitled, device.app_bytes
    if entitled is not None and plain is not None and plain < foreseen.memory_bytes <= entitled:
        found.append("the app needs the entitlement com.apple.developer.kernel.increased-memory-limit")
    return found


def refuse_what_does_not_fit(forecasts: Sequence[Forecast], device: Device) -> None:
    """Raises CapacityError for the first that needs more than the device has, with the sum."""
    for forecast in forecasts:
        if forecast.fits is False:
            assert forecast.limit_bytes is not None
            raise CapacityError(
                f"{forecast.label}: about {forecast.footprint.memory_bytes / GIB:.1f} GiB are needed on {device.name}, "
                f"which has {forecast.limit_bytes / GIB:.1f} GiB ({forecast.limit_told}): {sum_told(forecast)}",
                hint="take a smaller --context, --precision int4, --head int4, or a smaller model; llama-export plan "
                "shows each",
            )


def sum_told(forecast: Forecast) -> str:
    parts = forecast.footprint.parts
    return " + ".join(f"{part.name} {part.size_bytes / GIB:.2f}" for part in parts)


def serving(device: Device, system: System | None = None) -> tuple[str, str]:
    """The best label for the device, on that ``system``, that nothing is missing for on this host; and why. Raises
    MissingToolError."""
    passed_over: list[str] = []
    for label in device.targets:
        if label not in targets.LABELS:
            continue
        missing = targets.load(label).missing() or (too_old(label, system) if system else None)
        if missing is None:
            why = device.why if label == device.targets[0] else f"{'; '.join(passed_over) or device.why}"
            return label, why
        passed_over.append(f"not {label}: {missing}")
    raise MissingToolError(
        f"nothing on this host serves {device.name}: {'; '.join(passed_over)}",
        hint="llama-export doctor shows what can be installed",
    )


def fitting_context(label: str, spec: ModelSpec, scheme: WeightScheme, device: Device, *, wanted: int) -> int:
    """``wanted``, halved until the artifact fits the device; the least that we go to where none does."""
    context = wanted
    while context > _LEAST_CONTEXT and _fits(footprint(label, spec, scheme, context=context), device) is False:
        context = max(_LEAST_CONTEXT, context // 2)
    return context


def is_roomy_for_int8(label: str, spec: ModelSpec, scheme: WeightScheme, device: Device, *, context: int) -> bool:
    """Whether a body of int8 leaves the app most of its memory."""
    limit = device.limit
    if limit is None:
        return False
    taken = footprint(label, spec, replace(scheme, body=Precision.INT8), context=context).memory_bytes
    return taken * _ROOMY <= limit[0]
