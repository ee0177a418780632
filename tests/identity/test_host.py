"""The host: its id in and out of containers, its processor, its GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from melodi_otel.identity import Places, identify
from melodi_otel.identity.machine import architecture
from melodi_otel.semconv import RESOURCE_ATTRIBUTES

BOOT = "98f7ae26-00ec-4381-8a30-91fc8354e274"
MACHINE = "3d1219c7c4c5404aaa1f6d2a48adfda4"
MOUNTED = "99 27 8:1 /etc/machine-id /etc/machine-id ro,relatime - ext4 /dev/sda1 rw\n"


@pytest.fixture
def host(machine):
    machine.file("proc/sys/kernel/random/boot_id", BOOT + "\n")
    return machine.file("etc/machine-id", MACHINE + "\n")


def host_id(machine):
    found = machine.look()
    return found.attributes.get("host.id"), [note for note in found.notes if note.startswith("host.id")]


def test_a_plain_host(host):
    """The machine id, without a word."""
    assert host_id(host) == (MACHINE, [])
    assert host.look().origins["host.id"] == "/etc/machine-id"


def test_dbus_knows_it_too(host):
    """Where systemd's file is empty or not ready yet, D-Bus's is read."""
    host.file("etc/machine-id", "uninitialized\n").file("var/lib/dbus/machine-id", "dbus\n")
    assert host_id(host) == ("dbus", [])


def test_a_host_without_an_id(machine):
    """Unknown is absent, and a person is told what to set."""
    machine.file("proc/sys/kernel/random/boot_id", BOOT)
    assert host_id(machine) == (None, ["host.id is not known: set MELODI_HOST_ID"])


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv", ".singularity.d/env"])
def test_a_container_does_not_trust_its_image(host, mark):
    """The machine id of a container is its image's or random: the kernel's boot id stands in, and a person is told."""
    host.file(mark)
    value, (note,) = host_id(host)
    assert value == BOOT
    assert note == (
        "host.id is the kernel's boot id, which changes at a reboot, as this is a container: set MELODI_HOST_ID, or mount "
        "the host's /etc/machine-id read-only"
    )


def test_a_container_with_the_hosts_file(host):
    """The host's own machine id, mounted, is certain."""
    host.file(".dockerenv").mounts(MOUNTED)
    assert host_id(host) == (MACHINE, [])


def test_a_container_with_the_hosts_tree(host):
    """Where MELODI_PROCFS_ROOT is /host/proc, the host's /etc may stand beside it."""
    host.file(".dockerenv").file("host/etc/machine-id", "the-hosts\n")
    host.places = replace(host.places, procfs=str(host.root / "host/proc"))
    assert host_id(host) == ("the-hosts", [])


def test_a_container_that_sees_nothing(machine):
    """Neither: absent, and why."""
    value, (note,) = host_id(machine.file(".dockerenv"))
    assert value is None
    assert note.startswith("host.id is not known, as this is a container: set MELODI_HOST_ID")


@pytest.mark.parametrize("sign", ["cgroup", "systemd", "variable"])
def test_a_system_container_is_a_machine(host, sign):
    """LXC and nspawn keep an id of their own, which is used and told to be that."""
    if sign == "cgroup":
        host.cgroup("0::/lxc.payload.box/init.scope\n")
    elif sign == "systemd":
        host.file("run/systemd/container", "systemd-nspawn")
    else:
        host.env(container="lxc")
    value, (note,) = host_id(host)
    assert value == MACHINE
    assert note.startswith("host.id is this container's own; set MELODI_HOST_ID")


def test_docker_inside_lxc(host):
    """The innermost decides: an image's machine id is not trusted there either."""
    host.cgroup(f"9:memory:/lxc/box/docker/{'ab' * 32}\n").env(container="lxc")
    assert host_id(host)[0] == BOOT


def test_wsl_is_no_container(host):
    """systemd says so, but its machine id is the distribution's."""
    host.file("run/systemd/container", "wsl\n")
    assert host_id(host) == (MACHINE, [])


def test_who_has_the_last_word(host):
    """OTEL_RESOURCE_ATTRIBUTES over MELODI_HOST_ID over what is found, also in a container."""
    host.file(".dockerenv")
    host.host_id = "mine"
    assert host_id(host) == ("mine", [])
    host.env(OTEL_RESOURCE_ATTRIBUTES="host.id=theirs")
    assert host_id(host) == ("theirs", [])


# --- processor ---

INTEL = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8480+
stepping\t: 8

processor\t: 1
vendor_id\t: Other
model\t\t: 999
"""
GRACE = """\
processor\t: 0
BogoMIPS\t: 2000.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd4f
CPU revision\t: 1
"""
UNKNOWN_ARM = "CPU implementer\t: 0x99\nCPU architecture: 8\nCPU part\t: 0x001\n"
POWER = "processor\t: 0\ncpu\t\t: POWER9, altivec supported\nrevision\t: 2.2 (pvr 004e 1202)\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            INTEL,
            {
                "model.name": "Intel(R) Xeon(R) Platinum 8480+",
                "vendor.id": "GenuineIntel",
                "family": "6",
                "model.id": "143",
                "stepping": "8",
            },
        ),
        (GRACE, {"vendor.id": "ARM", "family": "8", "model.id": "0xd4f", "stepping": "r1p1"}),
        (UNKNOWN_ARM, {"vendor.id": "0x99", "family": "8", "model.id": "0x001"}),
        (POWER, {"model.name": "POWER9, altivec supported"}),
        ("", {}),
        ("no colon\n\n:::\n", {}),
    ],
    ids=["x86", "Grace", "unknown ARM", "POWER", "nothing", "nonsense"],
)
def test_processors(machine, cpuinfo, expected):
    """The first processor's fields, as text; what the kernel does not say is absent."""
    machine.file("proc/cpuinfo", cpuinfo)
    assert machine.attributes("host.cpu.") == {f"host.cpu.{name}": value for name, value in expected.items()}


