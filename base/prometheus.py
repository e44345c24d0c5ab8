"""Writes numbers by name as gauges in the text format of Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily


class Gauges:
    """A collector with a gauge for each number of `values`, which the owner may replace at any time."""

    def __init__(self, prefix: str, about: str, values: Mapping[str, float], labels: Mapping[str, str]) -> None:
        self.values = values
        self._prefix = prefix
        self._about = about
        self._labels = labels

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields the gauges, as a registry asks for them. Other characters than letters and digits become `_`."""
        for name, value in self.values.items():
            plain = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
            gauge = GaugeMetricFamily(f"{self._prefix}_{plain}", f"{self._about}: {name}.", labels=[*self._labels])
            gauge.add_metric([*self._labels.values()], value)
            yield gauge
