"""Runs llmstream inside your own program and asks it with the official OpenAI client.

pip install 'llmstream[local]'
python examples/embed.py
"""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

import llmstream


async def main() -> None:
    async with llmstream.Server(llmstream.load(flags={"server.port": 0})) as server:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused")
        stream = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Name three primary colours."}],
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main())
