"""A melodi_otel that cannot be prepared: what its plug-in needs first cannot be imported."""

import sys

sys.modules["melodi_otel.program"] = None
