"""The Grafana dashboard asks for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from llmstream.telemetry.metrics import Metrics

DEPLOY = Path(__file__).parent.parent / "examples" / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
METRICS = list(Metrics())
SAMPLES = {sample: metric for metric in METRICS for sample in metric.samples}
SELECTOR = re.compile(r"([a-z][a-z0-9_:]*)\{([^}]*)\}")
GROUPS = re.compile(r"by \(([^)]*)\)")
ADDED = {"job", "instance"}
"""Labels that Prometheus itself adds."""


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_every_query_names_metrics_and_labels_that_exist() -> None:
    """Each query selects samples that are exposed, by labels that they have."""
    assert len(queries()) > 20
    for query in queries():
        found = SELECTOR.findall(query)
        assert found, query
        known = {*ADDED, "le"}
        for name, selector in found:
            assert name in SAMPLES, f"{name} in {query}"
            labels = {*SAMPLES[name].labels, *ADDED}
            assert set(re.findall(r"(\w+)=", selector)) <= labels, query
            known |= labels
        for group in GROUPS.findall(query):
            assert {label.strip() for label in group.split(",")} <= known, query
        # Counters are only looked at as rates, gauges never.
        for name, _ in found:
            assert (f"rate({name}{{" in query) == (SAMPLES[name].kind != "gauge"), query


def test_every_metric_is_on_the_dashboard() -> None:
    """Nothing is counted that nobody looks at."""
    shown = {SAMPLES[name].name for query in queries() for name, _ in SELECTOR.findall(query)}
    assert shown == {metric.name for metric in METRICS}


def test_panels_are_whole() -> None:
    """Each panel has an id, a title and a place of its own that fits the grid."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert panel["title"]
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_legends_name_labels_that_the_query_keeps() -> None:
    """A legend's ``{{label}}`` is one that its query groups by."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            kept = {label.strip() for group in GROUPS.findall(target["expr"]) for label in group.split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target


def test_the_scrape_configuration_is_yaml_with_a_target() -> None:
    """The example configuration of Prometheus points to the default port."""
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