def test_windows_tells_by_environment(machine):
    """PROCESSOR_IDENTIFIER is all that Windows tells for free."""
    machine.env(PROCESSOR_IDENTIFIER="Intel64 Family 6 Model 140 Stepping 1, GenuineIntel")
    assert machine.attributes("host.cpu.") == {
        "host.cpu.family": "6",
        "host.cpu.model.id": "140",
        "host.cpu.stepping": "1",
        "host.cpu.vendor.id": "GenuineIntel",
    }


@pytest.mark.parametrize(
    ("machine_name", "arch"),
    [
        ("x86_64", "amd64"),
        ("AMD64", "amd64"),
        ("aarch64", "arm64"),
        ("arm64", "arm64"),
        ("armv7l", "arm32"),
        ("i686", "x86"),
        ("ppc64le", "ppc64"),
        ("s390x", "s390x"),
        ("riscv64", "riscv64"),
        ("", None),
    ],
)
def test_architectures(machine_name, arch):
    """The conventions' words; a machine that they do not know keeps its name."""
    assert architecture(machine_name) == arch


# --- GPUs ---

VERSIONS = [
    (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc 12.2.0\n",
        "535.129.03",
    ),
    (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (u@h)  Sun Jul 27\n",
        "580.65.06",
    ),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "540.4.0"),
    ("something else 1.2.3\n", None),
]


@pytest.mark.parametrize(("text", "version"), VERSIONS)
def test_nvidia_driver(machine, text, version):
    """The kernel module's version, of the closed and the open one."""
    machine.file("proc/driver/nvidia/version", text)
    assert machine.attributes("melodi.gpu") == ({"melodi.gpu.driver_version": version} if version else {})


def test_nvidia_models(machine):
    """Every model once; the driver's version by sysfs where procfs is not there."""
    for address, model in (("0000:18:00.0", "NVIDIA H100 80GB HBM3"), ("0000:2a:00.0", "NVIDIA H100 80GB HBM3")):
        text = f"Model: \t\t {model}\nIRQ:   \t\t 95\nGPU UUID: \t GPU-1\nVideo BIOS: \t 96.00\n"
        machine.file(f"proc/driver/nvidia/gpus/{address}/information", text)
    machine.file("proc/driver/nvidia/gpus/0000:3a:00.0/information", "Model: \t\t NVIDIA A2\n")
    machine.file("proc/driver/nvidia/gpus/0000:4a:00.0/information", "IRQ: 1\n")
    machine.file("sys/module/nvidia/version", "570.1.2\n")
    assert machine.attributes("melodi.gpu") == {
        "melodi.gpu.model": ("NVIDIA H100 80GB HBM3", "NVIDIA A2"),
        "melodi.gpu.driver_version": "570.1.2",
    }


def test_amd_models(machine):
    """AMD's boards tell a product name; a socket of a card is no card, and another maker's is not AMD's."""
    machine.file("sys/class/drm/card0/device/vendor", "0x1002\n")
    machine.file("sys/class/drm/card0/device/product_name", "Instinct MI210\n")
    machine.file("sys/class/drm/card0-DP-1/device/vendor", "0x1002\n")
    machine.file("sys/class/drm/card0-DP-1/device/product_name", "socket\n")
    machine.file("sys/class/drm/card1/device/vendor", "0x1a03\n")
    machine.file("sys/class/drm/card1/device/product_name", "a console\n")
    machine.file("sys/module/amdgpu/version", "6.7.0\n")
    assert machine.attributes("melodi.gpu") == {
        "melodi.gpu.model": ("Instinct MI210",),
        "melodi.gpu.driver_version": "6.7.0",
    }


def test_meters_fill_the_gap(machine):
    """What the meters know stands in where no file tells (WSL), and only there."""
    assert machine.look(gpus=("A", "A"), driver="9.9").attributes["melodi.gpu.model"] == ("A",)
    machine.file("proc/driver/nvidia/version", VERSIONS[0][0])
    assert machine.look(gpus=("A",), driver="9.9").attributes["melodi.gpu.driver_version"] == "535.129.03"


# --- all of it ---


def test_everything_found_is_in_the_table(machine):
    """No attribute without its line in semconv, and each has the type that the line says."""
    machine.file(".dockerenv").file("proc/cpuinfo", INTEL).file("proc/driver/nvidia/version", VERSIONS[0][0])
    machine.env(KUBERNETES_SERVICE_HOST="x", SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_NTASKS="1", NODE_NAME="n")
    found = machine.look(gpus=("A",))
    types = {attribute.name: attribute.type for attribute in RESOURCE_ATTRIBUTES}
    words = {str: "string", int: "int", tuple: "string[]"}
    assert {name: words[type(value)] for name, value in found.attributes.items()} == {
        name: types[name] for name in found.attributes
    }
    assert set(found.origins) == set(found.attributes)


def test_a_machine_without_any_of_it(tmp_path):
    """No procfs, no sysfs, no /etc, as on Windows and macOS: what the system says of itself, and no error."""
    nowhere = str(tmp_path / "nowhere")
    found = identify({}, Places(nowhere, nowhere, nowhere, nowhere), hostname="mac", arch="arm64")
    assert found.attributes == {"host.name": "mac", "host.arch": "arm64"}
    assert found.notes == ("host.id is not known: set MELODI_HOST_ID",)


def test_a_path_that_cannot_be_one():
    """A root with a NUL byte in it is no error either."""
    bad = "\0"
    assert identify({}, Places(bad, bad, bad, bad), hostname="", arch="").attributes == {}
