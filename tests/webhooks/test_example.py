"""The example receiver does what it says."""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from llmstream.config_webhooks import split_secrets
from llmstream.webhooks.event import render
from llmstream.webhooks.signing import signed_headers
from tests.webhooks.receiver import SECRET
from tests.webhooks.test_signing import STATE, TRANSCRIPT

EXAMPLE = Path(__file__).parents[2] / "examples" / "webhook_receiver.py"


async def test_the_example_receiver(capsys: pytest.CaptureFixture[str]) -> None:
    """It takes a signed event once, also when it comes twice, and none that is not signed."""
    body = render(STATE, TRANSCRIPT, 100)
    headers = signed_headers(split_secrets(SECRET), "evt_1", int(time.time()), body)
    async with TestClient(TestServer(runpy.run_path(str(EXAMPLE))["make_app"](SECRET))) as client:
        for _ in range(2):
            assert (await client.post("/hook", data=body, headers=headers)).status == 204
        assert (await client.post("/hook", data=body + b" ", headers=headers)).status == 401
        assert (await client.post("/hook", data=body)).status == 401
    assert capsys.readouterr().out == "response.completed j1 héllo\n"
