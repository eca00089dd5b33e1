"""Keys of the configuration are changed without a restart: workers are replaced, and nobody is refused meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp

from tests.chaos.workers import Workers
from tests.waiting import wait_until

OLD, NEW = "old-key-0123456789abcdef", "new-key-0123456789abcdef"


async def code_for(service: Workers, key: str) -> int:
    async with aiohttp.ClientSession(service.url) as http, http.get("/jobs", headers={"X-API-Key": key}) as response:
        return response.status


async def refused(service: Workers, said: str) -> None:
    """Asks for a reload and waits until the service has refused it, and said why."""
    service.process.send_signal(signal.SIGHUP)
    await wait_until(lambda: "nothing is restarted" in service.log and said in service.log)


async def test_sighup_takes_the_changed_keys_over(tmp_path: Path) -> None:
    """After SIGHUP the workers take the file's new key and refuse its old one; a file that is wrong changes nothing,
    and neither does one without keys where the address needs them."""
    config = tmp_path / "llmstream.yaml"
    config.write_text(f"server: {{host: 0.0.0.0}}\nkeys: {{alice: {{value: {OLD}}}}}\n")
    service = Workers(tmp_path / "data", 2, {})
    service.spawn = {"env": {**_environment(), "LLMSTREAM_CONFIG": str(config)}}
    try:
        await service.start()
        service.url = service.url.replace("0.0.0.0", "127.0.0.1")
        assert (await code_for(service, OLD), await code_for(service, NEW)) == (200, 401)
        both = f"keys: {{alice: {{value: {NEW}}}, old: {{value: {OLD}}}}}\n"
        config.write_text(f"server: {{host: 0.0.0.0}}\n{both}")
        service.process.send_signal(signal.SIGHUP)
        meanwhile: set[int] = set()

        async def taken() -> bool:
            meanwhile.add(await code_for(service, OLD))
            return {await code_for(service, NEW) for _ in range(8)} == {200}

        await wait_until(taken, timeout=40)
        assert meanwhile == {200}
        config.write_text("keys: {alice: {value: short}}\n")
        await refused(service, "keys.alice.value")
        config.write_text("server: {port: 0}\n")
        await refused(service, "without a key")
        assert await code_for(service, NEW) == 200
        config.write_text(f"keys: {{alice: {{value: {NEW}}}}}\n")
        service.process.send_signal(signal.SIGHUP)

        async def gone() -> bool:
            return set(await asyncio.gather(*(code_for(service, OLD) for _ in range(8)))) == {401}

        await wait_until(gone, timeout=40)
        assert await code_for(service, NEW) == 200
        assert not [key for key in (OLD, NEW) if key in service.log]
    finally:
        await service.close()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "LLMSTREAM" not in name and name != "REDIS_URL"}
