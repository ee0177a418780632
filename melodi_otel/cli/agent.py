"""``melodi-otel agent``: the hub of a host, in the foreground, for a service manager or a container."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import typer

from melodi_otel.clock import SystemClock
from melodi_otel.config import VARIABLES, Config
from melodi_otel.errors import ConfigError, HubBusy, HubError
from melodi_otel.hub import privileges
from melodi_otel.hub.daemon import Daemon, Process
from melodi_otel.hub.directory import user_name
from melodi_otel.hub.notify import Notifier
from melodi_otel.hub.presence import AGENT_SOCKET
from melodi_otel.hub.settings import compare, read_variables
from melodi_otel.hub.sockets import Listener, listen

log = logging.getLogger("melodi_otel")

EXAMPLE = "Example: sudo melodi-otel agent --socket-group melodi --user melodi"
GROUP = "melodi"
BUSY = 3


class Factory(Protocol):
    """Makes the work of the agent; :class:`melodi_otel.hub_process.HubProcess` is one."""

    def __call__(
        self,
        config: Config,
        environ: Mapping[str, str],
        listener: Listener,
        *,
        mode: Literal["agent"],
        journal: Path | None,
    ) -> Process: ...


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; the fields are its options."""

    socket: Path = AGENT_SOCKET
    socket_group: str | None = None
    socket_mode: str = "0660"
    metrics_addr: str | None = None
    user: str | None = None
    keep_capabilities: bool = False
    journal: Path | None = None
    env_file: Path | None = None


def agent(
    socket: Path = typer.Option(AGENT_SOCKET, "--socket", metavar="PATH", help="Where programs connect."),
    socket_group: str | None = typer.Option(
        None,
        "--socket-group",
        metavar="GROUP",
        help=f"Whose members may connect. [default: {GROUP}, where there is such a group]",
    ),
    socket_mode: str = typer.Option("0660", "--socket-mode", metavar="OCTAL", help="Mode of the socket."),
    metrics_addr: str | None = typer.Option(
        None,
        "--metrics-addr",
        metavar="HOST:PORT|off",
        help="Where /metrics is served. [default: MELODI_METRICS_ADDR, else 127.0.0.1:9464, in a pod all interfaces]",
    ),
    user: str | None = typer.Option(None, "--user", metavar="NAME", help="Become this user once the socket is there."),
    keep_capabilities: bool = typer.Option(
        False, "--keep-capabilities", help="Stay as privileged as it was started; to look for errors."
    ),
    journal: Path | None = typer.Option(
        None, "--journal", metavar="FILE", help="What the next agent goes on from. [default: beside the socket]"
    ),
    env_file: Path | None = typer.Option(
        None,
        "--env-file",
        metavar="FILE",
        help="Variables (NAME=value); read again on SIGHUP, it wins over the environment.",
    ),
) -> None:
    """Measure this host for the programs on it, which need no privilege for that, and publish its energy once.

    Of root's rights it keeps two: to read files (CAP_DAC_READ_SEARCH) and performance counters (CAP_PERFMON). SIGHUP reads the
    settings again. SIGTERM settles what is under way, within 10 s; a second one ends it at once.

    Exit codes: 0 it was stopped, 1 privileges could not be dropped or it did not end in time, 2 an option or a MELODI_* value
    cannot be used, 3 another agent has the socket. A host without any meter is no error: it says so and serves.
    """
    options = Options(socket, socket_group, socket_mode, metrics_addr, user, keep_capabilities, journal, env_file)
    try:
        with _lines(os.environ):
            code = serve(options, os.environ)
    except HubBusy as error:
        print(f"melodi-otel: {error}", file=sys.stderr)
        raise typer.Exit(BUSY) from None
    except HubError as error:
        print(f"melodi-otel: {error}", file=sys.stderr)
        raise typer.Exit(1 if error.state == "not_dropped" else 2) from None
    except ConfigError as error:
        print(f"melodi-otel: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def serve(
    options: Options,
    environ: MutableMapping[str, str],
    make: Factory | None = None,
    *,
    leave: Callable[[int], Any] = os._exit,
) -> int:
    """Be the agent until somebody stops it; the exit code.

    Args:
        options: the command line.
        environ: the environment; the variables of the file are put into it.
        make: the work; None: the real one.
        leave: ends this process at once.

    Raises:
        ConfigError: an option or a variable cannot be used.
        HubBusy: another agent has the socket.
        HubError: the socket cannot be made, or privileges cannot be dropped (state ``not_dropped``).
    """
    outer = dict(environ)
    current = _Settings(options, outer)
    if current.config.metrics_addr is not None and "KUBERNETES_SERVICE_HOST" in current.environ:
        log.info("this is a pod: metrics are served on %s (--metrics-addr changes that)", current.config.metrics_addr)
    environ.update(current.file)  # no thread runs yet that could read it meanwhile
    owner = _owner(options)
    mode = _mode(options.socket_mode)
    # The order is what makes it safe:
    #   1. bind      needs root: the directory, the group of the socket
    #   2. drop      capabilities belong to threads, so there must be one only
    #   3. import    numpy starts threads when it is imported, so the work is imported now, not above
    #   4. start     opens the meters, which CAP_DAC_READ_SEARCH and CAP_PERFMON still let it, and starts threads
    listener = listen(_socket(options), mode=mode, group=_group(options, mode), owner=owner)
    try:
        _drop(options, environ)
        process = (make or _real())(
            current.config,
            current.environ,
            listener,
            mode="agent",
            journal=options.journal or options.socket.with_name(f"{options.socket.name}.journal"),
        )
        about = f"programs connect to {options.socket}"
        return Daemon(process, Notifier(outer, SystemClock()), current.reread, about, leave=leave).run()
    finally:
        listener.close()


