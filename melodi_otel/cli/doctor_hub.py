"""What ``melodi-otel doctor`` says of hubs: as data, and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from melodi_otel.hub.presence import Presence

_NAMES = {"agent": "the host's agent", "shared": "this user's shared hub", "named": "the hub of MELODI_HUB"}
_STATES = {
    "ok": "reachable",
    "absent": "absent",
    "stale": "stale",
    "permission_denied": "refused",
    "foreign_owner": "refused",
    "no_answer": "no answer",
}


def as_data(presence: Presence) -> dict[str, Any]:
    """JSON-able; ``used`` is the tier that a program started now would use, None where it would have a meter of its own."""
    return {
        "setting": presence.setting,
        "used": presence.used.tier if presence.used else None,
        "hubs": [
            {
                "tier": hub.tier,
                "socket": str(hub.socket),
                "state": hub.answer.state,
                "reason": hub.answer.reason,
                "fix": hub.answer.fix,
                "pid": (hub.answer.peer.pid or None) if hub.answer.peer else None,
                "uid": hub.answer.peer.uid if hub.answer.peer else None,
                "listener": hub.listener,
                "page": hub.page,
            }
            for hub in presence.hubs
        ],
        "publisher": {"held": presence.publishes, "pid": presence.publisher},
        "notes": list(presence.notes),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    for hub in report["hubs"]:
        of = f" ({hub['listener']})" if hub["listener"] else ""
        yield f"{_NAMES[hub['tier']]}, {hub['socket']}: {_STATES[hub['state']]}{of}"
        if hub["reason"] and hub["state"] != "absent":
            yield f"  {hub['reason']}"
        if hub["fix"]:
            yield f"  to repair: {hub['fix']}"
        if hub["page"]:
            yield f"  metrics page: {hub['page']}"
    publisher = report["publisher"]
    if publisher["held"]:
        yield f"the machine's own energy (hw.*) is published by {_process(publisher['pid'])}"
    elif publisher["held"] is False:
        yield "the machine's own energy (hw.*) is published by nobody now; the first meter that runs does"
    yield from report["notes"]


def _process(pid: int | None) -> str:
    return f"process {pid}" if pid else "a process that cannot be seen from here"
