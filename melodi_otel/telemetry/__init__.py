"""How does the world see it? Spans that wait for their joules, metrics, the scrape endpoint, and the seams to providers.

The only room besides ``instrumentation`` that imports OpenTelemetry, and the only one that imports prometheus_client.
"""
