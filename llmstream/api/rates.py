"""Rates of callers as HTTP tells them: where a request comes from, and how much the caller has left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from llmstream.api.access import PRINCIPAL
from llmstream.config_security import Network, RateLimitSettings
from llmstream.scheduler.charges import CHARGED, REQUESTS
from llmstream.store.rate_limits import Verdict
from llmstream.types import CallerLimits, Metered, Principal

SITE_BITS = 64
"""Of an IPv6 address: what one customer has is counted together."""
HEADERS = (
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
    *("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    *("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
)

Address = IPv4Address | IPv6Address


def by_address(settings: RateLimitSettings) -> Middleware | None:
    """Gives each request the limits of the address it comes from; None where there are none."""
    limits = CallerLimits().over(settings.defaults) if settings.enabled else None
    if limits is None:
        return None
    proxies = settings.networks

    @web.middleware
    async def metered(request: web.Request, handler: Handler) -> web.StreamResponse:
        who = origin_of(request.remote, request.headers.getall("X-Forwarded-For", ()), proxies)
        request[PRINCIPAL] = Principal(metered=Metered(f"ip:{who}", limits))
        return await handler(request)

    return metered


def origin_of(peer: str | None, forwarded: Sequence[str], proxies: Sequence[Network]) -> str:
    """The address, or the network of a site, that a request counts for: its peer's, unless that is a trusted proxy, and
    then the last one that the proxies name and that is none of them."""
    hops = [hop for line in forwarded for hop in line.split(",")] if proxies else []
    found = _address(peer or "")
    while found is not None and hops and any(found in network for network in proxies):
        before = _address(hops.pop())
        if before is None:
            break
        found = before
    if found is None:
        return "unknown"
    return str(ip_network((found, SITE_BITS), strict=False) if isinstance(found, IPv6Address) else found)


def _address(text: str) -> Address | None:
    """An address as proxies write it, also with a port; None for anything else."""
    text = text.strip().strip('"')
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        found = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (isinstance(found, IPv6Address) and found.ipv4_mapped) or found


async def on_prepare(_request: web.Request, response: web.StreamResponse) -> None:
    """Adds how much the caller has left, where the request was charged."""
    verdicts = CHARGED.get()
    if not verdicts:
        return
    headers = response.headers
    for verdict in verdicts:
        headers[f"x-ratelimit-limit-{verdict.name}"] = str(verdict.size)
        headers[f"x-ratelimit-remaining-{verdict.name}"] = str(verdict.remaining)
        headers[f"x-ratelimit-reset-{verdict.name}"] = duration(verdict.reset_s)
    main = _main(verdicts)
    headers["X-RateLimit-Limit"] = str(main.size)
    headers["X-RateLimit-Remaining"] = str(main.remaining)
    headers["X-RateLimit-Reset"] = str(math.ceil(main.reset_s))


def _main(verdicts: Sequence[Verdict]) -> Verdict:
    """The one that refuses, else that of requests where they are limited."""
    refusing = next((verdict for verdict in verdicts if not verdict.allowed), None)
    return refusing or next((verdict for verdict in verdicts if verdict.name == REQUESTS), verdicts[0])


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers tell them: ``120ms``, ``1.5s``, ``6m0s``, ``1h2m3s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{rest}s"
