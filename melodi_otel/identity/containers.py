"""Which container: its id out of the control group's path, or out of what its runtime has mounted.

Every runtime writes the path of a process's control group in its own manner. Where the group has a namespace of its own the
path is ``/`` and the files that the runtime mounts into the container tell instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from melodi_otel import semconv as names
from melodi_otel.identity.facts import Facts, Places, read
from melodi_otel.mountinfo import Mount, mounts_of

_PATHS: Final = 65_536
_MOUNTS: Final = 262_144

# Docker, containerd, CRI-O, podman: 64 digits; ECS on Fargate: the task's 32 and a number.
_ID: Final = re.compile(r"(?:^|[/:-])([0-9a-f]{64}|[0-9a-f]{32}-[0-9]{8,})(?=$|/|\.scope)")
# Docker's is /var/lib/docker/containers/ID/hostname, podman's …/overlay-containers/ID/userdata/hostname; either may stand on
# a filesystem of its own and then begins later.
_MOUNTED_ID: Final = re.compile(
    r"/(?:overlay-)?containers/([0-9a-f]{64})/(?:userdata/)?(?:hostname|hosts|resolv\.conf)$"
)
_RUNTIME_FILES: Final = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
_PODMAN_FIELD: Final = re.compile(r'^(name|id)="([^"\n]+)"$', re.MULTILINE)
_SYSTEM_CONTAINERS: Final = frozenset({"lxc", "lxc-libvirt", "systemd-nspawn", "openvz"})
_LXC: Final = re.compile(r"^/lxc(?:\.payload[^/]*|/[^/]+)")
_MARKS: Final = (".dockerenv", "run/.containerenv", ".singularity.d")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the kernel and the container's runtime show of where this process runs.

    Attributes:
        groups: paths of its control groups.
        mounts: what is mounted.
        container: whether it runs in one.
        system: whether that is a machine of its own (LXC, nspawn) with an own machine id.
        kubernetes: whether it is a pod's.
    """

    groups: tuple[str, ...]
    mounts: tuple[Mount, ...]
    container: bool
    system: bool
    kubernetes: bool


def surroundings(places: Places, environ: Mapping[str, str]) -> Surroundings:
    """Look around, once."""
    own = Path(places.own_procfs, "self")
    groups = _groups(read(own / "cgroup", _PATHS))
    mounts = tuple(mounts_of(read(own / "mountinfo", _MOUNTS)))
    # What a group's filesystem shows of itself says more than the path where the path is cut off.
    groups = (*groups, *(mount.root for mount in mounts if mount.kind in ("cgroup", "cgroup2") and mount.root != "/"))
    kubernetes = (
        "KUBERNETES_SERVICE_HOST" in environ
        or any("kubepods" in group for group in groups)
        or any("/pods/" in mount.root and mount.point in ("/etc/hosts", "/dev/termination-log") for mount in mounts)
        or bool(places.file("var/run/secrets/kubernetes.io/serviceaccount/namespace"))
    )
    kind = places.file("run/systemd/container").lower() or environ.get("container", "").lower()
    application = kubernetes or _id_of(groups) is not None or any(Path(places.root, mark).exists() for mark in _MARKS)
    system = not application and (kind in _SYSTEM_CONTAINERS or any(_LXC.match(group) for group in groups))
    # systemd takes WSL for a container; its machine id is as good as any.
    container = application or system or kind not in ("", "wsl")
    return Surroundings(groups, mounts, container, system, kubernetes)


def container(facts: Facts, places: Places, around: Surroundings) -> None:
    """``container.id`` and, where podman tells it, ``container.name``."""
    facts.say(names.CONTAINER_ID, _id_of(around.groups), "/proc/self/cgroup")
    if around.kubernetes:
        # Files and hostname of a pod are its sandbox's, whose id is another container's.
        return
    told = dict(_PODMAN_FIELD.findall(places.file("run/.containerenv")))
    facts.say(names.CONTAINER_ID, told.get("id"), "/run/.containerenv")
    facts.say(names.CONTAINER_NAME, told.get("name"), "/run/.containerenv")
    for mount in around.mounts:
        if mount.point in _RUNTIME_FILES and (found := _MOUNTED_ID.search(mount.root)) is not None:
            facts.say(names.CONTAINER_ID, found[1], "/proc/self/mountinfo")


def _id_of(groups: tuple[str, ...]) -> str | None:
    """The innermost id: a container may run inside another one."""
    for group in groups:
        if "conmon-" not in group and (found := _ID.findall(group)):
            return found[-1]
    return None


def _groups(text: str) -> tuple[str, ...]:
    paths = (line.split(":", 2)[2] for line in text.splitlines() if line.count(":") >= 2)
    return tuple(dict.fromkeys(path for path in paths if path not in ("", "/")))
