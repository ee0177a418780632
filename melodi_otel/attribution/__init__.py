"""Whose joules? Requests, engine steps and intervals in; shares and named buckets out; the books balance.

Pure: standard library and numpy. Start at ``meter`` (the interface), then ``settle`` (one interval), then ``ledger``.
"""
