"""The life of a hub in the foreground: ready, reloaded, asked to stop, gone in time.

::

    main thread    start ─► wait ──────────────────────► stopping ─► close (on a thread of its own, at most 10 s) ─► exit code
    pulse thread        ready? ─► READY=1 … STATUS, WATCHDOG=1 … reload …
    stop thread         request_stop, when a signal has come
    signals        TERM, INT: wake the stop thread; the second one ends the process at once.  HUP: wakes the pulse thread

A signal handler runs between any two instructions of the main thread, which may hold any lock: an ``Event.set`` in it waits for
ever where the main thread is just about to wait for that event. So a handler only calls ``SimpleQueue.put``, which is made for
that. The stop thread is one of its own because the pulse may be stuck in a reload.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any, Final, Protocol

from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.hub.notify import Notifier

log = logging.getLogger("melodi_otel")

CLOSE_S: Final = 10.0
"""Seconds for the last reading, settling and sending."""
_JOIN_S: Final = 1.0
_BEAT_S: Final = 10.0
_START_BEAT_S: Final = 0.2


class Process(Protocol):
    """The work of a hub, on its own threads."""

    @property
    def endpoint_url(self) -> str | None:
        """Where ``/metrics`` is served, or None."""
        ...

    def start(self) -> None:
        """Open the meters, start the threads, accept programs."""
        ...

    def wait(self) -> None:
        """Block until asked to stop."""
        ...

    def request_stop(self) -> None:
        """Make :meth:`wait` return; called on a thread of its own, maybe before :meth:`start` has returned."""
        ...

    def reload(self, config: Config) -> list[str]:
        """Take ``config`` over; what changed, in words."""
        ...

    def close(self, timeout: float) -> None:
        """Stop accepting, read the meters once more, settle, write the journal, send; within ``timeout`` seconds."""
        ...

    def ready(self) -> str | None:
        """None: it works; else why not yet. A hub that is stuck does not return from it, and is restarted for that."""
        ...


class Daemon:
    """Runs a :class:`Process` until somebody stops it.

    Args:
        process: the work.
        notifier: the service manager.
        reread: reads the settings again: what shall be in force, and names of what needs a restart.
        about: one line on who and where, for the log and ``systemctl status``.
        leave: ends this process at once with an exit code.
        close_s: seconds for :meth:`Process.close`.
    """

    def __init__(
        self,
        process: Process,
        notifier: Notifier,
        reread: Callable[[], tuple[Config, tuple[str, ...]]],
        about: str = "",
        *,
        leave: Callable[[int], Any] = os._exit,
        close_s: float = CLOSE_S,
    ) -> None:
        self._process = process
        self._notifier = notifier
        self._reread = reread
        self._about = about
        self._leave = leave
        self._close_s = close_s
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ending: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._stops = 0
        self._was_ready = False
        self._why: str | None = ""
        self._said = ""

    def run(self) -> int:
        """Start, serve, stop; the exit code: 0 a clean stop, 1 what was under way could not be finished in time.

        Raises:
            MelodiError: it could not be started.
        """
        with self._signals():
            pulse = threading.Thread(target=self._pulse, name="melodi-otel-pulse", daemon=True)
            stopper = threading.Thread(target=self._stopper, name="melodi-otel-stop", daemon=True)
            stopper.start()
            try:
                self._process.start()
                pulse.start()
                self._process.wait()
                log.info("stopping: the meters are read once more and what is under way is settled")
                self._notifier.stopping("settling what is under way")
            finally:
                self._ending.put(False)
                stopper.join(min(_JOIN_S, self._close_s))
                self._asked.put("end")
                if pulse.ident is not None:
                    pulse.join(min(_JOIN_S, self._close_s))
                in_time = self._close()
        if not in_time:
            self._leave(1)  # a thread that hangs would keep the interpreter from ending
            return 1
        log.info("stopped")
        return 0

    def beat(self) -> None:
        """Tell the manager how it goes; the first time that it works, that it is ready."""
        try:
            why = self._process.ready()
        except Exception as error:
            if self._said != str(error):
                self._said = str(error)
                log.exception("the hub cannot say how it is; a service manager that watches it starts it again")
            return
        if why != self._why:
            self._why = why
            if why is None and not self._was_ready:
                self._was_ready = True
                log.info("ready: %s", self._status())
                self._notifier.ready(self._status())
            elif why is None:
                log.info("it works again")
                self._notifier.status(self._status())
            else:
                log.log(logging.WARNING if self._was_ready else logging.INFO, "not ready: %s", why)
                self._notifier.status(f"not ready: {why}")
        self._notifier.alive()

    def reload(self) -> None:
        """Read the settings again and say what changed; settings that cannot be used change nothing."""
        self._notifier.reloading()
        try:
            config, restart = self._reread()
            changed = self._process.reload(config)
            log.info("reloaded: %s", "; ".join(changed) or "nothing has changed")
            if restart:
                log.warning("these take effect after a restart: %s", ", ".join(restart))
        except ConfigError as error:
            log.error("not reloaded, the settings stay as they were: %s", error)
        except Exception:
            log.exception("the reload failed; some settings may be old, some new")
        self._notifier.ready(self._status())

    def _status(self) -> str:
        url = self._process.endpoint_url
        return ", ".join(part for part in (self._about, f"metrics at {url}" if url else "no metrics page") if part)

    def _pulse(self) -> None:
        steady = min(self._notifier.watchdog_s or _BEAT_S, _BEAT_S)
        while True:
            self.beat()
            try:
                asked = self._asked.get(timeout=steady if self._was_ready else min(_START_BEAT_S, steady))
            except queue.Empty:
                continue
            if asked == "end":
                return
            self.reload()

    def _stopper(self) -> None:
        while self._ending.get():
            try:
                self._process.request_stop()
            except Exception:
                log.exception("the hub cannot be asked to stop; a second signal ends it")

    def _close(self) -> bool:
        """Whether the work ended in time."""
        failed: list[BaseException] = []

        def close() -> None:
            try:
                self._process.close(self._close_s)
            except BaseException as error:
                failed.append(error)

        closing = threading.Thread(target=close, name="melodi-otel-close", daemon=True)
        closing.start()
        closing.join(self._close_s)
        if closing.is_alive():
            log.error("it did not end within %g s; joules that were not settled are lost", self._close_s)
            return False
        if failed:
            log.error("it did not end well: %s", failed[0], exc_info=failed[0])
        return True

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        before: dict[int, Any] = {}

        def stop(number: int, frame: object) -> None:
            self._stops += 1
            if self._stops > 1:
                self._leave(128 + number)
            self._ending.put(True)

        def again(number: int, frame: object) -> None:
            self._asked.put("reload")

        handlers = {"SIGTERM": stop, "SIGINT": stop, "SIGHUP": again}
        try:
            for name, handler in handlers.items():
                number = getattr(signal, name, None)
                if number is not None:
                    before[number] = signal.signal(number, handler)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
