from __future__ import annotations

import json
from pathlib import Path

import pytest

from melodi_otel.cli.demo_model import COMPLETE, build, cache_root, is_complete


@pytest.mark.parametrize(
    ("environ", "platform", "place"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "linux", "/x/melodi_otel"),
        ({}, "linux", "/h/.cache/melodi_otel"),
        ({}, "darwin", "/h/Library/Caches/melodi_otel"),
        ({"LOCALAPPDATA": "/l"}, "win32", "/l/melodi_otel"),
        ({}, "win32", "/h/AppData/Local/melodi_otel"),
    ],
)
def test_the_cache_is_the_users(environ, platform, place):
    """The cache stands where each system keeps caches."""
    assert cache_root(environ, platform, Path("/h")) == Path(place)


def unpack(part: Path) -> None:
    (part / "model.bin").write_bytes(b"12345")


def test_build_is_complete_and_leaves_nothing_else(tmp_path):
    """The folder appears whole, with its marker, and no temporary one stays."""
    folder = tmp_path / "cache" / "model"
    build(folder, "v1", unpack)
    assert is_complete(folder, "v1")
    assert not is_complete(folder, "v2")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.bin").write_bytes(b"1"),
        lambda folder: (folder / "model.bin").unlink(),
        lambda folder: (folder / COMPLETE).unlink(),
        lambda folder: (folder / COMPLETE).write_text("{"),
        lambda folder: (folder / COMPLETE).write_text(json.dumps([1])),
    ],
)
def test_a_broken_cache_is_seen_and_made_again(tmp_path, damage):
    """A lost byte, file or marker makes the folder incomplete; building replaces it."""
    folder = tmp_path / "model"
    build(folder, "v1", unpack)
    damage(folder)
    assert not is_complete(folder, "v1")
    build(folder, "v1", unpack)
    assert is_complete(folder, "v1")


def test_an_interrupted_build_leaves_nothing(tmp_path):
    """Ctrl-C while unpacking leaves neither the folder nor a part of it."""

    def interrupted(part):
        unpack(part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "model", "v1", interrupted)
    assert list(tmp_path.iterdir()) == []
