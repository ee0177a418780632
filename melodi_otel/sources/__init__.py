"""What does the hardware say? Meters, one device family per file, each owning its third-party import.

Knows the devices and their traps; never imports timeline, attribution or telemetry. Add a meter: see ``base``.
"""
