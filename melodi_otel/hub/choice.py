"""Which meter a program uses: the agent's, this user's shared hub, or one of its own (``MELODI_HUB``).

``auto``, once per process when metering starts there::

    the agent's socket, if it connects
    → this user's shared hub, if it connects
    → start a shared hub, where several processes meter together: a group token came from a parent, vLLM is there, this is a
      child of multiprocessing or was forked while metered, or several workers are configured
    → the meter in this process

A socket that refuses counts as absent; ``doctor`` says why. Once on a hub, a program never goes below it while it lives; when
it dies, the same is tried again (a shared hub is started at most three times a minute), then what is below.
"""

from __future__ import annotations

import logging
import shlex
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from melodi_otel.config import inherited_group
from melodi_otel.hub import launch, places
from melodi_otel.hub.client import HubClient, HubLost
from melodi_otel.hub.sockets import ConnectRefused, connect

log = logging.getLogger("melodi_otel")

CONNECT_S: Final = 1.0
RESTARTS: Final = 3
RESTART_WINDOW_S: Final = 60.0
RETURN_S: Final = 10.0
"""How long a program waits for an agent that went away to come back, as it does in a restart."""
QUICK_S: Final = 0.2
"""In a forked child it is a request that asks first."""
WORKERS: Final = ("WEB_CONCURRENCY", "GUNICORN_WORKERS", "UVICORN_WORKERS")
SERVERS: Final = frozenset({"gunicorn", "uvicorn", "hypercorn", "granian", "fastapi"})

