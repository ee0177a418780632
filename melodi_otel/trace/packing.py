"""Packed traces: ``.gz`` and ``.zst`` files of many small complete parts (gzip members, Zstandard frames), one behind the other.

What a part holds is on the disk as soon as the part is, whatever becomes of the writer. Zstandard is an optional module.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Final, Protocol

from melodi_otel.errors import MissingDependency

_GZIP: Final = 31  # zlib's number for: with a gzip header and the largest window
_GZIP_LEVEL: Final = 1
_ZSTD_LEVEL: Final = 1
MAGIC: Final = {
    # Not a flag is set and there is no time: zlib writes the same header before each member.
    ".gz": b"\x1f\x8b\x08",
    ".zst": b"\x28\xb5\x2f\xfd",
}
"""How a part begins, by the suffix of the file."""


class Packer(Protocol):
    """Packs one part."""

    def compress(self, data: Any, /) -> bytes:
        """Take ``data``, give what is ready."""
        ...

    def flush(self) -> bytes:
        """End the part."""
        ...


class Unpacker(Protocol):
    """Unpacks one part; ``unused_data`` is what follows it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes:
        """Take ``data``, give what it holds; raises one of :func:`errors`."""
        ...


def suffix(path: str | Path) -> str:
    """``.gz``, ``.zst`` or empty: how a file of this name is packed."""
    found = Path(path).suffix.lower()
    return found if found in MAGIC else ""


def packer(how: str) -> Packer:
    """A new part.

    Raises:
        MissingDependency: the module for it is not installed.
    """
    if how == ".gz":
        return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP)
    return _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compressobj()


def unpacker(how: str) -> Unpacker:
    """For the next part.

    Raises:
        MissingDependency: the module for it is not installed.
    """
    if how == ".gz":
        return zlib.decompressobj(_GZIP)
    return _zstandard().ZstdDecompressor().decompressobj()


def errors(how: str) -> type[Exception]:
    """What is raised where a part is damaged."""
    return zlib.error if how == ".gz" else _zstandard().ZstdError


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingDependency("a trace file .zst needs the module zstandard: pip install zstandard") from None
    return zstandard
