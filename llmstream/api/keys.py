"""What handlers find in the application, typed."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from llmstream.gateway import Gateway

GATEWAY = web.AppKey("gateway", Gateway)
STREAMS = web.AppKey[set[asyncio.Task[Any]]]("streams")
"""Handlers that hold a stream open; a shutdown ends them so that their clients reconnect elsewhere."""
PING_S = web.AppKey("ping_s", float)
