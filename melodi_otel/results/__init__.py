"""Joules in a variable: what a person or a program does with finished requests.

``measure`` (a block of the user's code as an activity) · ``store`` (the last finished requests) · ``table`` (rows, for
programs, terminals and notebooks) · ``terminal`` (the only file here that knows rich) · ``notebook`` (``%%joules``).
Knows ``attribution``; never a meter's library, an exporter or an engine.
"""

from __future__ import annotations

from melodi_otel.results.measure import Measurement
from melodi_otel.results.store import Store
from melodi_otel.results.table import Results

__all__ = ["Measurement", "Results", "Store"]
