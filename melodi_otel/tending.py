"""A thread that looks after what has to be looked after now and then, while no settle thread does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger("melodi_otel")

EVERY_S: Final = 0.5


class Tender:
    """Calls ``turn`` twice a second, on a thread that starts when it is first needed.

    Args:
        turn: what to do; an exception of it ends nothing.
    """

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn
        self.forked()

    def forked(self) -> None:
        """In a child: the thread is not here."""
        self._thread: threading.Thread | None = None
        self._awake = threading.Event()
        self._over = False
        self._starting = threading.Lock()

    def soon(self) -> None:
        """Take a turn now, and from now on. Cheap; any thread."""
        self._awake.set()
        with self._starting:
            if not self._over and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="melodi-otel-tend", daemon=True)
                self._thread.start()

    def end(self, timeout: float) -> None:
        """No more turns; waits at most ``timeout`` seconds for the one that runs."""
        with self._starting:
            self._over = True
        self._awake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._over:
            self._awake.wait(EVERY_S)
            self._awake.clear()
            if self._over:
                return
            try:
                self._turn()
            except Exception:
                log.debug("melodi_otel: looking after the meter failed", exc_info=True)