class _Settings:
    """The settings in force, and how they are read again.

    Attributes:
        file: the variables of the file.
        environ: the environment with them; the same mapping stays up to date.
    """

    def __init__(self, options: Options, outer: Mapping[str, str]) -> None:
        self._options = options
        self._outer = outer
        self.file: dict[str, str] = {}
        self.environ: dict[str, str] = {}
        self.config = self._read()

    def reread(self) -> tuple[Config, tuple[str, ...]]:
        before = dict(self.environ)
        change = compare(self.config, self._read(), before, self.environ)
        self.config = change.config
        return change.config, change.restart

    def _read(self) -> Config:
        file = {} if self._options.env_file is None else read_variables(self._options.env_file)
        environ = {**self._outer, **file}
        config = Config.from_env(environ)  # before anything is taken over: a bad file changes nothing
        self.file = file
        self.environ.clear()
        self.environ.update(environ)
        if config.disabled:
            raise ConfigError("MELODI_DISABLED is set: an agent would do nothing; start it without, or not at all")
        return replace(config, metrics_addr=_address(self._options.metrics_addr, config.metrics_addr, environ))


def _real() -> Factory:
    from melodi_otel.hub_process import HubProcess, calm_collector

    calm_collector()
    return HubProcess


def _address(option: str | None, variable: str | None, environ: Mapping[str, str]) -> str | None:
    """Where to serve; None is the hub's own default, the first free port from 127.0.0.1:9464 on."""
    if option is not None:
        known = VARIABLES["MELODI_METRICS_ADDR"]
        try:
            return known.parse(option)
        except ValueError:
            raise ConfigError(f"--metrics-addr {option!r} cannot be used: allowed is {known.allowed}") from None
    if variable is None and (service := environ.get("KUBERNETES_SERVICE_HOST")):
        return "[::]:9464" if ":" in service else "0.0.0.0:9464"
    return variable


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0o600 <= mode <= 0o777 or not mode & 0o200:
        raise ConfigError(f"--socket-mode {text!r} cannot be used: allowed is an octal mode from 0600 to 0777")
    return mode


