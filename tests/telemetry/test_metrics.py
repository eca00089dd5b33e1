"""Counting, and what several processes' counts make together."""

from __future__ import annotations

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st

from llmstream.telemetry.exposition import exposition
from llmstream.telemetry.metrics import Counter, Gauge, Histogram, Metric
from llmstream.telemetry.snapshot import Family, Series, Snapshot, lasting, merged
from tests.scrape import Scrape

BOUNDS = (0.1, 1.0, 10.0)


def snapshot(*metrics: Metric) -> Snapshot:
    return [Family(metric.name, list(metric.read())) for metric in metrics]


def shown(found: Snapshot, *metrics: Metric) -> Scrape:
    return Scrape(exposition(found, {metric.name: metric for metric in metrics}, "")[0].decode())


@given(st.lists(st.one_of(st.floats(0, 100), st.sampled_from(BOUNDS))))
def test_buckets_hold_what_the_reference_holds(values: list[float]) -> None:
    """Our histogram shows the same samples as that of prometheus_client, values on a bound included."""
    ours = Histogram("h", "", ("model",), BOUNDS)
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("h", "", ("model",), buckets=BOUNDS, registry=registry)
    ours.of("m")
    theirs.labels("m")
    for value in values:
        ours.of("m").add(value)
        theirs.labels("m").observe(value)
    expected = Scrape(prometheus_client.generate_latest(registry).decode()).samples
    found = shown(snapshot(ours), ours).samples
    assert found == {key: value for key, value in expected.items() if key[0] != "h_created"}


@given(st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 20)), max_size=5), min_size=1, max_size=4))
def test_several_processes_count_like_one(processes: list[list[tuple[str, float]]]) -> None:
    """Counters and histograms of several processes, merged in any grouping, show what one would have counted."""
    one_counter, one_histogram = Counter("c_total", "", ("x",)), Histogram("h", "", ("x",), BOUNDS)
    known: dict[str, Metric] = {"c_total": one_counter, "h": one_histogram}
    snapshots = []
    for observed in processes:
        counter, histogram = Counter("c_total", "", ("x",)), Histogram("h", "", ("x",), BOUNDS)
        for label, value in observed:
            for each_counter, each_histogram in ((counter, histogram), (one_counter, one_histogram)):
                each_counter.add(label)
                each_histogram.of(label).add(value)
        snapshots.append(snapshot(counter, histogram))
    first, *others = snapshots
    together = merged([merged([first], known), merged(others, known)], known)
    found, expected = (
        shown(each, one_counter, one_histogram).samples for each in (together, snapshot(one_counter, one_histogram))
    )
    assert found.keys() == expected.keys()
    assert all(abs(found[key] - expected[key]) < 1e-6 for key in found)


def test_gauges_add_up_or_agree_and_end_with_their_process() -> None:
    """Running jobs add up, what all processes see in the store does not; of a process that ended no gauge remains."""
    running, waiting, usage = Gauge("r", ""), Gauge("w", "", (), "max"), Gauge("u", "", (), "mean")
    counter = Counter("c_total", "")
    known: dict[str, Metric] = {each.name: each for each in (running, waiting, usage, counter)}

    def process(*values: float) -> Snapshot:
        return [Family(name, [Series((), value)]) for name, value in zip(known, values, strict=True)]

    both = merged([process(1, 5, 0.5, 10), process(2, 5, 0.0, 7)], known)
    assert {family.name: family.series[0].value for family in both} == {"r": 3, "w": 5, "u": 0.25, "c_total": 17}
    assert [family.name for family in lasting(both, known)] == ["c_total"]


def test_a_metric_of_another_version_is_left_out() -> None:
    """During a rolling restart processes of two versions run: what one of them does not know is not shown."""
    counter = Counter("c_total", "")
    found = merged([[Family("other_total", [Series((), 1)])], snapshot(counter)], {"c_total": counter})
    assert [family.name for family in found] == ["c_total"]
