"""What a phone said of a bundle: its self-test's report, judged by the same gates, and kept in the manifest; and such a
report of this host, for a bundle that is kept elsewhere."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exporter.bundle import MANIFEST, Goldens, as_bytes, open_bundle, read_artifact, write_json
from exporter.checkpoint.config import read_json
from exporter.errors import InputError
from exporter.files import sha256, written_whole
from exporter.parity import judge, structure_figures
from exporter.spec import Report, Verdict

SCHEMA = "llama-export/device-report/1"
DEVICES = "devices"

_PARITY = {
    "positions": int,
    "mean_kl_nats": float,
    "worst_kl_nats": float,
    "top1_agreement": float,
    "decided_top1_agreement": float,
    "decided_positions": int,
    "max_abs_logit_diff": float,
}
_LATENCY = ("load_s", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
_RUNS = ("prompt_tokens", "decoded_tokens", "threads", "runs")
_TEST_AGAIN = "run the self-test of the sample app again with this bundle"


def fold(bundle: Path, report: Path) -> dict[str, Any]:
    """Judge the ``device-report.json`` of an app, and put it into the bundle's manifest in place of an earlier one of
    the same device, system and runtime. Gives what was put there, with its verdicts.

    Raises InputError for a bundle that is not whole, and for a report that is none or is of another bundle: then the
    manifest stays as it was.
    """
    manifest = open_bundle(bundle)
    told = read_json(report, missing=_TEST_AGAIN, broken=_TEST_AGAIN)
    _check(told, report, bundle=bundle, manifest=manifest)
    parity = _parity(told, bundle=bundle, manifest=manifest)
    latency = _latency(told)
    entry = {
        "device": told["device"],
        "parity": parity.to_json(),
        "latency": latency.to_json(),
        "greedy": told.get("greedy"),
        "chats": told.get("chats"),
        "peak_memory_bytes": told.get("peak_memory_bytes"),
        "report_sha256": sha256(report),
    }
    others = [one for one in manifest.get(DEVICES, ()) if _identity(one["device"]) != _identity(told["device"])]
    devices = sorted([*others, entry], key=lambda one: _identity(one["device"]))
    with written_whole(bundle / MANIFEST) as temporary:
        write_json(temporary, {**manifest, DEVICES: devices})
    return entry


def report_of_this_host(bundle: Path, proven: Mapping[str, Any]) -> dict[str, Any]:
    """What ``validate`` has found of a bundle here, as a phone would tell it. ``proven``: its manifest, but with what
    this host has found."""
    parity, latency = proven["parity"], proven["latency"]
    return {
        "schema": SCHEMA,
        "manifest_sha256": _sha256_as_exported(read_json(bundle / MANIFEST)),
        "device": {
            "model": platform.machine(),
            "os": platform.platform(),
            "runtime": parity["runtime"],
            "app": f"llama-export {version('llama-export')}",
        },
        "parity": {name: parity[name] for name in _PARITY},
        "greedy": None,
        "chats": None,
        "latency": {name: latency[name] for name in (*_LATENCY, *_RUNS)},
        "peak_memory_bytes": None,
        "reason": "validate compares logits, and measures no peak of memory",
    }


def _check(told: Mapping[str, Any], report: Path, *, bundle: Path, manifest: Mapping[str, Any]) -> None:
    if told.get("schema") != SCHEMA:
        raise InputError(
            f"{report}: schema is {told.get('schema')!r}, {SCHEMA!r} was expected",
            hint="name the device-report.json that the sample app has written",
        )
    device = told.get("device")
    if not isinstance(device, dict) or not all(isinstance(device.get(key), str) for key in ("model", "os", "runtime")):
        raise InputError(f"{report} does not say which device, system and runtime it is of", hint=_TEST_AGAIN)
    known = {sha256(bundle / MANIFEST), _sha256_as_exported(manifest)}
    if told.get("manifest_sha256") not in known:
        raise InputError(
            f"{report} is of the manifest {told.get('manifest_sha256')}, that of {bundle} is {sorted(known)[0]}",
            hint="the device has another bundle: copy this one there and test again",
        )


def _sha256_as_exported(manifest: Mapping[str, Any]) -> str:
    """Of the manifest as it was before any device was kept in it: the same, whatever others have said meanwhile."""
    exported = {key: value for key, value in manifest.items() if key != DEVICES}
    return hashlib.sha256(as_bytes(exported)).hexdigest()


def _parity(told: Mapping[str, Any], *, bundle: Path, manifest: Mapping[str, Any]) -> Report:
    found = _measured(told, "parity")
    runtime = f"{told['device']['runtime']} on {told['device']['model']}, {told['device']['os']}"
    absent: dict[str, Any] = {"runtime": runtime, **dict.fromkeys(_PARITY), **structure_figures(None)}
    if found is None:
        return Report(verdict=Verdict.NOT_MEASURED, reason=_reason(told, "parity"), figures=absent)
    figures = {name: _number(found, name, kind) for name, kind in _PARITY.items()}
    goldens = Goldens.read(bundle)
    judged = judge(
        {
            "runtime": runtime,
            **figures,
            "decided_positions": goldens.logits.decided_positions,
            **goldens.floor.figures(),
            **structure_figures(None),
        },
        artifact=read_artifact(manifest, path=bundle),
    )
    faults = [judged.reason] if judged.reason else []
    if figures["positions"] != len(goldens.drive.positions):
        faults.append(f"{figures['positions']} positions were tested, the goldens have {len(goldens.drive.positions)}")
    for kind, what in (("greedy", "greedy tokens"), ("chats", "chat renders")):
        if counts := _measured(told, kind):
            compared, agreeing = _number(counts, "compared", int), _number(counts, "agreeing", int)
            if agreeing < compared:
                faults.append(f"{compared - agreeing} of {compared} {what} are not the goldens'")
    verdict = Verdict.FAILED if faults else Verdict.PASSED
    return Report(verdict=verdict, reason="; ".join(faults), figures=judged.figures)


def _latency(told: Mapping[str, Any]) -> Report:
    found = _measured(told, "latency")
    if found is None:
        figures: dict[str, Any] = dict.fromkeys(_LATENCY)
        return Report(verdict=Verdict.NOT_MEASURED, reason=_reason(told, "latency"), figures=figures)
    figures = {name: _number(found, name, float) for name in _LATENCY if found.get(name) is not None}
    extra = {name: value for name, value in found.items() if name not in figures and isinstance(value, int | float)}
    return Report(verdict=Verdict.PASSED, figures={**dict.fromkeys(_LATENCY), **figures, **extra})


def _measured(told: Mapping[str, Any], kind: str) -> Any:
    """A part of the report, or None where all its figures are absent."""
    part = told.get(kind)
    absent = isinstance(part, dict) and all(value is None for name, value in part.items() if name != "reason")
    return None if absent else part


def _reason(told: Mapping[str, Any], kind: str) -> str:
    part = told.get(kind)
    reason = part.get("reason") if isinstance(part, dict) else told.get("reason")
    return str(reason or f"the device report has no {kind}")


def _number(found: Any, name: str, kind: type[int] | type[float]) -> Any:
    value: Any = found.get(name) if isinstance(found, dict) else None
    wanted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not 0 <= value < math.inf:
        raise InputError(
            f"the device report has {value!r} for {name}, {'a count' if kind is int else 'a number'} was expected",
            hint=_TEST_AGAIN,
        )
    return value


def _identity(device: Mapping[str, Any]) -> tuple[str, str, str]:
    return device["model"], device["os"], device["runtime"]
