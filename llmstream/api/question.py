"""``/question``: a text in, a text out."""

from __future__ import annotations

from aiohttp import web

from llmstream.api.access import needs
from llmstream.api.asking import ask, chat, default_model
from llmstream.api.body import read_json, validate
from llmstream.api.keys import GATEWAY
from llmstream.api.native_schemas import QuestionBody
from llmstream.api.whole import failed, read_whole
from llmstream.errors import BadRequest

routes = web.RouteTableDef()


@routes.post("/question")
@needs("generate")
async def question(request: web.Request) -> web.Response:
    """Answers one question as the section ``question`` of the settings says."""
    gateway = request.app[GATEWAY]
    settings = gateway.settings.question
    body, _ = await read_json(request)
    schema = validate(QuestionBody, body)
    if (size := len(schema.text)) > settings.max_chars:
        raise BadRequest(
            f"text has {size} characters, and {settings.max_chars} are allowed (question.max_chars); shorten it.",
            param="text",
            code="prompt_too_long",
        )
    system = [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
    members = {
        **schema.further(),
        "messages": [*system, {"role": "user", "content": schema.text}],
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
    }
    asked = chat(default_model(request), members, schema.provider)
    started = await ask(
        request,
        asked,
        schema,
        body,
        on_disconnect=gateway.settings.disconnect.streams,
        deadline_s=settings.timeout_s,
        cacheable=gateway.settings.cache.covers_all,
    )
    with started.follower:
        transcript = await read_whole(request, started.follower)
    return failed(transcript, started.headers) or web.json_response({"text": transcript.text}, headers=started.headers)
