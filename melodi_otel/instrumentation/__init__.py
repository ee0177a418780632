"""When does work happen? One folder or file per engine, each owning its third-party import.

Knows ``attribution.meter`` (what may be said) and ``seam`` (to whom); never a meter, a ledger or an exporter.
"""
