"""``melodi-otel doctor``: what will be measured here, what not, and what would change that."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from melodi_otel.cli import doctor_hub, doctor_vllm
from melodi_otel.config import INTERNAL, VARIABLES, Config
from melodi_otel.errors import ConfigError
from melodi_otel.hub.presence import Presence
from melodi_otel.identity import Identity, identify
from melodi_otel.sources.base import Discovery
from melodi_otel.sources.discovery import UNCONFIRMED

EXAMPLE = "Example: melodi-otel doctor --json"
NOTHING, ONLY_ESTIMATED = 3, 4

_LIBRARIES = ("torch", "transformers", "vllm", "pynvml", "amdsmi", "zeus_apple_silicon", "pandas")
_DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "zeus_apple_silicon": "zeus-apple-silicon"}
_WORDS = {"gpu": "GPU", "cpu": "CPU package", "memory": "memory", "host": "whole machine"}


def doctor(
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output, for programs."),
) -> None:
    """Show which meters work here, why the others do not, and how to repair that.

    Exit codes: 0 something measures, 3 nothing does, 4 joules are only estimated, 2 a MELODI_* value cannot be used.
    """
    from melodi_otel.hub.presence import look
    from melodi_otel.identity import Places
    from melodi_otel.identity.containers import surroundings
    from melodi_otel.publishing import NAME
    from melodi_otel.runtime import Runtime
    from melodi_otel.sources.discovery import gpus_of
    from melodi_otel.telemetry.detector import find

    try:
        config = Config.from_env(os.environ)
        runtime = Runtime(config)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}) if as_json else f"melodi-otel: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    try:
        identity = find(config, os.environ, *gpus_of(runtime.discovery))
        inside = surroundings(Places(), os.environ).container
        hubs = look(config.hub, os.environ, NAME, container=inside)
        report = examine(config, runtime.discovery, os.environ, identity=identity, hubs=hubs)
    finally:
        runtime.shutdown()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    raise typer.Exit(report["exit_code"])


def examine(
    config: Config,
    discovery: Discovery,
    environ: Mapping[str, str],
    find: Callable[[str], str | None] | None = None,
    *,
    identity: Identity | None = None,
    hubs: Presence | None = None,
) -> dict[str, Any]:
    """Everything that ``doctor`` knows, as JSON-able data.

    Args:
        config: the configuration in force.
        discovery: what was found and refused.
        environ: the environment, for the variables that are set.
        find: version of a module that can be imported, or None; default: the installed ones.
        identity: whose energy it is; None: what is known of this process.
        hubs: the hubs that were looked for; None: none were.
    """
    find = find or installed
    identity = identity or identify(environ, host_id=config.host_id)
    devices = [device for source in discovery.sources for device in source.devices]
    measured = [device for device in devices if not device.estimated]
    return {
        "verdict": verdict(config, discovery),
        "exit_code": 0 if measured else (ONLY_ESTIMATED if devices else NOTHING),
        "disabled": config.disabled,
        "sources": [
            {
                "name": source.name,
                "devices": [asdict(device) for device in source.devices],
                "confirmed": source.name not in UNCONFIRMED,
                "notes": [str(note) for note in getattr(source, "notes", ())],
            }
            for source in discovery.sources
        ],
        "refusals": [asdict(refusal) for refusal in discovery.refusals],
        "identity": {
            name: {"value": list(value) if isinstance(value, tuple) else value, "from": identity.origins[name]}
            for name, value in identity.attributes.items()
        },
        "identity_notes": list(identity.notes),
        "hub": None if hubs is None else doctor_hub.as_data(hubs),
        "variables": {
            "set": {name: VARIABLES[name].shown(environ[name]) for name in sorted(environ) if name in VARIABLES},
            "unknown": sorted(
                name
                for name in environ
                if name.startswith("MELODI_") and name not in VARIABLES and name not in INTERNAL
            ),
        },
        "destinations": destinations(config, environ),
        "libraries": {name: find(name) for name in _LIBRARIES},
        "vllm": doctor_vllm.as_data(find("vllm"), environ),
        "user": {"name": environ.get("USER"), "id": os.getuid() if hasattr(os, "getuid") else None},
        "platform": {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()},
    }


def verdict(config: Config, discovery: Discovery) -> str:
    """What will be measured on this machine, in one plain sentence."""
    if config.disabled:
        return "Nothing is measured, because MELODI_DISABLED is set."
    measured = _count([d.type for d in discovery.devices if not d.estimated])
    estimated = [d for d in discovery.devices if d.estimated]
    if measured:
        return f"Each request is told its share of the measured joules of {measured}."
    if estimated:
        return "No meter works here, so joules are estimated from the load of the CPU, as you asked, and are marked so."
    helpful = next((r for r in discovery.refusals if r.fix and r.state == "permission_denied"), None)
    if helpful is not None:
        return f"Nothing is measured: {helpful.source} is there, but it may not be read. To repair: {helpful.fix}"
    text = "Nothing is measured: no meter works on this machine."
    if not sys.platform.startswith("linux"):
        return text
    return f"{text} MELODI_SOURCES=estimate estimates joules from the load of the CPU."


def _count(types: Sequence[str]) -> str:
    parts: list[str] = []
    for kind, word in _WORDS.items():
        n = types.count(kind)
        if n:
            plural = "" if n == 1 or kind == "memory" else "s"
            parts.append(f"{n} {word}{plural}" if kind != "memory" else "memory")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def destinations(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Where spans and metrics go, in words that name the variable that decides it."""
    from melodi_otel.telemetry.destinations import otlp

    return {
        "spans": otlp("TRACES", environ),
        "metrics": otlp("METRICS", environ),
        "scrape": {
            None: "off; MELODI_METRICS_ADDR=127.0.0.1:9464 serves /metrics",
            "off": "off (MELODI_METRICS_ADDR)",
        }.get(config.metrics_addr, f"http{'s' if config.metrics_tls_cert else ''}://{config.metrics_addr}/metrics"),
    }


