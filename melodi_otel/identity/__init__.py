"""Where this process runs: host, processor, GPUs, container, Kubernetes pod, SLURM job.

Pure look-ups: a few small files and the environment, all of them arguments; no library, no subprocess, no network. What is
not known for certain is left out. Who speaks first is believed: ``OTEL_RESOURCE_ATTRIBUTES``, then ``MELODI_HOST_ID``, then
what somebody set for the purpose (downward API, SLURM), then what can be derived.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from melodi_otel import semconv as names
from melodi_otel.identity import kubernetes, machine, slurm
from melodi_otel.identity.containers import Surroundings, container, surroundings
from melodi_otel.identity.facts import Facts, Places, Value, read

__all__ = ["Identity", "Places", "Value", "given", "identify"]

_MACHINE_IDS: Final = ("etc/machine-id", "var/lib/dbus/machine-id")
_BOOT_ID: Final = "sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known.

    Attributes:
        attributes: resource attributes by name; what is not known is absent.
        origins: where each of them came from, for people.
        notes: what a person should know or do about them.
    """

    attributes: Mapping[str, Value] = field(default_factory=dict[str, Value])
    origins: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


def identify(
    environ: Mapping[str, str] = os.environ,
    places: Places | None = None,
    *,
    host_id: str | None = None,
    hostname: str | None = None,
    arch: str | None = None,
    gpus: Sequence[str] = (),
    driver: str | None = None,
) -> Identity:
    """Look, now. Costs ten to twenty reads of small files, less than a millisecond.

    Args:
        environ: the environment.
        places: where files are; None: where they usually are.
        host_id: ``MELODI_HOST_ID``.
        hostname: the system's name of itself; None: asked for.
        arch: the system's name of its kind of machine; None: asked for.
        gpus: model names of GPUs that the meters know, where no file tells them.
        driver: version of their driver, likewise.
    """
    places = places or Places()
    hostname = socket.gethostname() if hostname is None else hostname
    facts, notes = Facts(), list[str]()
    for name, value in given(environ).items():
        facts.say(name, value, "OTEL_RESOURCE_ATTRIBUTES")
    around = surroundings(places, environ)
    facts.say(names.HOST_ID, host_id, "MELODI_HOST_ID")
    notes += _host_id(facts, places, around)
    facts.say(names.HOST_ARCH, machine.architecture(platform.machine() if arch is None else arch), "system")
    machine.processor(facts, places, environ)
    machine.gpus(facts, places)
    facts.say(names.GPU_MODEL, tuple(dict.fromkeys(gpus)), "meters")
    facts.say(names.GPU_DRIVER_VERSION, driver, "meters")
    container(facts, places, around)
    kubernetes.pod(facts, places, environ, around, hostname)
    slurm.job(facts, environ, around)
    if around.kubernetes:
        # A pod's hostname is the pod's. The host is the node.
        facts.say(names.HOST_NAME, facts.text(names.K8S_NODE_NAME), "k8s.node.name")
        if names.K8S_NODE_NAME not in facts.values:
            notes.append("k8s.node.name is not known: hand it over as NODE_NAME by the downward API")
    facts.say(names.HOST_NAME, hostname, "hostname")
    order = [a.name for a in names.RESOURCE_ATTRIBUTES if a.name in facts.values]
    return Identity({name: facts.values[name] for name in order}, facts.origins, tuple(notes))


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of our attributes that ``OTEL_RESOURCE_ATTRIBUTES`` sets: they are the last word everywhere."""
    known = {attribute.name for attribute in names.RESOURCE_ATTRIBUTES}
    found: dict[str, str] = {}
    for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, equals, value = pair.partition("=")
        if equals and key.strip() in known and (text := unquote(value.strip())):
            found[key.strip()] = text
    return found


def _host_id(facts: Facts, places: Places, around: Surroundings) -> list[str]:
    """Say ``host.id``; what to tell a person about it.

    A container's /etc/machine-id is its image's, the same on every host that runs it, or made at its start. So there it is
    used only where the host's own file is mounted. The kernel's boot id is seen by every container of a host and by no other
    host's, without any privilege; it lasts until the next boot.
    """
    if names.HOST_ID in facts.values:
        return []
    if not around.container or around.system:
        for path in _MACHINE_IDS:
            facts.say(names.HOST_ID, _machine_id(Path(places.root, path)), f"/{path}")
        if names.HOST_ID not in facts.values:
            return ["host.id is not known: set MELODI_HOST_ID"]
        if around.system:
            return ["host.id is this container's own; set MELODI_HOST_ID to the host's where that matters"]
        return []
    mounted = {mount.point for mount in around.mounts}
    for path in _MACHINE_IDS:
        if f"/{path}" in mounted:
            facts.say(names.HOST_ID, _machine_id(Path(places.root, path)), f"/{path} (mounted)")
    if places.procfs != places.own_procfs:
        # The host's tree stands elsewhere (/host/proc): its /etc may stand beside it.
        beside = Path(places.procfs).parent / "etc/machine-id"
        facts.say(names.HOST_ID, _machine_id(beside), str(beside))
    if names.HOST_ID in facts.values:
        return []
    facts.say(names.HOST_ID, read(Path(places.own_procfs, _BOOT_ID)), f"/proc/{_BOOT_ID}")
    advice = "set MELODI_HOST_ID, or mount the host's /etc/machine-id read-only"
    if names.HOST_ID not in facts.values:
        return [f"host.id is not known, as this is a container: {advice}"]
    return [f"host.id is the kernel's boot id, which changes at a reboot, as this is a container: {advice}"]


def _machine_id(path: Path) -> str | None:
    text = read(path)
    return None if text == "uninitialized" else text
