"""Lines of ``/proc/<pid>/mountinfo`` (proc_pid_mountinfo(5))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: what of its filesystem is mounted, where, and the filesystem's type."""

    root: str
    point: str
    kind: str


def mounts_of(text: str) -> Iterator[Mount]:
    """Every line that is one, as it stands there: blanks in names are still written in octal."""
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if dash and len(fields) >= 6:
            yield Mount(fields[3], fields[4], after.split(" ")[0])