def _socket(options: Options) -> Path:
    directory = options.socket.parent
    if options.socket == AGENT_SOCKET and os.geteuid() != 0 and not os.access(directory, os.W_OK):
        raise HubError(
            f"{AGENT_SOCKET} is the host's socket, which root or a service of root's makes",
            fix="start it with sudo, or name a socket of your own with --socket PATH and give programs MELODI_HUB=PATH",
            state="permission_denied",
        )
    return options.socket


def _group(options: Options, mode: int) -> str | None:
    if options.socket_group is not None:
        return options.socket_group
    import grp

    try:
        grp.getgrnam(GROUP)
    except KeyError:
        if mode & 0o002:
            return None  # it lets everybody in
        log.warning(
            "there is no group %s, so only %s may connect to %s; to let others in: groupadd --system %s",
            GROUP,
            "root" if os.geteuid() == 0 else f"{user_name(os.geteuid())} and root",
            options.socket,
            GROUP,
        )
        return None
    if os.geteuid() == 0 or grp.getgrnam(GROUP).gr_gid in (os.getegid(), *os.getgroups()):
        return GROUP
    return None


def _owner(options: Options) -> int | None:
    if options.user is None:
        return None
    if options.keep_capabilities:
        raise ConfigError("--user and --keep-capabilities cannot be used together: choose one")
    import pwd

    try:
        uid = (pwd.getpwuid(int(options.user)) if options.user.isdigit() else pwd.getpwnam(options.user)).pw_uid
    except KeyError:
        raise ConfigError(
            f"--user {options.user!r} cannot be used: there is no such user; to make one: useradd --system {options.user}"
        ) from None
    if uid == 0:
        raise ConfigError(f"--user {options.user!r} cannot be used: as root it would give nothing up; leave --user out")
    return uid


def _drop(options: Options, environ: Mapping[str, str]) -> None:
    if options.keep_capabilities:
        log.warning("--keep-capabilities: everything that this process was started with is kept")
        return
    if sys.platform != "linux":
        return
    try:
        kept = privileges.drop(user=options.user)
    except HubError as error:
        error.state = "not_dropped"
        raise
    log.info("privileges: %s, nothing more", kept)
    if privileges.CAP_DAC_READ_SEARCH in kept.missing:
        log.warning(
            "CAP_DAC_READ_SEARCH is not there: RAPL's counters are read only where their files let %s",
            user_name(kept.uid),
        )
    power = Path(environ.get("MELODI_SYSFS_ROOT", "/sys"), "bus/event_source/devices/power")
    if power.is_dir() and (why := privileges.perf_refused()) is not None:
        log.warning(
            "RAPL's perf events are refused (%s); powercap is used where it can be read. To repair: give the agent CAP_PERFMON, "
            "or set the sysctl kernel.perf_event_paranoid to 0",
            why,
        )


@contextmanager
def _lines(environ: Mapping[str, str]) -> Generator[None]:
    """Log from INFO on; with a priority in front where the journal reads along."""
    level = log.level
    if logging.getLogger().level > logging.INFO:
        log.setLevel(logging.INFO)
    changed: list[tuple[logging.Handler, logging.Formatter | None]] = []
    if _journal(environ):
        for handler in logging.getLogger().handlers:
            if getattr(handler, "stream", None) is sys.stderr:
                changed.append((handler, handler.formatter))
                handler.setFormatter(Priorities("%(name)s: %(message)s"))
    try:
        yield
    finally:
        log.setLevel(level)
        for handler, formatter in changed:
            handler.setFormatter(formatter)


class Priorities(logging.Formatter):
    """``<3>``…``<7>`` before every line, as sd-daemon(3) wants it: a line without one would count as information."""

    def format(self, record: logging.LogRecord) -> str:
        """All lines of a record have its priority."""
        number = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}.get(record.levelname, 6)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


def _journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error is the journal's: a child may have inherited the variable and not the stream."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))
