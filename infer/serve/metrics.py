"""Counts requests and times for Prometheus. Imports no torch."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms of a server. A request whose client disconnected has the status 499."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "serve_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.tokens = {
            kind: Counter(f"serve_{kind}_tokens", f"Tokens of requests: {kind}.", registry=registry)
            for kind in ("prompt", "completion")
        }
        self.first_token_seconds = Histogram(
            "serve_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=registry
        )
        self.token_seconds = Histogram(
            "serve_token_seconds", "Time between tokens.", buckets=_SECONDS, registry=registry
        )

    def text(self, counts: Mapping[str, int]) -> bytes:
        """Returns all samples, with the counts of an engine."""
        engine = CollectorRegistry()
        for name, value in counts.items():
            Gauge(f"serve_engine_{name}", f"Of the engine: {name}.", registry=engine).set(value)
        return generate_latest(self._registry) + generate_latest(engine)
