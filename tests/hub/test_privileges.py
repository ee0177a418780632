from __future__ import annotations

import json
import os
import sys

import pytest

from melodi_otel.errors import HubError
from melodi_otel.hub import privileges

NOBODY = 65534
KEPT = [privileges.CAP_DAC_READ_SEARCH, privileges.CAP_PERFMON]
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="needs root, to have something to give up")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")

DROPPED = """
import ctypes, errno, grp, json, os, pwd, subprocess, sys
from melodi_otel.hub import privileges

secret, victim, user = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
libc = ctypes.CDLL(None, use_errno=True)
kept = privileges.drop(user=user)

def tried(what):
    try:
        result = what()
        return result if isinstance(result, str) else "done"
    except OSError as error:
        return errno.errorcode[error.errno]

def attach():
    if libc.ptrace(16, victim, 0, 0) < 0:  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")

def write():
    with open(secret, "w"):
        pass

status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "status": {name: status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Groups")},
    "uid": status["Uid"].split(),
    "kept": [sorted(kept.effective), sorted(kept.permitted), sorted(kept.bounding), sorted(kept.ambient)],
    "uid told": kept.uid,
    "missing": sorted(kept.missing),
    "read": tried(lambda: open(secret).read()),
    "write": tried(write),
    "kill": tried(lambda: os.kill(victim, 0)),
    "ptrace": tried(attach),
    "setuid": tried(lambda: os.setuid(1)),
    "perf": privileges.perf_refused(),
    "dumpable": libc.prctl(3, 0, 0, 0, 0),
    "child": subprocess.run(["grep", "CapEff", "/proc/self/status"], capture_output=True, text=True).stdout.split()[1]
    if user is None else None,
}))
"""


@pytest.fixture
def dropped(place, program):
    """What a process can do after it has dropped everything but the two, run as ``user``."""

    def run(user, victim_of):
        secret = place / "energy_uj"
        secret.write_text("12345")
        secret.chmod(0o400)
        victim = program(
            f"import os, sys\nos.setresuid({victim_of}, {victim_of}, {victim_of})\nprint(1, flush=True)\nsys.stdin.read()",
            wait=False,
        )
        victim.stdout.readline()
        told = json.loads(program(DROPPED, secret, victim.pid, user))
        assert secret.read_text() == "12345"
        return told

    return run


@as_root
def test_root_keeps_two_capabilities(dropped):
    """The kernel says: two in effect, none else permitted, bounded or ambient; and an exec gives nothing back."""
    told = dropped("", NOBODY)
    two = f"{1 << 2 | 1 << 38:016x}"
    none = f"{0:016x}"
    assert told["status"] | {"Groups": ""} == {
        "CapInh": none, "CapPrm": two, "CapEff": two, "CapBnd": two, "CapAmb": none, "NoNewPrivs": "1", "Groups": "",
    }  # fmt: skip
    assert told["kept"] == [KEPT, KEPT, KEPT, []]
    assert (told["uid told"], told["missing"]) == (0, [])
    assert told["child"] == none


@as_root
def test_what_root_can_do_afterwards(dropped):
    """It reads what root alone may read and opens perf events; it may not touch another user's process, nor become him."""
    told = dropped("", NOBODY)
    assert told["read"] == "12345"
    assert told["perf"] is None
    assert {name: told[name] for name in ("kill", "ptrace", "setuid")} == dict.fromkeys(
        ("kill", "ptrace", "setuid"), "EPERM"
    )
    assert told["dumpable"] == 0


@as_root
def test_another_user_with_the_two(dropped):
    """After --user it is that user in every sense, without root's groups, and has the two all the same."""
    told = dropped("nobody", 0)
    two = f"{1 << 2 | 1 << 38:016x}"
    assert told["uid"] == [str(NOBODY)] * 4
    assert told["status"]["Groups"] == str(NOBODY)
    assert (told["status"]["CapEff"], told["status"]["CapBnd"], told["status"]["NoNewPrivs"]) == (two, two, "1")
    assert (told["uid told"], told["missing"], told["perf"]) == (NOBODY, [], None)


