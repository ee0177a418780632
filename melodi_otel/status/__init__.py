"""What the meter shows now: one record for the status page, ``melodi-otel top`` and programs.

``record`` is what ``/status.json`` holds, ``models`` counts what finished requests used, ``report`` makes a record from the views
that the composition root hands it.
"""

from __future__ import annotations

from melodi_otel.status.models import ModelTotals
from melodi_otel.status.record import HubStatus, Mode, ModelStatus, Status
from melodi_otel.status.report import OpenRequest, Reporter, StatusViews, not_ready

__all__ = [
    "HubStatus",
    "Mode",
    "ModelStatus",
    "ModelTotals",
    "OpenRequest",
    "Reporter",
    "Status",
    "StatusViews",
    "not_ready",
]
