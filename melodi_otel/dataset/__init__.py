"""MELODI's data set: what was published of it, read with care, and what the paper says about it, reckoned again.

Knows nothing of meters and servers. A new source of rows is a file of its own that yields :class:`~.published.Row`.
"""
