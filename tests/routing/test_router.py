"""Which targets a name leads to, and in which order they are asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any

import pytest

from llmstream.config import ProviderSettings, RouteSettings
from llmstream.errors import BadRequest, ModelNotFound
from llmstream.providers.openai import OpenAIProvider
from llmstream.routing.load import STALE_S, Load
from llmstream.routing.router import Router
from llmstream.routing.targets import Route, Target
from llmstream.types import GenerateRequest
from tests.replica import MODEL, echo

A, B, C = (
    OpenAIProvider(name, ProviderSettings(base_url="http://x/v1", models=models), slots=1)
    for name, models in (("a", ["m", "gpt-plain"]), ("b", ["m", "gpt-4o"]), ("c", ["*"]))
)


def routes(**given: Mapping[str, Any]) -> dict[str, RouteSettings]:
    return {name.replace("_", "-"): RouteSettings.model_validate(settings) for name, settings in given.items()}


def request(model: str, provider: str | None = None) -> GenerateRequest:
    return GenerateRequest.of(kind="chat", model=model, body={"model": model}, provider=provider)


def names(router: Router, model: str, provider: str | None = None) -> list[str]:
    route = router.route(request(model, provider))
    return [target.name for target in router.order(route)]


TWO = [{"provider": "a"}, {"provider": "b", "model": "other"}]


@pytest.mark.parametrize(
    ("model", "provider", "expected"),
    [
        ("smart", None, ["a/smart", "b/other"]),  # a route
        ("m", None, ["a/m"]),  # the first provider that lists it
        ("m", "b", ["b/m"]),
        ("smart", "b", ["b/other"]),  # the route's target at that provider
        ("gpt-4o", None, ["b/gpt-4o"]),  # an exact name goes before a pattern
        ("gpt-5-mini", None, ["b/*"]),  # the longer pattern
        ("gpt-4", None, ["a/*"]),
        ("gpt-4", "c", ["c/*"]),  # not in the route, but c serves any name
        ("else", None, ["c/*"]),
    ],
)
def test_where_a_name_leads(model: str, provider: str | None, expected: list[str]) -> None:
    """Routes go before listed models, exact names before patterns, longer patterns before shorter ones."""
    patterns = {
        "gpt-*": RouteSettings.model_validate({"targets": [{"provider": "a"}]}),
        "gpt-5-*": RouteSettings.model_validate({"targets": [{"provider": "b"}]}),
    }
    router = Router([A, B, C], {**routes(smart={"targets": TWO}), **patterns})
    assert names(router, model, provider) == expected


def test_a_target_gets_its_own_name_for_the_model() -> None:
    """The upstream is asked for its own model; through a pattern it is asked for what the client said."""
    router = Router([A, B], {**routes(smart={"targets": TWO}), "x-*": routes(x={"targets": TWO})["x"]})
    asked = request("smart")
    assert [target.asked(asked).model for target in router.route(asked).targets] == ["smart", "other"]
    wild = request("x-1")
    assert [target.asked(wild).model for target in router.route(wild).targets] == ["x-1", "other"]


def test_unknown_names() -> None:
    """An unknown model is answered with what there is, an unknown provider with those there are."""
    router = Router([A, B], routes(smart={"targets": TWO}))
    with pytest.raises(ModelNotFound, match=r"Did you mean 'smart'\? Available: gpt-4o, gpt-plain, m, smart\."):
        router.route(request("smrt"))
    with pytest.raises(ModelNotFound, match=r"Available: gpt-plain, m, smart\."):
        router.route(request("gpt-4o", "a"))
    with pytest.raises(BadRequest, match=r"Available: a, b\."):
        router.route(request("m", "d"))


def test_models_that_can_be_asked_for() -> None:
    """Routes and listed models, each name once, no patterns."""
    router = Router([A, B, C], {**routes(smart={"targets": TWO}), "gpt-*": routes(x={"targets": TWO})["x"]})
    assert sorted(model.name for model in router.models) == ["gpt-4o", "gpt-plain", "m", "smart"]


def test_pools() -> None:
    """A route belongs to any replica, one that only a local model answers to those that loaded it."""
    local = echo()
    mixed = {"targets": [{"provider": MODEL}, {"provider": "a"}]}
    router = Router([local, A], routes(alias={"targets": [{"provider": MODEL}]}, mixed=mixed))
    assert router.route(request("alias")).pool == MODEL
    assert router.route(request("mixed")).pool == "remote"
    assert [target.name for target in router.route(request("mixed")).targets] == [f"{MODEL}/{MODEL}", "a/mixed"]
    assert set(Router([local], routes(alias={"targets": [{"provider": MODEL}]})).pools) == {MODEL}


def test_those_that_failed_come_last() -> None:
    """A target that failed the job is asked again only when no other is left."""
    router = Router([A, B], routes(smart={"targets": TWO}))
    route = router.route(request("smart"))
    assert [target.name for target in router.order(route, {"a/smart"})] == ["b/other", "a/smart"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ordered(strategy: str, load: Load | None = None, **targets: Mapping[str, Any]) -> list[str]:
    from llmstream.routing.strategies import arrange

    made = [Target(A, name, **settings) for name, settings in targets.items()]
    route = Route("r", tuple(made), strategy)  # type: ignore[arg-type]
    found = arrange(route.targets, route.strategy, load or Load(Clock()), lambda: 0.5)
    return [str(target.model) for target in found]


def test_cheapest() -> None:
    """The lowest price first, no price last."""
    assert ordered("cheapest", x={}, y={"price": 2.0}, z={"price": 1.0}) == ["z", "y", "x"]


def test_least_busy() -> None:
    """The fewest answers at once for its weight, in the configured order where they are even."""
    load = Load(Clock())
    load.began("a/x")
    assert ordered("least_busy", load, x={}, y={}, z={}) == ["y", "z", "x"]
    for name in ("a/y", "a/z", "a/z"):
        load.began(name)
    assert ordered("least_busy", load, x={}, y={"weight": 3}, z={"weight": 4}) == ["y", "z", "x"]
    for name in ("a/x", "a/y", "a/z", "a/z"):
        load.ended(name)
    assert ordered("least_busy", load, x={}, y={}) == ["x", "y"]


def test_fastest() -> None:
    """The shortest time to the first token lately; what is not known, or not any more, is tried first."""
    clock = Clock()
    load = Load(clock)
    load.measured("a/x", 0.5)
    load.measured("a/y", 0.2)
    assert ordered("fastest", load, x={}, y={}, z={}) == ["z", "y", "x"]
    load.measured("a/y", 2.0)
    assert ordered("fastest", load, x={}, y={}) == ["x", "y"]
    clock.now += STALE_S
    load.measured("a/x", 0.5)
    assert ordered("fastest", load, x={}, y={}) == ["y", "x"]


def test_weighted() -> None:
    """Each target is asked first as often as its weight says, and the rest follow by their weights."""
    chance = Random(1).random
    settings = {"targets": [{"provider": "a", "weight": 6}, {"provider": "b", "weight": 3}, {"provider": "c"}]}
    router = Router([A, B, C], routes(r={**settings, "strategy": "weighted"}), chance=chance)
    route = router.route(request("r"))
    orders = [[target.provider.name for target in router.order(route)] for _ in range(10_000)]
    first = Counter(order[0] for order in orders)
    assert first["a"] == pytest.approx(6000, abs=200)
    assert first["b"] == pytest.approx(3000, abs=200)
    second = Counter(order[1] for order in orders if order[0] == "a")
    assert second["b"] / second.total() == pytest.approx(0.75, abs=0.03)
