"""Snapshots as Prometheus text or OpenMetrics, whichever the scraper asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as PrometheusFamily
from prometheus_client.registry import Collector

from llmstream.telemetry.metrics import Histogram, Metric
from llmstream.telemetry.snapshot import Family, Series, Snapshot


def exposition(snapshot: Snapshot, metrics: Mapping[str, Metric], accept: str) -> tuple[bytes, str]:
    """The text and its content type."""
    values = _Values(snapshot, metrics)
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it does not expect versions that are none
        encode, content_type = choose_encoder("")
    return encode(values), content_type


class _Values(Collector):
    def __init__(self, snapshot: Snapshot, metrics: Mapping[str, Metric]) -> None:
        self._snapshot = snapshot
        self._metrics = metrics

    def collect(self) -> Iterable[PrometheusFamily]:
        return (_family(self._metrics[family.name], family) for family in self._snapshot)


def _family(metric: Metric, family: Family) -> PrometheusFamily:
    if isinstance(metric, Histogram):
        histogram = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for series in family.series:
            histogram.add_metric(series.labels, list(_cumulated(metric.bounds, series)), series.value)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    found = kind(metric.name, metric.meaning, labels=metric.labels)
    for series in family.series:
        found.add_metric(series.labels, series.value)
    return found


def _cumulated(bounds: tuple[float, ...], series: Series) -> Iterator[tuple[str, float]]:
    total = 0
    for bound, count in zip((*bounds, float("inf")), series.counts or (), strict=True):
        total += count
        yield ("+Inf" if bound == float("inf") else repr(bound)), total
