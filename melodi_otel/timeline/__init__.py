"""Joules over time, per device: repair of counters, gauges made into joules, interpolation with its error bound.

Pure: standard library and numpy. Knows nothing about requests.
"""