Connect = Callable[[], socket.socket]


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a hub is, and of which tier."""

    tier: str
    path: Path


class Choice:
    """How this process finds its meter.

    Args:
        setting: ``MELODI_HUB``: auto, local, shared or the path of a socket.
        environ: variables of the process.
        start: starts a shared hub at a path; raises :class:`HubLost`.
        agent: the agent's socket; None: where it is by default.
        forked: this process was forked while it was metered.
        arguments: of this program's command line.
        now: seconds, monotonic.
    """

    def __init__(
        self,
        setting: str,
        environ: Mapping[str, str],
        *,
        start: Callable[[Path], None] | None = None,
        agent: Path | None = None,
        forked: bool = False,
        arguments: Sequence[str] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting = setting
        self._environ = environ

        def start_here(path: Path) -> None:
            launch.start(path, environ)

        self._given = start
        self._start = start or start_here
        self._arguments = sys.argv if arguments is None else arguments
        self.agent = Hub("agent", agent or places.AGENT_SOCKET)
        self._forked = forked
        self._now = now
        self._losses: deque[float] = deque()
        self._over = threading.Event()
        self._shared: Hub | None = None
        self._said: set[tuple[str, str]] = set()

    def in_child(self) -> Choice:
        """The same in a forked child of this process."""
        return Choice(
            self._setting,
            self._environ,
            start=self._given,
            agent=self.agent.path,
            forked=True,
            arguments=self._arguments,
            now=self._now,
        )

    def shared(self) -> Hub | None:
        """This user's shared hub, running or not; None: there is no place for its socket."""
        if self._shared is not None:
            return self._shared
        try:
            self._shared = Hub("shared", places.shared_socket(places.runtime_directory(self._environ)))
            return self._shared
        except Exception as error:
            log.debug("there is no place for a shared hub's socket: %s", error)
            return None

    def first(self) -> Connect | None:
        """How to connect to the hub to use, or None for the meter in this process. Quick: nothing is started here."""
        if self._setting == "local" or sys.platform == "win32":
            return None
        if self._setting.startswith("/"):
            return lambda: self._wait_for(Hub("agent", Path(self._setting)), CONNECT_S)
        shared = self.shared()
        if self._setting == "auto":
            for hub in (self.agent, shared):
                if hub is not None and (opened := self._try(hub)) is not None:
                    return lambda: opened
            if not self._several():
                return None
        if shared is None:
            log.warning("MELODI_HUB=shared: there is no directory for its socket; this process has its own meter")
            return None
        return lambda: self._started(shared)

    def above(self, client: HubClient | None) -> Connect | None:
        """A hub above this one that can be connected now; None: there is none.

        Once vLLM is imported a program shares its engines with processes that vLLM starts: who greeted as one that is alone
        goes there once more, to the same hub.
        """
        if self._setting == "local" or sys.platform == "win32" or not self._may_try():
            return None
        grown = client is not None and client.alone and "vllm" in sys.modules
        tier = "local" if client is None or grown else "shared" if client.hub is None else client.hub.tier
        candidates: list[Hub | None] = []
        if tier != "agent" and self._setting == "auto":
            candidates.append(self.agent)
        if tier == "local":
            named = self._setting.startswith("/")
            candidates.append(Hub("agent", Path(self._setting)) if named else self.shared())
        for hub in candidates:
            if hub is not None and (opened := self._try(hub)) is not None:
                return lambda: opened
        return None

    def after(self, client: HubClient, why: str) -> Connect | None:
        """What takes the place of a hub that is gone; None: the meter in this process."""
        met = client.hub
        if self._over.is_set():
            return None
        # Each loss counts, whatever the reason: a hub that is there and refuses, or hangs, must not be tried in a circle.
        allowed = self._may_try()
        self._losses.append(self._now())
        if not allowed:
            log.warning("the hub is gone once more (%s); this process has its own meter now", why)
            return None
        if self._setting.startswith("/"):
            if met is None:
                log.warning("MELODI_HUB=%s: %s; this process has its own meter", self._setting, why)
                return None
            return lambda: self._wait_for(Hub("agent", Path(self._setting)), RETURN_S)
        if met is not None and met.tier == "agent":
            log.warning("the agent's hub is gone (%s); waiting %g s for it to come back", why, RETURN_S)
            return lambda: self._back_or_below()
        shared = self.shared()
        if shared is None or (met is None and self._setting == "auto" and not self._several()):
            log.warning("there is no hub any more (%s); this process has its own meter now", why)
            return None
        if met is not None:
            log.warning("the shared hub is gone (%s); starting another", why)
        return lambda: self._started(shared)

    def end(self) -> None:
        """The program ends: nothing is waited for any more."""
        self._over.set()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _several(self) -> bool:
        """Whether this is probably one of several processes that meter the same hardware."""
        if self._forked or inherited_group(self._environ) or "vllm" in sys.modules:
            return True
        children = sys.modules.get("multiprocessing.process")
        if children is not None and children.parent_process() is not None:
            return True
        return any(number > 1 for number in self._workers())

    def _workers(self) -> Iterator[int]:
        for name in WORKERS:
            yield _int(self._environ.get(name))
        try:
            given = shlex.split(self._environ.get("GUNICORN_CMD_ARGS") or "")
        except ValueError:
            given = []
        yield _told(given)
        # `python -m uvicorn` has the path of a __main__.py here.
        own = Path(self._arguments[0]) if self._arguments else Path()
        if own.name.removesuffix(".exe") in SERVERS or own.parent.name in SERVERS:
            yield _told(self._arguments[1:])

    def _may_try(self) -> bool:
        now = self._now()
        while self._losses and now - self._losses[0] > RESTART_WINDOW_S:
            self._losses.popleft()
        return len(self._losses) < RESTARTS

    def _started(self, hub: Hub) -> socket.socket:
        opened = self._try(hub)
        if opened is not None:
            return opened
        self._start(hub.path)
        return self._wait_for(hub, launch.START_S)

    def _wait_for(self, hub: Hub, seconds: float) -> socket.socket:
        end = self._now() + seconds
        while True:
            try:
                return connect(hub.path, CONNECT_S)
            except ConnectRefused as error:
                waits = error.refusal.state in ("absent", "stale", "no_answer")
                if not waits or self._now() >= end:
                    raise HubLost(error.refusal.reason) from None
            if self._over.wait(0.02):
                raise HubLost("the program ends")

    def _back_or_below(self) -> socket.socket:
        try:
            return self._wait_for(self.agent, RETURN_S)
        except HubLost:
            shared = self.shared()
            if shared is None or not self._several():
                raise
            return self._started(shared)

    def _try(self, hub: Hub) -> socket.socket | None:
        try:
            return connect(hub.path, QUICK_S if self._forked else CONNECT_S)
        except ConnectRefused as error:
            refusal = error.refusal
            if refusal.state not in ("absent", "stale") and (hub.tier, refusal.state) not in self._said:
                self._said.add((hub.tier, refusal.state))
                log.info("the %s hub is not used: %s", hub.tier, refusal.reason)
            return None


def _int(value: str | None) -> int:
    return int(value) if value is not None and value.isascii() and value.isdigit() else 0


def _told(arguments: Sequence[str]) -> int:
    """The number of workers on a server's command line, 0 where it has none."""
    for at, word in enumerate(arguments):
        if word in ("-w", "--workers"):
            return _int(arguments[at + 1]) if at + 1 < len(arguments) else 0
        if word.startswith("--workers="):
            return _int(word.removeprefix("--workers="))
        if word.startswith("-w") and not word.startswith("--"):
            return _int(word[2:].removeprefix("="))
    return 0
