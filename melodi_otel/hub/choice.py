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
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
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
WORKERS: Final = ("WEB_CONCURRENCY", "GUNICORN_WORKERS", "UVICORN_WORKERS")

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
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting = setting
        self._environ = environ

        def start_here(path: Path) -> None:
            launch.start(path, environ)

        self._start = start or start_here
        self.agent = Hub("agent", agent or places.AGENT_SOCKET)
        self._forked = forked
        self._now = now
        self._starts: deque[float] = deque()
        self._over = threading.Event()
        self._tier = "local"

    def shared(self) -> Hub | None:
        """This user's shared hub, running or not; None: there is no place for its socket."""
        try:
            return Hub("shared", places.shared_socket(places.runtime_directory(self._environ)))
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
                if hub is not None and (opened := _try(hub)) is not None:
                    self._tier = hub.tier
                    return lambda: opened
            if not self._several():
                return None
        if shared is None:
            log.warning("MELODI_HUB=shared: there is no directory for its socket; this process has its own meter")
            return None
        self._tier = "shared"
        return lambda: self._started(shared)

    def above(self, client: HubClient | None) -> Connect | None:
        """A hub above this one that can be connected now; None: there is none."""
        if self._setting == "local" or self._setting.startswith("/") or sys.platform == "win32":
            return None
        tier = "local" if client is None else "shared" if client.hub is None else client.hub.tier
        candidates: list[Hub | None] = []
        if tier != "agent" and self._setting == "auto":
            candidates.append(self.agent)
        if tier == "local":
            candidates.append(self.shared())
        for hub in candidates:
            if hub is not None and (opened := _try(hub)) is not None:
                return lambda: opened
        return None

    def after(self, client: HubClient, why: str) -> Connect | None:
        """What takes the place of a hub that is gone; None: the meter in this process."""
        met = client.hub
        if self._over.is_set():
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
        if shared is None or not self._may_start() or (met is None and self._setting == "auto" and not self._several()):
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
        return any((self._environ.get(name) or "").isdigit() and int(self._environ[name]) > 1 for name in WORKERS)

    def _may_start(self) -> bool:
        now = self._now()
        while self._starts and now - self._starts[0] > RESTART_WINDOW_S:
            self._starts.popleft()
        return len(self._starts) < RESTARTS

    def _started(self, hub: Hub) -> socket.socket:
        opened = _try(hub)
        if opened is not None:
            return opened
        self._starts.append(self._now())
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
            if shared is None or not (self._several() and self._may_start()):
                raise
            return self._started(shared)


def _try(hub: Hub) -> socket.socket | None:
    try:
        return connect(hub.path, CONNECT_S)
    except ConnectRefused as error:
        if error.refusal.state not in ("absent", "stale"):
            log.info("the %s hub is not used: %s", hub.tier, error.refusal.reason)
        return None
