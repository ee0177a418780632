"""Starting a shared hub: a process of its own that outlives whoever asked for it.

It is nobody's child: a short-lived process in between starts it in a session of its own and ends, so the program that asked
never sees an unknown child end, and a signal to its process group does not reach the hub.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from melodi_otel.config import GROUP_VARIABLE, SERVER_VARIABLE, VLLM_ENGINE_VARIABLE
from melodi_otel.hub.client import HubLost

log = logging.getLogger("melodi_otel")

START_S: Final = 15.0
"""How long a program waits for a hub that it started. Importing on a busy machine takes seconds; nobody waits meanwhile."""
SERVICE: Final = "melodi-otel-hub"

_BETWEEN: Final = (
    "import os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_SETMASK, [])\n"  # whatever the thread that asked had blocked
    "if os.fork() == 0:\n    os.setsid()\n    os.execv(sys.argv[1], sys.argv[1:])\nos._exit(0)\n"
)
_PACKAGE: Final = Path(__file__).resolve().parents[1]
_STARTUP: Final = _PACKAGE / "cli" / "startup"
"""What ``melodi-otel run`` puts on the path."""
_PRIVATE: Final = frozenset(
    {
        GROUP_VARIABLE,
        SERVER_VARIABLE,
        VLLM_ENGINE_VARIABLE,
        # It meters the host, not what one program may see of it.
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "GPU_DEVICE_ORDINAL",
        "MELODI_ENGINE_DEVICES",
        "MELODI_RECORD",
        "MELODI_HUB",
        "MELODI_CONSOLE",
        "NOTIFY_SOCKET",
    }
)


def start(path: Path, environ: Mapping[str, str]) -> None:
    """Start a shared hub at ``path``; returns before it listens. Where two programs do so at once, one hub stays.

    Raises:
        HubLost: no Python can be started from here.
    """
    python = sys.executable
    if not python or "python" not in Path(python).name.lower():
        raise HubLost(f"this program's executable {python!r} is no Python that could run a hub")
    command = [python, "-c", _BETWEEN, python, "-m", "melodi_otel.runtime", "hub", str(path)]
    try:
        done = subprocess.run(
            [command[0], "-I", "-S", *command[1:]],
            env=_environment(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=START_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HubLost(f"a shared hub cannot be started: {error}") from None
    if done.returncode != 0:
        raise HubLost(f"a shared hub cannot be started: {python} ended with {done.returncode}")


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    found = {name: value for name, value in environ.items() if name not in _PRIVATE}
    package = str(_PACKAGE.parent)
    paths = [part for part in found.get("PYTHONPATH", "").split(os.pathsep) if part]
    # The hub is not to be instrumented as the program is, and must find this package where the program found it.
    paths = [part for part in paths if Path(part).name != "auto_instrumentation" and Path(part) != _STARTUP]
    if Path(package).name not in ("site-packages", "dist-packages"):
        paths.insert(0, package)
    if paths:
        found["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        found.pop("PYTHONPATH", None)
    found["OTEL_SERVICE_NAME"] = SERVICE
    return found
