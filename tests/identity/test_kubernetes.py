"""Which pod, from what it was told or what the kubelet left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from melodi_otel.identity.kubernetes import VARIABLES

UID = "2015a4b3-a05b-4e4d-8fa3-699914c33ee8"
OTHER = "e50f2933-b36b-4e3b-89b1-280707f7bc53"
STATIC = "8b6a3f1c0d9e4a7f8b6a3f1c0d9e4a7f"


@pytest.fixture
def pod(machine):
    """A pod with its hosts file, that was told nothing."""
    machine.hostname = "server-7d9c6bf8b4-x2x7p"
    machine.env(KUBERNETES_SERVICE_HOST="10.96.0.1")
    return machine.file("etc/hosts", "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n")


def test_nothing_outside_a_pod(machine):
    """Jenkins and many a shell set names like these: outside a pod they mean nothing."""
    machine.env(NODE_NAME="agent-3", POD_NAME="x", CONTAINER_NAME="y", CLUSTER_NAME="z")
    assert machine.attributes("k8s.") == {}


@pytest.mark.parametrize(
    "variables",
    [
        ("NODE_NAME", "POD_NAME", "POD_NAMESPACE", "POD_UID", "CONTAINER_NAME", "CLUSTER_NAME"),
        ("K8S_NODE_NAME", "K8S_POD_NAME", "K8S_NAMESPACE", "K8S_POD_UID", "K8S_CONTAINER_NAME", "K8S_CLUSTER_NAME"),
        ("MY_NODE_NAME", "MY_POD_NAME", "MY_POD_NAMESPACE", "MY_POD_UID", "MY_CONTAINER_NAME", "CLUSTER_NAME"),
        (
            "OTEL_RESOURCE_ATTRIBUTES_NODE_NAME",
            "OTEL_RESOURCE_ATTRIBUTES_POD_NAME",
            "K8S_POD_NAMESPACE",
            "OTEL_RESOURCE_ATTRIBUTES_POD_UID",
            "CONTAINER_NAME",
            "KUBERNETES_CLUSTER_NAME",
        ),
    ],
)
def test_the_downward_api_by_environment(pod, variables):
    """The names that people and operators use."""
    pod.env(**dict(zip(variables, ("n1", "p1", "ns1", UID, "c1", "k1"), strict=True)))
    assert pod.attributes("k8s.") == {
        "k8s.node.name": "n1",
        "k8s.pod.name": "p1",
        "k8s.namespace.name": "ns1",
        "k8s.pod.uid": UID,
        "k8s.container.name": "c1",
        "k8s.cluster.name": "k1",
    }
    assert pod.look().attributes["host.name"] == "n1"
    assert not [note for note in pod.look().notes if "k8s" in note]


def test_the_downward_api_by_volume(pod):
    """Files below /etc/podinfo."""
    pod.file("etc/podinfo/name", "p1").file("etc/podinfo/namespace", "ns1\n").file("etc/podinfo/uid", UID)
    pod.file("etc/podinfo/labels", 'app="x"')
    assert pod.attributes("k8s.") == {"k8s.pod.name": "p1", "k8s.namespace.name": "ns1", "k8s.pod.uid": UID}


@pytest.mark.parametrize(
    ("cgroup", "uid"),
    [
        (f"11:pids:/kubepods/besteffort/pod{UID}/{'ab' * 32}\n", UID),
        (
            f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice/x.scope\n",
            UID,
        ),
        (f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/crio-{'ab' * 32}.scope\n", UID),
        (
            f"6:cpu:/system.slice/containerd.service/kubepods-pod{UID.replace('-', '_')}.slice:cri-containerd:{'ab' * 32}\n",
            UID,
        ),
        (f"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UID.replace('-', '_')}.slice/x\n", UID),
        (f"0::/kubepods/burstable/pod{STATIC}/{'ab' * 32}\n", STATIC),
        (f"0::/docker/x/kubepods/pod{OTHER}/docker/y/kubepods/pod{UID}\n", UID),
        ("0::/kubepods/podium/podcast\n", None),
        ("0::/\n", None),
    ],
)
def test_uid_of_the_control_group(pod, cgroup, uid):
    """The UID stands in the path, by systemd with underscores."""
    pod.cgroup(cgroup)
    assert pod.attributes("k8s.pod.uid") == ({"k8s.pod.uid": uid} if uid else {})


@pytest.mark.parametrize(
    "prefix", ["/var/lib/kubelet", "", "/docker/volumes/minikube/_data/lib/kubelet", "/data/kubelet"]
)
def test_uid_and_container_of_the_mounts(machine, prefix):
    """Under cgroup v2 the kubelet's mounts tell UID and container name, and that it is a pod at all."""
    machine.cgroup("0::/\n").mounts(
        "27 1 8:1 / / rw - overlay overlay rw\n"
        f"30 27 8:1 {prefix}/pods/{OTHER}/volumes/kubernetes.io~empty-dir/x /x rw - ext4 /dev/sda1 rw\n"
        f"31 27 8:1 {prefix}/pods/{UID}/etc-hosts /etc/hosts rw,relatime - ext4 /dev/sda1 rw\n"
        f"32 27 8:1 {prefix}/pods/{UID}/containers/server/3404dd90 /dev/termination-log rw - ext4 /dev/sda1 rw\n"
    )
    assert machine.attributes("k8s.") == {
        "k8s.pod.uid": UID,
        "k8s.container.name": "server",
        "k8s.pod.name": "box",
    }