def installed(name: str) -> str | None:
    """The version of a module that can be imported, found without importing it; None where there is none."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return version(_DISTRIBUTIONS.get(name, name))
    except PackageNotFoundError:
        return "of unknown version"
    except (ImportError, ValueError):
        return None


def show(report: Mapping[str, Any]) -> None:
    """The report for a person."""
    from melodi_otel.results.terminal import Table, console, escape

    screen = console()
    screen.print(report["verdict"], style="bold", markup=False, soft_wrap=True)
    table = Table(title="Meters", title_justify="left", header_style="bold")
    for heading in ("source", "device", "type", "what it is", "joules from"):
        table.add_column(heading, overflow="fold")
    for source in report["sources"]:
        for device in source["devices"]:
            method = device["source"] + (" (estimated)" if device["estimated"] else "")
            cells = (source["name"], device["id"], device["type"], device["name"] or "", method)
            table.add_row(*(escape(str(cell)) for cell in cells))
    if report["sources"]:
        screen.print(table)
    for source in report["sources"]:
        for note in source["notes"]:
            screen.print(f"  {source['name']}: {note}", markup=False, soft_wrap=True)
        if not source["confirmed"]:
            text = f"  {source['name']}: unconfirmed, not run on real hardware yet; see docs/meters.md"
            screen.print(text, markup=False, soft_wrap=True)
    absent = [refusal["source"] for refusal in report["refusals"] if refusal["state"] == "absent"]
    if report["refusals"]:
        screen.print("Not used", style="bold")
    if absent:
        screen.print(f"  not on this machine: {', '.join(absent)}", markup=False, soft_wrap=True)
    for refusal in report["refusals"]:
        if refusal["state"] == "absent":
            continue
        screen.print(f"  {refusal['source']} [{refusal['state']}]: {refusal['reason']}", markup=False, soft_wrap=True)
        if refusal["fix"]:
            screen.print(f"    to repair: {refusal['fix']}", markup=False, soft_wrap=True)
    screen.print("Identity", style="bold")
    for name, fact in report["identity"].items():
        value = ", ".join(fact["value"]) if isinstance(fact["value"], list) else fact["value"]
        screen.print(f"  {name}: {value} ({fact['from']})", markup=False, soft_wrap=True)
    for note in report["identity_notes"]:
        screen.print(f"  {note}", markup=False, soft_wrap=True)
    if report["hub"] is not None:
        screen.print("Hub", style="bold")
        for line in doctor_hub.lines(report["hub"]):
            screen.print(f"  {line}", markup=False, soft_wrap=True)
    screen.print("Settings", style="bold")
    for name, value in report["variables"]["set"].items():
        screen.print(f"  {name}={value}", markup=False, soft_wrap=True)
    for name in report["variables"]["unknown"]:
        screen.print(f"  {name} is unknown and ignored", markup=False, soft_wrap=True)
    if not report["variables"]["set"] and not report["variables"]["unknown"]:
        screen.print("  no MELODI_* variable is set")
    screen.print("Destinations", style="bold")
    for what, where in report["destinations"].items():
        screen.print(f"  {what}: {where}", markup=False, soft_wrap=True)
    screen.print("Libraries", style="bold")
    for name, found in report["libraries"].items():
        screen.print(f"  {name}: {found or 'not installed'}", markup=False, soft_wrap=True)
    if report["vllm"] is not None:
        for line in doctor_vllm.lines(report["vllm"]):
            screen.print(f"  {line}", markup=False, soft_wrap=True)