@as_root
def test_what_another_user_can_do(dropped):
    """It reads root's 0400 file, and cannot write it, nor signal or trace root's process, nor become anybody."""
    told = dropped("nobody", 0)
    assert told["read"] == "12345"
    assert told["write"] == "EACCES"
    assert {told["kill"], told["ptrace"], told["setuid"]} == {"EPERM"}


@as_root
def test_nothing_can_be_kept_that_was_not_there(program):
    """A process without CAP_PERFMON is told that it is missing; the rest is dropped as ever."""
    code = """
from melodi_otel.hub import privileges
privileges._Kernel().capset(frozenset({privileges.CAP_DAC_READ_SEARCH, privileges.CAP_SETPCAP}))
kept = privileges.drop()
print(sorted(kept.effective), sorted(kept.missing), kept)
"""
    assert program(code).strip() == "[2] [38] uid 0, gid 0, CAP_DAC_READ_SEARCH"


@as_root
def test_where_the_bounding_set_is_not_ours_to_drop(program):
    """Without CAP_SETPCAP, as in a unit or a container, the same is kept, and no_new_privs closes the rest."""
    code = """
from melodi_otel.hub import privileges
privileges._Kernel().capset(privileges.KEEP)
kept = privileges.drop()
print(sorted(kept.effective), len(kept.bounding) > 2, kept.no_new_privileges)
"""
    assert program(code).strip() == "[2, 38] True True"


def test_a_user_without_capabilities(program):
    """Who has nothing to give up has nothing afterwards, and no error."""
    code = """
import os
from melodi_otel.hub import privileges
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
privileges._Kernel().capset(frozenset())
kept = privileges.drop()
print(sorted(kept.effective), sorted(kept.missing), kept.no_new_privileges)
"""
    assert program(code).strip() == "[] [2, 38] True"


def test_a_second_thread_is_refused(program):
    """It would keep everything, so nothing is dropped and the error says why."""
    code = """
import threading
from melodi_otel.errors import HubError
from melodi_otel.hub import privileges
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
before = privileges.current()
try:
    privileges.drop()
except HubError as error:
    print(error.state, "|", error.reason)
print(privileges.current() == before)
end.set()
thread.join()
"""
    assert program(code) == "threads | 2 threads run already, and capabilities belong to each of them\nTrue\n"


def test_becoming_another_user_needs_root(program):
    """A plain message, not a trace."""
    code = """
import os
from melodi_otel.errors import HubError
from melodi_otel.hub import privileges
import pwd
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    privileges.drop(user="daemon")
except HubError as error:
    print(error)
"""
    assert program(code).startswith(
        "the process cannot become user 1: Operation not permitted; to repair: start it as root"
    )


@pytest.mark.parametrize(("user", "words"), [("no-such-user", "there is no user"), ("root", "would give nothing up")])
def test_whom_it_cannot_become(program, user, words):
    """An unknown user and root are refused before anything is given up."""
    code = f"""
from melodi_otel.errors import HubError
from melodi_otel.hub import privileges
before = privileges.current()
try:
    privileges.drop(user={user!r})
except HubError as error:
    print(error)
print(privileges.current() == before)
"""
    told = program(code)
    assert words in told
    assert told.endswith("\nTrue\n")


def test_another_system(monkeypatch):
    """Where there are no capabilities the option that leaves them out is named."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HubError, match="on Linux only; to repair: --keep-capabilities"):
        privileges.drop()


def test_the_numbers_are_the_kernels():
    """Bits of a mask of /proc/PID/status, and the words of it for people."""
    kept = privileges.Kept(privileges._numbers("0000004000000004"), *[frozenset()] * 3, True, 5, 6)
    assert sorted(kept.effective) == KEPT
    assert str(kept) == "uid 5, gid 6, CAP_DAC_READ_SEARCH, CAP_PERFMON"
