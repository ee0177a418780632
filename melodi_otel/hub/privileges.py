"""What a hub that was started by root keeps: the right to read meters, and nothing else. Linux only.

Two capabilities are enough. ``CAP_DAC_READ_SEARCH`` reads what root alone may read (RAPL's ``energy_uj`` is 0400 since
CVE-2020-8694), ``CAP_PERFMON`` opens RAPL's perf events. NVML needs its device nodes only. Neither of the two writes, kills,
traces, mounts or loads anything.

The kernel's order matters, each step needs what a later one takes away::

    securebits NOROOT     execve as uid 0 gives nothing back       needs CAP_SETPCAP
    bounding set          nothing else can ever come back          needs CAP_SETPCAP
    keepcaps, set*id      another user, permitted set survives     needs CAP_SETUID, CAP_SETGID
    ambient, capset       effective = permitted = what is kept
    no_new_privs          setuid programs and file capabilities give nothing
    dumpable 0            no core file with secrets, no /proc/PID/mem for others of the same user

Capabilities, securebits and no_new_privs belong to a *thread*: with a second thread there would be one left that may do
everything. So it is refused where there is one.

A process that stays uid 0 without CAP_DAC_OVERRIDE still owns root's files and may write those whose mode lets their owner;
``user`` takes that away too.

Sources: capabilities(7), prctl(2), linux/capability.h, linux/securebits.h, perf_event_open(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from melodi_otel.errors import HubError

CAP_DAC_READ_SEARCH: Final = 2
CAP_SETPCAP: Final = 8
CAP_PERFMON: Final = 38
NAMES: Final = {CAP_DAC_READ_SEARCH: "CAP_DAC_READ_SEARCH", CAP_PERFMON: "CAP_PERFMON"}
KEEP: Final = frozenset(NAMES)
"""What a hub keeps."""

_VERSION_3: Final = 0x20080522
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_DROP: Final = 24
_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_SECBIT_NOROOT_LOCKED: Final = 0b11
_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}
_PERF_FLAG_FD_CLOEXEC: Final = 8
_STATUS: Final = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Kept:
    """What the process has, as the kernel tells it.

    Attributes:
        effective, permitted, bounding, ambient: sets of capability numbers.
        no_new_privileges: whether ``execve`` can give it nothing more.
        uid, gid: its effective user and group.
        missing: what should have been kept and was not there to keep.
    """

    effective: frozenset[int]
    permitted: frozenset[int]
    bounding: frozenset[int]
    ambient: frozenset[int]
    no_new_privileges: bool
    uid: int
    gid: int
    missing: frozenset[int] = frozenset()

    def __str__(self) -> str:
        names = ", ".join(NAMES.get(number, f"capability {number}") for number in sorted(self.effective))
        return f"uid {self.uid}, gid {self.gid}, {names or 'no capability'}"


def drop(keep: Collection[int] = KEEP, user: str | None = None) -> Kept:
    """Give up everything but ``keep``, for good; call it before any thread starts.

    What the process does not have cannot be kept: a process without capabilities just has none afterwards.

    Args:
        keep: numbers of capabilities.
        user: become this user, with its groups; None: stay who it is.

    Raises:
        HubError: not Linux, threads run already, no such user, or the kernel refused a step; reason and fix say which.
    """
    if sys.platform != "linux":
        raise HubError("privileges can be dropped on Linux only", fix="--keep-capabilities", state="unsupported")
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads != 1:
        raise HubError(
            f"{threads} threads run already, and capabilities belong to each of them",
            fix="drop privileges before anything is started",
            state="threads",
        )
    account = _account(user)
    kernel = _Kernel()
    before = current()
    kept = frozenset(keep) & before.permitted
    # Without CAP_SETPCAP (systemd has dropped it, a container never gave it) no_new_privs keeps the bounding set out of reach.
    if CAP_SETPCAP in before.effective:
        bits = kernel.prctl("securebits", _PR_GET_SECUREBITS)
        kernel.prctl("securebits", _PR_SET_SECUREBITS, bits | _SECBIT_NOROOT_LOCKED)
        for number in sorted(before.bounding - frozenset(keep)):
            kernel.prctl("bounding set", _PR_CAPBSET_DROP, number)
    if account is not None:
        _become(account, kernel)
    kernel.prctl("ambient set", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    kernel.capset(kept)
    kernel.prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl("dumpable", _PR_SET_DUMPABLE, 0)
    now = current(frozenset(keep) - kept)
    if now.permitted != kept or now.effective != kept or now.ambient or not now.no_new_privileges:
        raise HubError(f"privileges were not dropped: the process is {now}", state="refused")
    return now


def current(missing: frozenset[int] = frozenset()) -> Kept:
    """What this thread has, read from ``/proc/self/status``: it is asked of the kernel, never remembered."""
    # /proc/self is the main thread's; with one thread, which drop() makes sure of, it is ours.
    told = dict(
        line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line
    )
    return Kept(
        effective=_numbers(told["CapEff"]),
        permitted=_numbers(told["CapPrm"]),
        bounding=_numbers(told["CapBnd"]),
        ambient=_numbers(told.get("CapAmb", "0")),
        no_new_privileges=told.get("NoNewPrivs", "0").strip() == "1",
        uid=int(told["Uid"].split()[1]),
        gid=int(told["Gid"].split()[1]),
        missing=missing,
    )


def perf_refused() -> str | None:
    """Why this process may not open CPU-wide perf events, which RAPL's are; None: it may, as a try has shown."""
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return "perf events are not known on this system"
    # perf_event_attr of 64 bytes (VER0): type 1 = software, size, config 0 = cpu-clock: every kernel has it, and asks for the
    # same right as the power events, for all processes on CPU 0.
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 64, 0), 64)
    cpu = min(os.sched_getaffinity(0))
    descriptor = _libc().syscall(
        ctypes.c_long(number), attributes, ctypes.c_int(-1), ctypes.c_int(cpu), ctypes.c_int(-1),
        ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
    )  # fmt: skip
    if descriptor >= 0:
        os.close(descriptor)
        return None
    return os.strerror(ctypes.get_errno())


