"""One meter for many processes: the wire, the server of the hub, the client in each program, and how a hub is found.

A hub is a process that holds the meters and the books; programs tell it over a Unix socket who is at work, and get joules
back. Which hub a program uses, and what happens when it dies, is :mod:`melodi_otel.hub.choice` and
:mod:`melodi_otel.hub.moving`.
"""

from __future__ import annotations
