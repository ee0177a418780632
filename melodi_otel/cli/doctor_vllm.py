"""What ``melodi-otel doctor`` says of vLLM: whether a server started here loads our plug-in, and what keeps it from that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Final

GROUP: Final = "vllm.general_plugins"
NAME: Final = "melodi_otel"
ALLOWED: Final = "VLLM_PLUGINS"
"""vLLM's own list of the plug-ins that it may load, comma-separated; unset: all."""


def as_data(
    version: str | None, environ: Mapping[str, str], plugged: Callable[[], bool] | None = None
) -> dict[str, Any] | None:
    """JSON-able; None where vLLM is not installed.

    Args:
        version: of vLLM, or None.
        environ: where vLLM looks for the plug-ins that it may load.
        plugged: whether our entry point is installed; None: look.
    """
    if version is None:
        return None
    reason = fix = None
    if not (plugged or installed)():
        reason = f"melodi_otel has no entry point {GROUP} in this environment: it is on the path, but not installed"
        fix = 'pip install "melodi-otel[vllm]"'
    elif ALLOWED in environ and NAME not in (allowed := environ[ALLOWED].split(",")):
        reason = f"{ALLOWED}={environ[ALLOWED]} lets vLLM load nothing else"
        fix = f"{ALLOWED}={','.join([*filter(None, allowed), NAME])}"
    elif environ.get("MELODI_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        reason = f"MELODI_DISABLED={environ['MELODI_DISABLED']}"
        fix = "unset MELODI_DISABLED"
    return {"version": version, "metered": reason is None, "reason": reason, "fix": fix}


def installed() -> bool:
    """Whether vLLM would find our plug-in in this environment."""
    return any(point.name == NAME for point in entry_points(group=GROUP))


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    if report["metered"]:
        yield f"vLLM {report['version']}: a server or script started here is metered, with no flag and no code"
        return
    yield f"vLLM {report['version']}: not metered: {report['reason']}"
    yield f"  to repair: {report['fix']}"
