"""Tables of what is foreseen, of what this host can do, and of the devices that are known."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from exporter.memory import host_memory_bytes
from exporter.terminal import open_console

if TYPE_CHECKING:
    from exporter.devices import Device
    from exporter.forecast import Forecast
    from exporter.spec import ModelSpec, Plan
    from targets.base import Target


GIB = 2**30


class Standing(StrEnum):
    """What this host can do for a backend."""

    EXECUTED = "executed here"
    AUDITED = "lowered and audited"
    NEEDS = "needs something"


_STANDINGS = {Standing.EXECUTED: "green", Standing.AUDITED: "yellow", Standing.NEEDS: "red"}


def target_facts(target: Target) -> dict[str, Any]:
    """What ``targets`` tells of one backend: whether this host lowers it and runs what was lowered, and by what."""
    from exporter.errors import MissingToolError

    lacking, unrunnable = target.missing(), target.cannot_execute()
    try:
        told = lacking or unrunnable or target.runtime()
    except MissingToolError as error:
        told = lacking = f"{error} ({error.hint})"
    standing = Standing.NEEDS if lacking else Standing.AUDITED if unrunnable else Standing.EXECUTED
    return {
        "target": target.name,
        "backend": target.backend,
        "writes": target.format,
        "standing": standing.value,
        "told": told,
    }


def print_targets(facts: list[dict[str, Any]]) -> None:
    table = Table()
    for heading in ("target", "backend", "on this host", "writes", ""):
        table.add_column(heading)
    for row in facts:
        standing = Text(row["standing"], style=_STANDINGS[Standing(row["standing"])])
        table.add_row(row["target"], row["backend"], standing, row["writes"], Text(row["told"]))  # it may have brackets
    open_console().print(table)


def print_forecasts(
    forecasts: Sequence[Forecast],
    *,
    plan: Plan,
    spec: ModelSpec,
    device: Device | None,
    reasons: Sequence[str],
) -> None:
    """What was decided and why, then for each target its sums."""
    console = open_console()

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    say(f"{spec.name}: {spec.parameters:,} parameters, {plan.scheme.body}, context {plan.context:,}")
    if device:
        say(f"{device.name}: {_described(device)}")
    for reason in reasons:
        say(reason)
    for forecast in forecasts:
        say("")
        say(f"{forecast.label}", style="bold")
        if forecast.refusal:
            say(f"  refused: {forecast.refusal}", style="bold red")
        if forecast.missing:
            say(f"  missing on this host: {forecast.missing}", style="red")
        foreseen = forecast.footprint
        stored = ", ".join(f"{count} matrices {name}" for name, count in forecast.precisions.items())
        say(f"  artifact      {foreseen.artifact_bytes / 1e6:,.0f} MB: {stored}; norms fp32")
        table = Table(box=None, padding=(0, 1, 0, 2), show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column()
        for part in foreseen.parts:
            mapped = "the system may drop it" if part.mapped else ""
            table.add_row(part.name, f"{part.size_bytes / GIB:.2f} GiB", mapped)
        table.add_row("memory on the device", f"{foreseen.memory_bytes / GIB:.2f} GiB", _compared(forecast))
        console.print(table)
        if forecast.limit_bytes is not None:
            verdict = {True: "fits", False: "does not fit", None: "may fit"}[forecast.fits]
            style = {True: "green", False: "bold red", None: "yellow"}[forecast.fits]
            say(f"  {verdict}: {forecast.limit_bytes / GIB:.2f} GiB, {forecast.limit_told}", style=style)
        if forecast.decode_range:
            least, most = forecast.decode_range
            say(
                f"  decode        {least:,.0f} to {most:,.0f} tokens/s: an estimate, from memory's bandwidth and the "
                f"{foreseen.token_bytes / 1e6:,.0f} MB that a token reads"
            )
        say(
            f"  export        about {forecast.export_s:,.0f} s and {forecast.export_bytes / GIB:.1f} GiB of memory, as "
            "measured on two cores; rounding alone, before calibration and proofs"
        )
        for lint in forecast.lints:
            say(f"  note: {lint}", style="yellow")


def _compared(forecast: Forecast) -> str:
    return "" if forecast.footprint.compared else "weights and cache alone: nothing here runs it to compare with"


def _described(device: Device) -> str:
    parts = [device.chip]
    if device.ram_bytes is not None:
        parts.append(f"{device.ram_bytes / GIB:.0f} GiB")
    if device.bandwidth_bytes_per_s is not None:
        parts.append(f"{device.bandwidth_bytes_per_s / 1e9:.1f} GB/s")
    return ", ".join(parts)


def print_devices(devices: Sequence[Device]) -> None:
    table = Table()
    for heading in ("device", "chip"):
        table.add_column(heading, no_wrap=True)
    for heading in ("GiB", "of an app", "GB/s"):
        table.add_column(heading, justify="right")
    table.add_column("served by")
    for device in devices:
        app = device.app_bytes_entitled or device.app_bytes
        table.add_row(
            device.slug,
            device.chip,
            "" if device.ram_bytes is None else f"{device.ram_bytes / GIB:.0f}",
            "" if app is None else f"{app / GIB:.1f}",
            "" if device.bandwidth_bytes_per_s is None else f"{device.bandwidth_bytes_per_s / 1e9:.1f}",
            ", ".join(device.targets),
        )
    open_console().print(table)


def host_facts() -> dict[str, Any]:
    """What this host brings: processor, memory, disk, Python and the toolchains."""
    from exporter.bundle import TOOLS

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": host_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "tools": {name: version(name) for name in TOOLS},
    }


def print_host(facts: dict[str, Any]) -> None:
    console = open_console()
    tools = ", ".join(f"{name} {number}" for name, number in facts["tools"].items())
    for line in (
        f"{facts['system']}, {facts['cores']} cores, {facts['memory_bytes'] / GIB:.0f} GiB of memory, "
        f"{facts['free_disk_bytes'] / 1e9:.0f} GB of disk free here; Python {facts['python']}",
        tools,
    ):
        console.print(line, highlight=False, soft_wrap=True)
