"""Who pays idle power while requests run."""

from __future__ import annotations

from melodi_otel.config import StaticPolicy

__all__ = ["StaticPolicy", "shared_static"]


def shared_static(policy: StaticPolicy, static_joules: float) -> float:
    """The idle joules of an interval that running requests divide; the rest is idle.

    ``busy_shared``: at each instant idle power is divided by the requests scheduled then (the Shapley value of "somebody needs
    the machine on"); ``dynamic``: requests pay what they add, idle power goes to the idle bucket.
    """
    return static_joules if policy == "busy_shared" else 0.0
