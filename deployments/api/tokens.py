"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from functools import partial

from starlette.responses import Response

from ...workers.types import RequestError
from ..config import AUTO_MODEL
from ..routing.directory import ServedModel
from .chat import read_conversation, route_conversation
from .endpoint import Call
from .errors import json_response
from .protocol import DetokenizeRequest, TokenizeRequest
from .validation import check_prompt_ids


async def tokenize(call: Call[TokenizeRequest]) -> Response:
    """Token ids of a text, or of messages as the model would be given them."""
    body = call.body
    model = _model(call)
    if body.messages is not None:
        ids = await _rendered(call, model)
    else:
        ids = await model.text.encode(body.prompt or "")
    answer = {
        "count": len(ids),
        "max_model_len": model.max_model_len,
        "tokens": ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        decode = model.text.tokenizer.decode
        answer["token_strs"] = [decode([i], skip_special=False) for i in ids]
    return json_response(answer)


async def detokenize(call: Call[DetokenizeRequest]) -> Response:
    """The text of token ids, control tokens included."""
    body, model = call.body, _model(call)
    if body.tokens:
        check_prompt_ids(body.tokens, model.num_tokens, "tokens")
    decode = partial(model.text.tokenizer.decode, body.tokens, skip_special=False)
    return json_response({"prompt": await call.service.off_loop.run(decode, len(body.tokens))})


async def _rendered(call: Call[TokenizeRequest], model: ServedModel) -> list[int]:
    body, service = call.body, call.service
    conversation = await read_conversation(service, body.messages or [], body.tools, call.size)
    (route,) = route_conversation(service, [model], body, conversation)
    return await model.text.render(
        conversation.messages,
        body.tools,
        enable_thinking=route.enable_thinking,
        add_generation_prompt=body.add_generation_prompt,
        size=call.size,
    )


def _model(call: Call[TokenizeRequest] | Call[DetokenizeRequest]) -> ServedModel:
    candidates = call.service.directory.candidates(call.body.model)
    if len(candidates) > 1:
        raise RequestError(
            f"{AUTO_MODEL!r} is no model of its own; name one of: "
            f"{', '.join(model.name for model in candidates)}",
            param="model",
        )
    return candidates[0]
