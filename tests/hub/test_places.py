"""Where a hub's files lie, on made-up file systems."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from melodi_otel.errors import MelodiError
from melodi_otel.hub.places import (
    AGENT_SOCKET,
    SOCKET_LIMIT,
    NoPlace,
    address_file,
    filesystem_of,
    journal_file,
    lock_file,
    runtime_directory,
    shared_socket,
    socket_path,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="Unix sockets and users")
ME = os.getuid() if hasattr(os, "getuid") else 0
OWN = f"melodi-otel-{ME}"


class System:
    """A file system below a directory of the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []
        self.made("tmp", 0o1777)
        self.made("proc/self")

    def made(self, path: str, mode: int = 0o700) -> Path:
        target = self.root / path
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(mode)
        return target

    def mount(self, point: str, kind: str) -> None:
        self.lines.append(f"36 35 0:30 / {point} rw,relatime shared:1 master:2 - {kind} what rw\n")
        (self.root / "proc/self/mountinfo").write_text("".join(self.lines))

    def runtime(self, uid: int = ME, **environ: str) -> str:
        """Where the runtime directory is, counted from the root."""
        return "/" + str(runtime_directory(environ, uid=uid, root=str(self.root)).relative_to(self.root))


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_the_users_runtime_directory_is_first(system: System) -> None:
    """XDG_RUNTIME_DIR before /run/user/UID, and that before what we make; neither gets anything made in it."""
    system.made(f"run/user/{ME}")
    assert system.runtime() == f"/run/user/{ME}"
    mine = system.made("home/me/run")
    assert system.runtime(XDG_RUNTIME_DIR="/home/me/run") == "/home/me/run"
    assert list(mine.iterdir()) == []


@pytest.mark.parametrize("named", ["", "relative/run", "/not/there"])
def test_a_variable_that_names_no_directory_is_passed_over(system: System, named: str) -> None:
    """An empty, relative or missing XDG_RUNTIME_DIR is as good as none."""
    system.made(f"run/user/{ME}")
    assert system.runtime(XDG_RUNTIME_DIR=named) == f"/run/user/{ME}"


def test_without_one_a_private_directory_is_made(system: System) -> None:
    """Where there is neither, /tmp holds a directory that is ours alone, and the second call finds it."""
    assert [system.runtime(), system.runtime()] == [f"/tmp/{OWN}"] * 2
    assert stat.S_IMODE((system.root / "tmp" / OWN).stat().st_mode) == 0o700


def test_a_jobs_own_directory_comes_before_tmpdir(system: System) -> None:
    """SLURM_TMPDIR, then TMPDIR, then /tmp."""
    system.made("scratch/job7")
    system.made("var/tmp")
    both = {"SLURM_TMPDIR": "/scratch/job7", "TMPDIR": "/var/tmp"}
    assert system.runtime(**both) == f"/scratch/job7/{OWN}"
    assert system.runtime(TMPDIR="/var/tmp") == f"/var/tmp/{OWN}"
    assert system.runtime(TMPDIR="tmp") == f"/tmp/{OWN}"


def test_memory_is_the_last_resort(system: System) -> None:
    """Where /tmp cannot be used /dev/shm is."""
    system.made("dev/shm", 0o1777)
    system.mount("/tmp", "nfs4")
    assert system.runtime() == f"/dev/shm/{OWN}"


def _link(system: System) -> None:
    system.made("elsewhere")
    (system.root / "tmp" / OWN).symlink_to(system.root / "elsewhere")


def _file(system: System) -> None:
    (system.root / "tmp" / OWN).touch()


def _open(system: System) -> None:
    system.made(f"tmp/{OWN}", 0o777)


def _unsticky(system: System) -> None:
    system.made("tmp", 0o777)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_link, "it is a symbolic link"),
        (_file, "it is no directory"),
        (_open, "others may write there (mode 0777)"),
        (_unsticky, "others may put another one in its place"),
    ],
)
def test_what_somebody_may_have_laid_there_is_passed_over(
    system: System, caplog: pytest.LogCaptureFixture, spoil: Callable[[System], None], why: str
) -> None:
    """A link, a file, or a directory that others can change is not used, and a debug line says why."""
    system.made("dev/shm", 0o1777)
    spoil(system)
    with caplog.at_level(logging.DEBUG, "melodi_otel"):
        assert system.runtime() == f"/dev/shm/{OWN}"
    assert any(f"/tmp/{OWN} is passed over: {why}" in record.message for record in caplog.records)


