"""Where the values of configured labels are found in this process: baggage, span attributes, resource, user, adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry import baggage

from melodi_otel.attribution.labels import Rule, resolve
from melodi_otel.instrumentation.seam import AttributeValue


class LabelFinder:
    """Labels of a request that begins now, by its first span attributes.

    Args:
        rules: the rules of ``MELODI_LABELS``.
        resource: attributes of the resource.
        hashed: replace values by a hash.
    """

    def __init__(self, rules: Sequence[Rule], resource: Mapping[str, object], *, hashed: bool) -> None:
        self._rules = tuple(rules)
        self._resource = {name: str(value) for name, value in resource.items()}
        self._hashed = hashed

    def __call__(self, attributes: Mapping[str, AttributeValue]) -> Mapping[str, str]:
        """Label values by label name; a label without a value is not there."""
        found = {
            "baggage": {name: str(value) for name, value in baggage.get_all().items()},
            "span": {name: str(value) for name, value in attributes.items()},
            "resource": self._resource,
        }
        return resolve(self._rules, found, hashed=self._hashed)
