"""The files of a recording: whole lines, packed where the name says so, and in several files where they would grow too large.

::

    trace.jsonl.gz ── full ──► trace.1.jsonl.gz ── full ──► trace.2.jsonl.gz …
                               └ begins with what still holds, marked as said again
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Final

from melodi_otel.trace import lines as form
from melodi_otel.trace import packing
from melodi_otel.trace.read import first_line

log = logging.getLogger("melodi_otel")

_PART: Final = 1 << 20
"""Bytes of lines in one packed part: more would hardly be packed any better."""
_PART_S: Final = 1.0
"""Flushing more often than this ends no part: what a crash may take is worth less than the room of tiny parts."""


class TraceFiles:
    """Where lines are written.

    Args:
        path: the first file; it is replaced, with those that followed it. Where another process is writing it now,
            ``NAME.PID.jsonl`` beside it is used.
        rotate: bytes on the disk from which on the next file is begun; None: there is one file.
        keep: how many files are left, the newest; 0: all.
        standing: the lines that a next file begins with.
        clock: seconds.

    Raises:
        OSError: the file cannot be written.
        MissingDependency: the module that packs it is not installed.
    """

    def __init__(
        self,
        path: Path,
        rotate: int | None,
        keep: int,
        standing: Callable[[], Iterable[bytes]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._how = packing.suffix(path)
        self._packer = packing.packer(self._how) if self._how else None
        self._clock = clock
        self._standing = standing
        self._first, opened = _own_file(path)
        # Unbuffered, with a buffer of the recorder's own: the lock of a buffered file may be held when the process forks.
        self._file: FileIO | None = opened
        self._rotate = rotate if _regular(opened) else None
        self._keep = keep
        self._run: Final = secrets.token_hex(8)
        self._number = 0
        self._kept = [self._first]
        self._size = 0
        self._ready = b""
        self._waiting = 0
        self._ended = -math.inf
        if self._rotate is not None:
            self._begin(self._heading())

    @property
    def open(self) -> bool:
        """Whether lines can be written."""
        return self._file is not None

    @property
    def rotating(self) -> bool:
        """Whether there may be a next file."""
        return self._rotate is not None

    def write(self, data: bytes | bytearray) -> None:
        """Write whole lines; packed ones may wait for :meth:`flush`."""
        if self._file is None:
            return
        self._put(data)
        if self._rotate is not None and self._size >= self._rotate:
            self._next()

    def flush(self) -> None:
        """Hand packed lines to the operating system, where some have waited long enough."""
        if self._file is not None and self._waiting and self._clock() - self._ended >= _PART_S:
            self._end_part()
            if self._rotate is not None and self._size >= self._rotate:
                self._next()

    def close(self) -> None:
        """Finish the file."""
        try:
            if self._file is not None:
                self._end_part()
        finally:
            self.leave()

    def leave(self) -> None:
        """Write nothing any more, not even what waits."""
        file, self._file = self._file, None
        self._packer = None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _put(self, data: bytes | bytearray) -> None:
        if not self._how:
            self._hand(data)
            return
        if self._packer is None:
            self._packer = packing.packer(self._how)
        ready = self._packer.compress(data)
        # What is ready waits for its part to be whole: a writer that is killed leaves no half part behind.
        self._ready += ready
        self._waiting += len(data)
        if self._waiting >= _PART:
            self._end_part()

    def _end_part(self) -> None:
        packer, self._packer = self._packer, None
        if packer is not None and self._waiting:
            self._waiting = 0
            self._ended = self._clock()
            ready, self._ready = self._ready + packer.flush(), b""
            self._hand(ready)

    def _begin(self, data: bytes) -> None:
        # A part of its own: whoever finds the file while it is written sees which recording it belongs to.
        ended = self._ended
        self._put(data)
        self._end_part()
        self._ended = ended

    def _hand(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        while rest and self._file is not None:
            done = self._file.write(rest) or 0
            self._size += done
            rest = rest[done:]

    def _heading(self) -> bytes:
        return form.encode(form.FileLine(self._run, self._number))

    def _next(self) -> None:
        self._end_part()
        path = numbered(self._first, self._number + 1)
        # Its lock is there before the last one's is gone: a process that starts now sees that this recording is being written.
        following = path.open("ab", buffering=0)
        _lock(following)
        following.truncate(0)
        before, self._file = self._file, following
        if before is not None:
            before.close()
        self._number += 1
        self._size = 0
        self._kept.append(path)
        self._begin(b"".join((self._heading(), *self._standing())))
        while self._keep and len(self._kept) > self._keep:
            with contextlib.suppress(OSError):
                self._kept.pop(0).unlink(missing_ok=True)


def numbered(path: Path, number: int) -> Path:
    """``NAME.NUMBER.jsonl`` beside ``NAME.jsonl``; the suffix of a packed file stays behind."""
    stem, ending = _parts(path)
    return path.with_name(f"{stem}.{number}{ending}")


def _parts(path: Path) -> tuple[str, str]:
    plain = Path(path.name.removesuffix(path.suffix)) if packing.suffix(path) else Path(path.name)
    return plain.stem, path.name.removeprefix(plain.stem)


def _own_file(path: Path) -> tuple[Path, FileIO]:
    # Opened without cutting it: a process that finds it in use must leave it as it is. One that went on in a next file has
    # only that open.
    followers = list(_followers(path))
    file = None if any(_in_use(follower) for follower in followers) else path.open("ab", buffering=0)
    if file is None or not _lock(file):
        if file is not None:
            file.close()
        path = numbered(path, os.getpid())
        log.info("another process records to the trace file; this one writes %s", path)
        file = path.open("ab", buffering=0)
        _lock(file)
        followers = list(_followers(path))
    if _regular(file):
        file.truncate(0)
        for follower in followers:
            with contextlib.suppress(OSError):
                follower.unlink()
    return path, file


def _followers(path: Path) -> Iterator[Path]:
    # Files that an earlier recording of this name went on in; others whose names look like theirs are somebody else's.
    stem, ending = _parts(path)
    name = re.compile(re.escape(stem) + r"\.([1-9]\d*)" + re.escape(ending))
    try:
        others = sorted(path.parent.iterdir()) if path.is_file() or not path.exists() else []
    except OSError:
        return
    for other in others:
        found = name.fullmatch(other.name)
        if found is not None and other.is_file():
            heading = form.decode_file(first_line(other))
            if heading is not None and heading.number == int(found[1]):
                yield other


def _in_use(path: Path) -> bool:
    try:
        with path.open("ab", buffering=0) as file:
            return not _lock(file)
    except OSError:
        return False


def _regular(file: FileIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _lock(file: FileIO) -> bool:
    if sys.platform == "win32" or not _regular(file):
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