def test_what_belongs_to_somebody_else_is_passed_over(system: System) -> None:
    """A directory of another user is named with both users, and where nothing else is fit that is the error."""
    system.made("home/me/run")
    with pytest.raises(NoPlace) as none:
        system.runtime(uid=ME + 1, XDG_RUNTIME_DIR="/home/me/run")
    assert f"/home/me/run: it belongs to user {ME}, not to {ME + 1}" in str(none.value)
    assert "set XDG_RUNTIME_DIR or TMPDIR" in str(none.value)
    assert isinstance(none.value, MelodiError)


@pytest.mark.parametrize(
    "kind",
    ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "9p", "fuse", "fuse.sshfs", "fuse.glusterfs"],
)
def test_a_network_file_system_is_passed_over(system: System, kind: str) -> None:
    """Locks on it lie: the next place is taken."""
    system.made("home/me/run")
    system.mount("/", "ext4")
    system.mount("/home", kind)
    assert system.runtime(XDG_RUNTIME_DIR="/home/me/run") == f"/tmp/{OWN}"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "btrfs", "zfs"])
def test_a_local_file_system_is_fit(system: System, kind: str) -> None:
    """A disk, memory or an overlay of this machine is used."""
    system.made("home/me/run")
    system.mount("/home", kind)
    assert system.runtime(XDG_RUNTIME_DIR="/home/me/run") == "/home/me/run"


def test_a_link_on_the_way_is_followed_to_its_mount(system: System) -> None:
    """/scratch that is a link into a network file system is one."""
    system.made("lustre/scratch/run")
    (system.root / "scratch").symlink_to(system.root / "lustre" / "scratch")
    system.mount("/lustre", "lustre")
    assert system.runtime(XDG_RUNTIME_DIR="/scratch/run") == f"/tmp/{OWN}"


MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:5 / /home rw shared:1 - nfs4 server:/home rw
23 22 0:6 / /home/me/with\\040blank rw - tmpfs tmpfs rw
24 21 0:7 / /data rw - ext4 /dev/sdb1 rw
25 21 0:8 / /data rw - lustre mds:/data rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc", "ext4"),
        ("/home/me", "nfs4"),
        ("/homework", "ext4"),
        ("/home/me/with blank/x", "tmpfs"),
        ("/data/x", "lustre"),
    ],
)
def test_the_longest_mount_counts_and_of_equal_ones_the_last(path: str, kind: str) -> None:
    """Mount points are whole names, their blanks are written in octal, and a later mount covers an earlier one."""
    assert filesystem_of(Path(path), MOUNTS) == kind


def test_without_a_mount_table_nothing_is_told() -> None:
    """An empty table knows no type."""
    assert filesystem_of(Path("/tmp"), "") == ""


def test_files_lie_beside_the_socket() -> None:
    """The agent's are in /run, a user's in the runtime directory; lock, journal and address bear the socket's name."""
    assert Path("/run/melodi-otel/hub.sock") == AGENT_SOCKET
    socket = shared_socket(Path("/run/user/7"))
    assert socket == Path("/run/user/7/melodi-otel/hub.sock")
    beside = [of(socket) for of in (lock_file, journal_file, address_file)]
    assert [path.name for path in beside] == ["hub.lock", "hub.journal", "hub.address"]
    assert {path.parent for path in beside} == {socket.parent}


def test_a_socket_path_has_a_limit_in_bytes() -> None:
    """107 bytes are possible, 108 are an error that says how many there are; letters of two bytes count twice."""
    assert SOCKET_LIMIT == 107
    assert len(str(socket_path("/" + "x" * 106))) == 107
    with pytest.raises(NoPlace, match="has 108 bytes, at most 107"):
        socket_path("/" + "x" * 107)
    with pytest.raises(NoPlace, match="XDG_RUNTIME_DIR"):
        shared_socket(Path("/" + "é" * 45))
