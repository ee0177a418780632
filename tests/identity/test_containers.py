"""Container ids out of what kernels and runtimes show."""

from __future__ import annotations

import os

import pytest

A = "a1b2c3d4" * 8
B = "0f9e8d7c" * 8
UID = "2015a4b3-a05b-4e4d-8fa3-699914c33ee8"
UNDERSCORED = UID.replace("-", "_")

GROUPS = {
    "docker, v1": (f"12:pids:/docker/{A}\n11:memory:/docker/{A}\n1:name=systemd:/docker/{A}\n0::/\n", A),
    "docker by systemd, v1": (f"10:devices:/system.slice/docker-{A}.scope\n", A),
    "docker by systemd, v2": (f"0::/system.slice/docker-{A}.scope\n", A),
    "docker in docker": (f"0::/docker/{A}/docker/{B}\n", B),
    "docker in LXC": (f"9:memory:/lxc/box/docker/{A}\n", A),
    "kubelet with cgroupfs": (f"11:pids:/kubepods/besteffort/pod{UID}/{A}\n", A),
    "containerd by systemd": (
        f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/cri-containerd-{A}.scope\n",
        A,
    ),
    "containerd, colons": (
        f"6:cpu:/system.slice/containerd.service/kubepods-pod{UNDERSCORED}.slice:cri-containerd:{A}\n",
        A,
    ),
    "CRI-O": (f"0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-{A}.scope/container\n", A),
    "kind: a pod in a container": (f"0::/docker/{A}/kubelet/kubepods/pod{UID}/{B}\n", B),
    "group cut off": (f"0::/../cri-containerd-{A}.scope\n", A),
    "podman": (f"0::/machine.slice/libpod-{A}.scope/container\n", A),
    "podman without root": (f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope\n", A),
    "podman, v1": (f"4:memory:/libpod_parent/libpod-{A}\n", A),
    "nerdctl": (f"0::/system.slice/nerdctl-{A}.scope\n", A),
    "ECS": (f"9:perf_event:/ecs/55091c13-b8cf-4801-b527-f4601742204d/{A}\n", A),
    "ECS on Fargate": (
        "1:cpu:/ecs/34dc0b5e626f2c5c4c5170e34b10e765/34dc0b5e626f2c5c4c5170e34b10e765-1234567890\n",
        "34dc0b5e626f2c5c4c5170e34b10e765-1234567890",
    ),
    "podman's monitor": (f"0::/machine.slice/libpod-conmon-{A}.scope\n", None),
    "LXC": ("0::/lxc.payload.box/system.slice/ssh.service\n", None),
    "a session": ("0::/user.slice/user-1000.slice/session-3.scope\n", None),
    "a unit": ("12:pids:/system.slice/docker.service\n1:name=systemd:/system.slice/docker.service\n", None),
    "too short": ("0::/docker/a1b2c3d4\n", None),
    "not an id": (f"0::/docker/{A}ff\n", None),
    "its own namespace": ("0::/\n", None),
    "nonsense": ("\x00::\nx\n:::\n", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_control_groups(machine, case):
    """The id is the innermost that a control group's path names; where it names none, none is made up."""
    text, expected = GROUPS[case]
    machine.cgroup(text)
    assert machine.attributes("container.id") == ({"container.id": expected} if expected else {})


DOCKER = f"""\
561 456 0:60 / / rw,relatime master:1 - overlay overlay rw,upperdir=/var/lib/docker/overlay2/{B}/diff
563 561 0:63 / /proc rw,nosuid - proc proc rw
570 565 0:28 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw
574 561 8:1 /var/lib/docker/containers/{A}/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/sda1 rw
575 561 8:1 /var/lib/docker/containers/{A}/hostname /etc/hostname rw,relatime - ext4 /dev/sda1 rw
"""
PODMAN = f"""\
983 961 0:45 /containers/overlay-containers/{A}/userdata/hostname /etc/hostname rw,nosuid - tmpfs tmpfs rw
984 961 0:45 /containers/overlay-containers/{A}/userdata/.containerenv /run/.containerenv rw - tmpfs tmpfs rw
"""
HOST = f"""\
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
91 27 0:44 / /var/lib/docker/overlay2/{A}/merged rw,relatime - overlay overlay rw
92 27 0:45 / /var/lib/docker/containers/{A}/mounts/shm rw - tmpfs shm rw
93 27 0:46 / /run/containerd/io.containerd.runtime.v2.task/k8s.io/{A}/rootfs rw - overlay overlay rw
"""
V1 = f"""\
30 25 0:27 /docker/{A} /sys/fs/cgroup/memory ro,nosuid master:9 - cgroup cgroup rw,memory
"""
KUBELET = f"""\
4443 4434 259:1 /var/lib/kubelet/pods/{UID}/etc-hosts /etc/hosts rw,noatime - xfs /dev/nvme0n1p1 rw
4444 4435 259:1 /var/lib/kubelet/pods/{UID}/containers/server/d52bb0e5 /dev/termination-log rw,noatime - xfs /dev/nvme0n1p1 rw
4445 4434 259:1 /var/lib/docker/containers/{A}/hostname /etc/hostname rw,noatime - xfs /dev/nvme0n1p1 rw
4446 4434 259:1 /var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/{B}/resolv.conf /etc/resolv.conf rw - xfs /dev/x rw
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [(DOCKER, A), (PODMAN, A), (V1, A), (HOST, None), (KUBELET, None), ("1 2 3\n - \nx - y\n", None)],
    ids=["docker", "podman", "v1", "a host with containers", "a pod: those are its sandbox's", "nonsense"],
)
def test_mounts(machine, text, expected):
    """Where the group's path is its own root, what the runtime mounted into the container names it, and nothing else."""
    machine.cgroup("0::/\n").mounts(text)
    assert machine.attributes("container.id") == ({"container.id": expected} if expected else {})


def test_podman_tells_a_name(machine):
    """Podman's file names the container where it has content."""
    machine.file(
        "run/.containerenv", f'engine="podman-5.2.2"\nname="server"\nid="{A}"\nimage="docker.io/x:1"\nrootless=0\n'
    )
    assert machine.attributes("container.") == {"container.id": A, "container.name": "server"}


def test_the_group_wins_over_mounts(machine):
    """A container that shares another one's network has that one's hostname file; its group is its own."""
    machine.cgroup(f"0::/system.slice/docker-{B}.scope\n").mounts(DOCKER)
    assert machine.attributes("container.id") == {"container.id": B}


def test_reading_is_bounded(machine):
    """A file without end costs a bounded read, a folder in its place nothing, and a pipe that nobody writes no waiting."""
    machine.cgroup("0::/x\n" * 100_000).mounts("x" * 1_000_000)
    (machine.root / "run/.containerenv").mkdir(parents=True)
    (machine.root / "etc").mkdir()
    os.mkfifo(machine.root / "etc/machine-id")
    assert machine.attributes("container.") == {}
