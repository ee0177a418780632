from __future__ import annotations

from pathlib import Path

import pytest

from melodi_otel.identity import Places, identify


class Machine:
    """A machine made of files; nothing of the real one is seen.

    Args:
        root: where it stands.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ: dict[str, str] = {}
        self.places = Places(*(str(root / name) for name in ("", "sys", "proc", "proc")))
        self.hostname = "box"
        self.arch = "x86_64"
        self.host_id: str | None = None

    def file(self, path: str, text: str = "") -> Machine:
        """Put a file there."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        return self

    def cgroup(self, text: str) -> Machine:
        """What /proc/self/cgroup says."""
        return self.file("proc/self/cgroup", text)

    def mounts(self, text: str) -> Machine:
        """What /proc/self/mountinfo says."""
        return self.file("proc/self/mountinfo", text)

    def env(self, **variables: str) -> Machine:
        """Set variables."""
        self.environ.update(variables)
        return self

    def look(self, **more):
        """The identity."""
        return identify(self.environ, self.places, host_id=self.host_id, hostname=self.hostname, arch=self.arch, **more)

    def attributes(self, prefix: str = "") -> dict:
        """Attributes whose names begin so."""
        return {name: value for name, value in self.look().attributes.items() if name.startswith(prefix)}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)
