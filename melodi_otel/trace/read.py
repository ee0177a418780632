"""Reading traces: the lines of one file or several, plain or packed, one after the other and never all at once.

A recording in several files repeats at the beginning of each what the next lines are about. Whoever reads on from the file before
does not get these lines, and so has exactly the lines of a recording in one file. A file alone, or one whose predecessor is
missing, gives them.

Where packed data is damaged or ends in the middle, the whole lines before it are given, then :data:`DAMAGED`, which is no line of
a trace and so counts as a broken one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from melodi_otel.errors import TraceError
from melodi_otel.trace import lines as form
from melodi_otel.trace import packing

log = logging.getLogger("melodi_otel")

DAMAGED: Final = b"<damaged>"
"""Stands for what could not be unpacked."""
_CHUNK: Final = 1 << 18
_PACKED_CHUNK: Final = 1 << 16
_ENDINGS: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def lines_of(
    paths: Iterable[str | Path | IO[bytes]], progress: Callable[[int], None] = lambda _read: None
) -> Iterator[bytes]:
    """The lines of these files in the order of :func:`in_order`, without their newlines.

    Args:
        paths: files, directories, open streams.
        progress: called with the bytes that were read, packed as they may be.

    Raises:
        OSError: a file cannot be read.
        MissingDependency: the module that unpacks it is not installed.
        TraceError: a directory without a trace.
    """
    before: form.FileLine | None = None
    for path in in_order(paths):
        lines = _lines(path, progress)
        first = next(lines, None)
        heading = None if first is None else form.decode_file(first)
        if first is not None and heading is None:
            yield first
        elif heading is not None:
            if before is not None and before.run == heading.run and before.number + 1 == heading.number:
                for line in lines:
                    # They all stand at the beginning: further down nobody has to look for them.
                    if not form.said_again(line):
                        yield line
                        break
            elif before is not None and before.run == heading.run:
                log.warning("trace: a file between numbers %d and %d is missing", before.number, heading.number)
        before = heading
        yield from lines


def in_order(paths: Iterable[str | Path | IO[bytes]]) -> list[Path | IO[bytes]]:
    """These files; a directory is all traces in it, and the files of one recording follow each other by their numbers."""
    found: list[Path | IO[bytes]] = []
    for path in paths:
        if isinstance(path, str | Path):
            found += _files(Path(path))
        else:
            found.append(path)
    places: dict[str, int] = {}
    ranks: list[tuple[int, int, int]] = []
    for place, path in enumerate(found):
        heading = form.decode_file(first_line(path)) if isinstance(path, Path) and path.is_file() else None
        if heading is None:
            ranks.append((place, 0, place))
        else:
            ranks.append((places.setdefault(heading.run, place), heading.number, place))
    return [found[place] for _, _, place in sorted(ranks)]


def first_line(path: Path) -> bytes:
    """The first line of a file; empty where it has none, or cannot be read."""
    try:
        return next(_lines(path, lambda _read: None, 1 << 12), b"")
    except (OSError, ImportError):
        return b""


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.iterdir() if file.name.endswith(_ENDINGS) and file.is_file())
    if not inside:
        raise TraceError(f"{path}: expected files {', '.join('*' + ending for ending in _ENDINGS)}")
    return inside


def _lines(path: Path | IO[bytes], progress: Callable[[int], None], chunk: int = _CHUNK) -> Iterator[bytes]:
    if isinstance(path, Path):
        with path.open("rb", buffering=0) as stream:
            yield from _split(_unpacked(stream.read, str(path), progress, chunk))
    else:
        # What a pipe has is read at once: whoever writes into it may be slow.
        read: Any = getattr(path, "read1", path.read)
        yield from _split(_unpacked(read, str(getattr(path, "name", "trace")), progress, chunk))


def _split(chunks: Iterator[bytes | None]) -> Iterator[bytes]:
    """Lines of chunks; None: what comes next does not go on from what came before."""
    parts: list[bytes] = []
    for data in chunks:
        if data is None:
            parts = []
            yield DAMAGED
            continue
        lines = data.split(b"\n")
        if len(lines) == 1:
            parts.append(data)
            continue
        lines[0] = b"".join((*parts, lines[0]))
        parts = [lines.pop()]
        yield from lines
    rest = b"".join(parts)
    if rest:
        yield rest


def _unpacked(
    read: Callable[[int], bytes | None], name: str, progress: Callable[[int], None], chunk: int
) -> Iterator[bytes | None]:
    first = read(chunk) or b""
    how = packing.suffix(name) or next((how for how, magic in packing.MAGIC.items() if first.startswith(magic)), "")
    size = min(chunk, _PACKED_CHUNK) if how else chunk

    def raw() -> Iterator[bytes]:
        data = first
        while data:
            progress(len(data))
            yield data
            data = read(size) or b""

    return _parts(raw(), how, name) if how and first else raw()


def _parts(raw: Iterator[bytes], how: str, name: str) -> Iterator[bytes | None]:
    """Unpack part after part; after a damaged one go on with the next that can be found."""
    error, magic = packing.errors(how), packing.MAGIC[how]
    part: packing.Unpacker | None = None
    lost = b""  # the last bytes behind damage, in which a part may begin
    searching = False
    for chunk in raw:
        data = chunk
        while data:
            if searching:
                data = lost + data
                begin = data.find(magic)
                if begin < 0:
                    lost, data = data[1 - len(magic) :], b""
                    continue
                data, lost, searching = data[begin:], b"", False
            if part is None:
                part = packing.unpacker(how)
            try:
                out = part.decompress(data)
            except error:
                log.warning("trace: %s is damaged; what can be read of it is used", name)
                yield None
                # A part that begins with this very byte is the one that is damaged.
                part, searching, data = None, True, data[1:]
                continue
            if out:
                yield out
            data = part.unused_data if part.eof else b""
            if part.eof:
                part = None
    if part is not None:
        log.warning("trace: %s ends in the middle; what can be read of it is used", name)
        yield None
