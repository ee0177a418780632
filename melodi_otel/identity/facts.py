"""Where facts are read, and how they are kept: the first answer to a question stands, with where it came from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

Value = str | int | tuple[str, ...]

_LINE: Final = 4096
_NONBLOCK: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look.

    Attributes:
        root: the root of this process's filesystem.
        sysfs: sysfs of the host (a container may have it mounted elsewhere).
        procfs: procfs of the host.
        own_procfs: procfs of this process.
    """

    root: str = "/"
    sysfs: str = "/sys"
    procfs: str = "/proc"
    own_procfs: str = "/proc"

    def file(self, path: str, limit: int = _LINE) -> str:
        """The text of a file below the root; empty where there is none."""
        return read(Path(self.root, path), limit)


class Facts:
    """Attributes as they are found; whoever knows best speaks first."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.origins: dict[str, str] = {}

    def say(self, name: str, value: Value | None, origin: str) -> None:
        """``name`` is ``value``, unless something is known already or the value says nothing."""
        if name not in self.values and value is not None and value not in ("", ()):
            self.values[name] = value
            self.origins[name] = origin

    def text(self, name: str) -> str | None:
        """What is known of ``name``, where that is text."""
        value = self.values.get(name)
        return value if isinstance(value, str) else None


def read(path: Path, limit: int = _LINE) -> str:
    """At most ``limit`` bytes of a file as text; empty where it cannot be read. Never waits for a writer."""
    try:
        handle = os.open(path, os.O_RDONLY | _NONBLOCK)
    except (OSError, ValueError):
        return ""
    try:
        parts: list[bytes] = []
        left = limit
        while left > 0 and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts).decode("utf-8", "replace").strip("\0\n\r\t ")
    except OSError:
        return ""
    finally:
        os.close(handle)
