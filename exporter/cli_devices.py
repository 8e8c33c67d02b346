"""The commands that look ahead: what a run will give on a device, what this host can do, which devices are known."""

from __future__ import annotations

import json
from typing import Any

import typer

from exporter.cli_bundle import JsonOption
from exporter.cli_options import (
    BackendOption,
    CheckpointArgument,
    ContextOption,
    DeviceOption,
    GroupSizeOption,
    HeadOption,
    HeadTokensOption,
    KvCacheOption,
    PrecisionOption,
    PreferOption,
    RequantizeOption,
    RulesOption,
    SystemOption,
    TargetOption,
)
from exporter.reporting import reporting


def add_device_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(name="plan")(plan)
    app.command(name="targets")(list_targets)
    app.command()(doctor)
    app.command()(devices)


def plan(
    checkpoint: CheckpointArgument = None,
    *,
    target: TargetOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    system: SystemOption = None,
    precision: PrecisionOption = None,
    prefer: PreferOption = None,
    head: HeadOption = None,
    head_tokens: HeadTokensOption = None,
    group_size: GroupSizeOption = None,
    rules: RulesOption = None,
    context: ContextOption = None,
    kv_cache: KvCacheOption = None,
    requantize: RequantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Foresee an export from the checkpoint's config alone: size, memory on the device, speed, cost (exit 5: it will
    not fit)."""
    with reporting() as progress:
        from exporter.checkpoint import BUNDLED_MODEL, read_spec
        from exporter.checkpoint.pruned import read_head_tokens
        from exporter.devices import find_device
        from exporter.forecast import foresee, refuse_what_does_not_fit
        from exporter.kept import kept_scheme
        from exporter.planning import plan as make_plan
        from exporter.planning import settle
        from exporter.recipe import asked_for
        from exporter.report_devices import print_forecasts

        folder = checkpoint or BUNDLED_MODEL
        tokens = read_head_tokens(head_tokens) if head_tokens else None
        spec = read_spec(folder, decoded=bool(requantize), head_tokens=tokens or ())
        asked = asked_for(
            target=target or (None if device else "all"),
            backend=backend,
            device=device,
            os=system,
            precision=precision,
            prefer=prefer,
            head=head,
            head_tokens=tokens,
            group_size=group_size,
            rule=rules or None,
            context=context,
            kv_cache=kv_cache,
            requantize=requantize,
        )
        choices, reasons = settle(asked, spec, kept=kept_scheme(folder, asked, spec))
        made = make_plan(folder, **choices)
        known = find_device(device) if device else None
        forecasts = foresee(made, spec, known)
        if as_json:
            found = {"choices": choices, "why": reasons, "forecasts": [forecast.to_json() for forecast in forecasts]}
            typer.echo(json.dumps(found, indent=2))
        else:
            progress.silence()
            print_forecasts(forecasts, plan=made, spec=spec, device=known, reasons=reasons)
        if known:
            refuse_what_does_not_fit(forecasts, known)


def list_targets(*, as_json: JsonOption = False) -> None:
    """List targets and backends: what each writes, and what this host can do for it."""
    with reporting():
        import targets
        from exporter.report_devices import print_targets, target_facts

        facts = [target_facts(targets.load(label)) for label in targets.LABELS]
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_targets(facts)


def doctor(*, as_json: JsonOption = False) -> None:
    """Check this host: memory, disk, the versions of the toolchains, and for every backend what is missing."""
    with reporting():
        import targets
        from exporter.report_devices import host_facts, print_host, print_targets, target_facts

        host = host_facts()
        facts = [target_facts(targets.load(label)) for label in targets.LABELS]
    if as_json:
        typer.echo(json.dumps({"host": host, "backends": facts}, indent=2))
    else:
        print_host(host)
        print_targets(facts)


def devices(*, as_json: JsonOption = False) -> None:
    """List the devices that --device knows."""
    with reporting():
        from dataclasses import asdict

        from exporter.devices import load_devices
        from exporter.report_devices import print_devices

        known = load_devices()
    if as_json:
        found: list[dict[str, Any]] = [asdict(device) for device in known.values()]
        typer.echo(json.dumps(found, indent=2))
    else:
        print_devices([*known.values()])
