from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import melodi_otel

ROOT = Path(melodi_otel.__file__).parent.parent


@pytest.fixture
def place():
    """A directory with a short name that every user may enter: pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="hub", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def program():
    """Runs Python in a process of its own; what it printed, or the running process with ``wait=False``."""
    running = []

    def run(code, *words, wait=True):
        command = [sys.executable, "-c", code, *map(str, words)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        running.append(process)
        if not wait:
            return process
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return out

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()
