"""Files that are read again when they change: certificates and passwords are renewed while a server runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from melodi_otel.errors import ConfigError

log = logging.getLogger("melodi_otel")

T = TypeVar("T")
_Print = tuple[tuple[int, int, int] | None, ...]


class Reloading(Generic[T]):
    """What some files hold, as of their last good state.

    Args:
        files: they are looked at by time, size and inode, so that a replaced link counts as a change.
        load: makes the value; raises ConfigError with a message for the person who wrote the file.

    Attributes:
        value: what was read last, without a look at the files.

    Raises:
        ConfigError: the files cannot be used at the start.
    """

    def __init__(self, files: Sequence[str], load: Callable[[], T]) -> None:
        self._files = [Path(file) for file in files]
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._look()
        self.value = load()

    def current(self) -> T:
        """The value; loaded again where a file changed. A bad file is warned about once and leaves the old value."""
        seen = self._look()
        if seen != self._seen:
            self._renew(seen)
        return self.value

    def reload(self) -> bool:
        """Load now, whether or not a file changed; False: the old value was kept, and a warning says why."""
        return self._renew(self._look())

    def forked(self) -> None:
        """In a child: the lock may be held by a thread that is not there."""
        self._lock = threading.Lock()

    def _renew(self, seen: _Print) -> bool:
        with self._lock:
            self._seen = seen  # also where it fails: said once per change
            try:
                self.value = self._load()
            except ConfigError as error:
                log.warning("%s; what was read before stays in force", error)
                return False
        return True

    def _look(self) -> _Print:
        return tuple(_print(file) for file in self._files)


def _print(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
