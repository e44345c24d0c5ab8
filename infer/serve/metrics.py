"""Counts requests and times, and writes them in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of values up to each of some limits."""

    def __init__(self, limits: Sequence[float] = _SECONDS) -> None:
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yields the samples of the histogram."""
        total = 0
        for limit, count in zip((*map(str, self._limits), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{limit}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters and histograms of a server."""

    def __init__(self) -> None:
        self.requests = Counter[tuple[str, int]]()  # by endpoint and HTTP status; 499: the client disconnected
        self.tokens = Counter[str]()
        self.first_token_seconds = Histogram()
        self.token_seconds = Histogram()

    def text(self, counts: Mapping[str, int]) -> str:
        """Returns all samples."""
        lines: list[str] = []

        def write(name: str, kind: str, about: str, samples: Iterator[str] | Sequence[str]) -> None:
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples))

        requests = [
            f'serve_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
            for (endpoint, status), count in sorted(self.requests.items())
        ]
        write("serve_requests_total", "counter", "Requests by endpoint and HTTP status.", requests)
        for name in ("prompt", "completion"):
            sample = f"serve_{name}_tokens_total {self.tokens[name]}"
            write(f"serve_{name}_tokens_total", "counter", f"Tokens of requests: {name}.", [sample])
        for short, value in counts.items():
            write(f"serve_engine_{short}", "gauge", f"Of the engine: {short}.", [f"serve_engine_{short} {value}"])
        for name, about, histogram in (
            ("serve_first_token_seconds", "Time to the first token.", self.first_token_seconds),
            ("serve_token_seconds", "Time between tokens.", self.token_seconds),
        ):
            write(name, "histogram", about, histogram.lines(name))
        return "\n".join(lines) + "\n"
