"""Which pod: what the downward API was told to hand over, then what the kubelet has left to be seen.

Names of variables such as ``NODE_NAME`` are used elsewhere too (by Jenkins, for one): they are believed in a pod only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from melodi_otel import semconv as names
from melodi_otel.identity.containers import Surroundings
from melodi_otel.identity.facts import Facts, Places

VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    names.K8S_CLUSTER_NAME: ("K8S_CLUSTER_NAME", "KUBERNETES_CLUSTER_NAME", "CLUSTER_NAME"),
    names.K8S_NODE_NAME: (
        "OTEL_RESOURCE_ATTRIBUTES_NODE_NAME",
        "K8S_NODE_NAME",
        "KUBERNETES_NODE_NAME",
        "KUBE_NODE_NAME",
        "MY_NODE_NAME",
        "NODE_NAME",
    ),
    names.K8S_NAMESPACE_NAME: (
        "K8S_NAMESPACE",
        "K8S_NAMESPACE_NAME",
        "K8S_POD_NAMESPACE",
        "KUBERNETES_NAMESPACE",
        "MY_POD_NAMESPACE",
        "POD_NAMESPACE",
    ),
    names.K8S_POD_NAME: (
        "OTEL_RESOURCE_ATTRIBUTES_POD_NAME",
        "K8S_POD_NAME",
        "KUBERNETES_POD_NAME",
        "MY_POD_NAME",
        "POD_NAME",
    ),
    names.K8S_POD_UID: (
        "OTEL_RESOURCE_ATTRIBUTES_POD_UID",
        "K8S_POD_UID",
        "KUBERNETES_POD_UID",
        "MY_POD_UID",
        "POD_UID",
    ),
    names.K8S_CONTAINER_NAME: ("K8S_CONTAINER_NAME", "MY_CONTAINER_NAME", "CONTAINER_NAME"),
}
"""Attribute -> variables, the most telling name first; the ``OTEL_…`` ones are those of the OpenTelemetry operator."""

_VOLUME: Final = "etc/podinfo"
_VOLUME_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    names.K8S_NAMESPACE_NAME: ("namespace", "pod_namespace"),
    names.K8S_POD_NAME: ("name", "pod_name"),
    names.K8S_POD_UID: ("uid", "pod_uid"),
}
_NAMESPACE: Final = "var/run/secrets/kubernetes.io/serviceaccount/namespace"

_UID: Final = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"  # 32 digits: a static pod
_GROUP_UID: Final = re.compile(rf"(?:^|[/-])pod({_UID})(?=$|[/:]|\.slice)")
_MOUNTED_UID: Final = re.compile(rf"(?:^|/)pods/({_UID})/(?:etc-hosts|containers/([^/]+)/[0-9a-f]+)$")
_HOST_NETWORK: Final = "# Kubernetes-managed hosts file (host network)"
_LONGEST_HOSTNAME: Final = 63


def pod(facts: Facts, places: Places, environ: Mapping[str, str], around: Surroundings, hostname: str) -> None:
    """The ``k8s.*`` attributes; nothing outside a pod.

    Args:
        facts: where they are said.
        places: where to look.
        environ: the environment.
        around: what the process sees of its container.
        hostname: the system's.
    """
    if not around.kubernetes:
        return
    for name, variables in VARIABLES.items():
        for variable in variables:
            facts.say(name, environ.get(variable, "").strip(), variable)
    for name, files in _VOLUME_FILES.items():
        for file in files:
            facts.say(name, places.file(f"{_VOLUME}/{file}"), f"/{_VOLUME}/{file}")
    for group in around.groups:
        if found := _GROUP_UID.findall(group):
            facts.say(names.K8S_POD_UID, _dashed(found[-1]), "/proc/self/cgroup")
    for mount in around.mounts:
        if (seen := _MOUNTED_UID.search(mount.root)) is not None:
            facts.say(names.K8S_POD_UID, _dashed(seen[1]), "/proc/self/mountinfo")
            facts.say(names.K8S_CONTAINER_NAME, seen[2], "/proc/self/mountinfo")
    facts.say(names.K8S_NAMESPACE_NAME, places.file(_NAMESPACE), f"/{_NAMESPACE}")
    # On the host's network the hostname is the node's; and one of full length may be a pod's name cut off.
    if len(hostname) < _LONGEST_HOSTNAME and not places.file("etc/hosts").startswith(_HOST_NETWORK):
        facts.say(names.K8S_POD_NAME, hostname, "hostname")


def _dashed(uid: str) -> str:
    return uid.replace("_", "-")
