"""Where the values of configured labels are found in this process.

``baggage`` and ``span`` are asked of OpenTelemetry's context, ``header`` and the ``user`` of a served request of what the
ASGI middleware left in it, ``resource`` of the resource, ``user`` and ``adapter`` also of the instrumentation that reports
the call. Only keys that ``MELODI_LABELS`` names are ever looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from opentelemetry import baggage, context, trace

from melodi_otel import semconv
from melodi_otel.attribution.books import Who
from melodi_otel.attribution.labels import Digest, Lookup, MetricLabels, Rule, clean, parse, resolve
from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.instrumentation.seam import INCOMING, AttributeValue, Incoming, incoming

USER_KEYS: Final = ("enduser.id", "user.id")
"""Attributes and baggage in which the conventions put the user."""


class Whose:
    """What the ``MELODI_LABEL*`` settings ask for.

    Args:
        config: the settings.

    Attributes:
        rules: the rules of ``MELODI_LABELS``.
        headers: names of the request headers that a rule asks for.
        body: whether a rule asks for the user, whom the body of a request may name.
        served: whether a rule asks for anything that a served request says.
        metric: the labels that metrics carry.

    Raises:
        ConfigError: a rule cannot be used, or a setting names a label that is not there.
    """

    def __init__(self, config: Config) -> None:
        self.rules: Final = parse(config.labels)
        names = [rule.name for rule in self.rules]
        listed = dict(config.label_values)
        _only("MELODI_METRIC_LABELS", ",".join(config.metric_labels), config.metric_labels, "MELODI_LABELS", names)
        said = ",".join(f"{name}={'|'.join(values)}" for name, values in listed.items())
        _only("MELODI_LABEL_VALUES", said, listed, "MELODI_METRIC_LABELS", config.metric_labels)
        sources = [source for rule in self.rules for source in rule.sources]
        self.headers: Final = tuple(dict.fromkeys(key for kind, key in sources if kind == "header"))
        self.body: Final = any(kind == "user" for kind, _ in sources)
        self.served: Final = any(kind in ("header", "user", "span") for kind, _ in sources)
        # A key without the switch is more likely a forgotten switch than a wish to show everybody.
        hashed = config.label_hash or config.label_hash_key is not None
        self._digest = Digest(config.label_hash_key) if hashed else None
        allowed = {name: [self._shown(value) for value in values] for name, values in listed.items()}
        self.metric: Final = MetricLabels(tuple(dict.fromkeys(config.metric_labels)), config.label_limit, allowed)

    def finder(self, resource: Mapping[str, object]) -> LabelFinder | None:
        """What finds the labels of a request, given the attributes of the resource; None where there are no rules."""
        return LabelFinder(self.rules, resource, self._digest) if self.rules else None

    def who(self, model: str | None, labels: Mapping[str, str]) -> Who:
        """For whom the joules of a request count in metrics, of whose labels as many are kept as the bound allows.

        Args:
            model: that it asked for.
            labels: its provider, service and configured labels.
        """
        return Who(
            model,
            labels.get(semconv.GEN_AI_PROVIDER),
            labels.get(semconv.SERVICE_NAME),
            labels.get(semconv.SERVICE_NAMESPACE),
            self.metric.clip(labels),
        )

    def _shown(self, value: str) -> str:
        value = clean(value)
        return value if self._digest is None else self._digest(value)


class LabelFinder:
    """Labels of a request that begins now, on the thread on which it begins.

    Args:
        rules: the rules of ``MELODI_LABELS``.
        resource: attributes of the resource.
        digest: replaces each value by a hash; None: values stay as they are.
    """

    def __init__(self, rules: Sequence[Rule], resource: Mapping[str, object], digest: Digest | None = None) -> None:
        self._rules = tuple(rules)
        self._resource = {name: _text(value) for name, value in resource.items()}
        self._digest = digest

    def __call__(
        self, attributes: Mapping[str, AttributeValue], user: str | None = None, adapter: str | None = None
    ) -> Mapping[str, str]:
        """Label values by label name; a label without a value is not there.

        Args:
            attributes: the first attributes of the request's span.
            user, adapter: as :class:`~melodi_otel.instrumentation.seam.Begin` has them.
        """
        served = _incoming()

        def of_span(key: str) -> str | None:
            spans = (attributes, *(_attributes(span) for span in (trace.get_current_span(), served and served.span)))
            return next((text for found in spans if (text := _text(found.get(key)))), None)

        def of_baggage(key: str) -> str | None:
            return _text(baggage.get_baggage(key))

        def of_user(_: str) -> str | None:
            said = user or (served.user() if served is not None and served.user is not None else None)
            return said or _first(of_span(key) for key in USER_KEYS) or _first(of_baggage(key) for key in USER_KEYS)

        found: dict[str, Lookup] = {
            "baggage": of_baggage,
            "header": lambda key: None if served is None else served.headers.get(key),
            "span": of_span,
            "resource": self._resource.get,
            "user": of_user,
            "adapter": lambda _: adapter,
        }
        return resolve(self._rules, found, digest=self._digest)


def _incoming() -> Incoming | None:
    """The request being served, or None."""
    found = context.get_value(INCOMING)
    return found if isinstance(found, Incoming) else incoming.get()


def _attributes(span: object) -> Mapping[str, Any]:
    """Attributes of a span that lets them be read; of another one, none."""
    found = getattr(span, "attributes", None)
    return found if isinstance(found, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]


def _text(value: object) -> str | None:
    """A value as one text; a list's items are joined as those of a repeated header are."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return ", ".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return str(value)


def _first(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value), None)


def _only(variable: str, raw: str, asked: Iterable[str], among: str, names: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise ConfigError(
            f"{variable}={raw!r} cannot be used: {', '.join(unknown)} is not in {among}; allowed is"
            f" {', '.join(sorted(names)) or f'nothing while {among} is empty'}"
        )