def test_a_node_is_no_pod(machine):
    """On a node, mount points below the kubelet's folder belong to its pods and not to the process that sees them."""
    machine.cgroup("0::/system.slice/sshd.service\n").mounts(
        f"80 27 0:50 / /var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~projected/token rw - tmpfs tmpfs rw\n"
        f"81 27 8:1 /data /var/lib/kubelet/pods/{UID}/volume-subpaths/d/c/0 rw - ext4 /dev/sda1 rw\n"
    )
    assert machine.attributes("k8s.") == {}


def test_the_service_account(pod):
    """The namespace is the service account's where nobody said otherwise."""
    pod.file("var/run/secrets/kubernetes.io/serviceaccount/namespace", "team-a")
    assert pod.attributes("k8s.namespace") == {"k8s.namespace.name": "team-a"}
    assert pod.env(POD_NAMESPACE="told").attributes("k8s.namespace") == {"k8s.namespace.name": "told"}


def test_hostname_is_the_pods(pod):
    """A pod's hostname is its name, and a person is asked for the node's."""
    found = pod.look()
    assert found.attributes["k8s.pod.name"] == "server-7d9c6bf8b4-x2x7p"
    assert found.origins["k8s.pod.name"] == "hostname"
    assert "k8s.node.name is not known: hand it over as NODE_NAME by the downward API" in found.notes


def test_hostname_that_is_not_the_pods(pod):
    """On the host's network the hostname is the node's; one of 63 letters may be cut off."""
    pod.hostname = "x" * 63
    assert pod.attributes("k8s.pod.name") == {}
    pod.hostname = "node-1"
    pod.file("etc/hosts", "# Kubernetes-managed hosts file (host network).\n127.0.0.1\tlocalhost\n")
    assert pod.attributes("k8s.pod.name") == {}


def test_explicit_wins_over_derived(pod):
    """OTEL_RESOURCE_ATTRIBUTES, then a variable, then a volume, then the control group, then mounts."""
    pod.cgroup(f"0::/kubepods/pod{UID}/{'ab' * 32}\n")
    seen = [pod.look().attributes["k8s.pod.uid"]]
    seen.append(pod.file("etc/podinfo/uid", "volume").look().attributes["k8s.pod.uid"])
    seen.append(pod.env(POD_UID="variable").look().attributes["k8s.pod.uid"])
    pod.env(OTEL_RESOURCE_ATTRIBUTES="service.name=s,k8s.pod.uid=said%20so,broken,k8s.pod.name=")
    seen.append(pod.look().attributes["k8s.pod.uid"])
    assert seen == [UID, "volume", "variable", "said so"]
    assert pod.look().attributes["k8s.pod.name"] == "server-7d9c6bf8b4-x2x7p"
    assert "service.name" not in pod.look().attributes


def test_the_page_and_the_code_name_the_same_variables():
    """Every variable that is believed stands on the page, and its manifest sets no other but ours."""
    page = (Path(__file__).parents[2] / "docs/identity.md").read_text(encoding="utf-8")
    believed = {variable for variables in VARIABLES.values() for variable in variables}
    assert [variable for variable in sorted(believed) if f"`{variable}`" not in page] == []
    assert set(re.findall(r"- name: ([A-Z_]+)", page)) - believed == {"MELODI_HOST_ID", "MELODI_METRICS_ADDR"}
