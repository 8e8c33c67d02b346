"""The phones, tablets and computers that we know: ``targets/devices.toml``, and what one of them asks of an export."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import targets
from exporter.errors import UsageError

FILE = Path(targets.__file__).with_name("devices.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One of them. A figure that nobody has published is None; ``devices.toml`` has the source of each."""

    slug: str
    name: str
    kind: str
    os: str
    chip: str
    targets: tuple[str, ...]
    """Labels that serve it, the best first."""
    why: str
    """Why the first of them."""
    os_shipped: str | None = None
    cpu_arch: str | None = None
    ram_bytes: int | None = None
    app_bytes: int | None = None
    """What one app may use."""
    app_bytes_entitled: int | None = None
    """What it may use with ``com.apple.developer.kernel.increased-memory-limit``."""
    bandwidth_bytes_per_s: int | None = None
    """Of main memory, at its peak."""
    npu: str | None = None
    soc_model: int | None = None
    htp_arch: int | None = None
    """Qualcomm's numbers for the chip and its Hexagon, as QNN takes them."""

    @property
    def limit(self) -> tuple[int, str] | None:
        """Bytes that an app gets at best, and what they are; all of the memory where nobody has published less."""
        known = (
            (self.app_bytes_entitled, "what one app may use with the increased-memory-limit entitlement"),
            (self.app_bytes, "what one app may use"),
            (self.ram_bytes, "all memory; nobody has published what one app may use"),
        )
        return next(((size, told) for size, told in known if size is not None), None)

    @property
    def limit_is_of_an_app(self) -> bool:
        return self.app_bytes_entitled is not None or self.app_bytes is not None


@cache
def load_devices() -> dict[str, Device]:
    """By slug, in the order of the file. Raises ValueError for a table that is no Device."""
    known = {field.name for field in fields(Device)}
    devices = {}
    for slug, table in tomllib.loads(FILE.read_text(encoding="utf-8")).items():
        if strange := sorted(table.keys() - known):
            raise ValueError(f"{FILE.name}: {slug} has {', '.join(strange)}, which no device has")
        content: dict[str, Any] = {**table, "targets": tuple(table["targets"])}
        devices[slug] = Device(slug=slug, **content)
    return devices


def find_device(slug: str) -> Device:
    """Raises UsageError, naming those that are spelled alike."""
    devices = load_devices()
    if slug not in devices:
        near = difflib.get_close_matches(slug.lower(), devices, n=3, cutoff=0.5)
        raise UsageError(
            f"unknown device {slug!r}" + (f"; near: {', '.join(near)}" if near else ""),
            hint=f"llama-export devices lists the {len(devices)} that are known; or say --target",
        )
    return devices[slug]