def _become(account: tuple[int, int, list[int]], kernel: _Kernel) -> None:
    uid, gid, groups = account
    try:
        kernel.prctl("keepcaps", _PR_SET_KEEPCAPS, 1)
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise HubError(
            f"the process cannot become user {uid}: {error.strerror}",
            fix="start it as root, or leave --user out",
            state="permission_denied",
        ) from None
    kernel.prctl("keepcaps", _PR_SET_KEEPCAPS, 0)


def _account(user: str | None) -> tuple[int, int, list[int]] | None:
    """(uid, gid, all groups) of a user by name or number."""
    if user is None:
        return None
    import pwd

    try:
        found = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise HubError(
            f"there is no user {user!r} to become", fix=f"sudo useradd --system {user}", state="no_user"
        ) from None
    if found.pw_uid == 0:
        raise HubError("--user root would give nothing up", fix="leave --user out", state="no_user")
    return found.pw_uid, found.pw_gid, os.getgrouplist(found.pw_name, found.pw_gid)


def _numbers(mask: str) -> frozenset[int]:
    bits = int(mask, 16)
    return frozenset(number for number in range(64) if bits >> number & 1)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


class _Kernel:
    """prctl(2) and capset(2): errors name the step."""

    def __init__(self) -> None:
        self._libc = _libc()

    def prctl(self, step: str, option: int, first: int = 0) -> int:
        # Every argument as unsigned long: prctl is variadic, and the kernel refuses garbage in the unused ones.
        words = [ctypes.c_ulong(word) for word in (first, 0, 0, 0)]
        result = int(self._libc.prctl(ctypes.c_int(option), *words))
        if result < 0:
            self._failed(step)
        return result

    def capset(self, kept: frozenset[int]) -> None:
        low, high = (sum(1 << number - base for number in kept if base <= number < base + 32) for base in (0, 32))
        header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
        data = ctypes.create_string_buffer(struct.pack("6I", low, low, 0, high, high, 0))
        if self._libc.capset(header, data) < 0:
            self._failed("capset")

    @staticmethod
    def _failed(step: str) -> None:
        number = ctypes.get_errno()
        raise HubError(
            f"privileges cannot be dropped: {step}: {errno.errorcode.get(number, number)} {os.strerror(number)}",
            fix="--keep-capabilities runs with all of them",
            state="refused",
        )
