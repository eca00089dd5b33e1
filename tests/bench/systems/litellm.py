"""LiteLLM's proxy with one worker."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running
from tests.bench.processes import running, serves_chat, until_ready
from tests.bench.systems.base import python_environment, run

REQUIREMENT = "litellm[proxy]==1.106.*"


class LiteLLM:
    name = "litellm"

    async def prepare(self, bench: Bench) -> str:
        programs = await python_environment(bench.cache, self.name, REQUIREMENT)
        return await run(programs / "python", "-c", "from importlib.metadata import version; print(version('litellm'))")

    @asynccontextmanager
    async def serve(self, bench: Bench) -> AsyncIterator[Running]:
        programs = await python_environment(bench.cache, self.name, REQUIREMENT)
        folder, port = bench.new_folder(self.name), bench.port()
        config, log = folder / "config.json", folder / "log.txt"
        target = {"model": "openai/*", "api_base": f"http://127.0.0.1:{bench.upstream_port}/v1", "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": "*", "litellm_params": target}]}))
        key = f"sk-{secrets.token_hex(24)}"  # it does not start without one
        env = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        words = ("--config", config, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
        headers = {"Authorization": f"Bearer {key}"}
        command = (programs / "litellm", *words, "--telemetry", "False")
        async with running(command, core=bench.cores.server, log=log, env=env, cwd=folder) as process:
            await until_ready(process, log, lambda: serves_chat(port, headers), timeout_s=120)
            yield Running(self.name, port, process.pid, headers)
