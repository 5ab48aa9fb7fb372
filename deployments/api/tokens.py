"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from functools import partial

from starlette.responses import Response

from .endpoint import Call
from .errors import json_response
from .protocol import DetokenizeRequest, TokenizeRequest
from .thinking import template_switch
from .validation import check_model_name, check_prompt_ids


async def tokenize(call: Call[TokenizeRequest]) -> Response:
    """Token ids of a text, or of messages as the model would be given them."""
    body, text = call.body, call.service.text
    check_model_name(body.model, call.service.model_name)
    if body.messages is not None:
        switch = template_switch(body.chat_template_kwargs)
        ids = await text.render(
            body.messages,
            body.tools,
            enable_thinking=body.enable_thinking if switch is None else switch,
            add_generation_prompt=body.add_generation_prompt,
            size=call.size,
        )
    else:
        ids = await text.encode(body.prompt or "")
    answer = {
        "count": len(ids),
        "max_model_len": call.service.facts.max_model_len,
        "tokens": ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [text.tokenizer.decode([i], skip_special=False) for i in ids]
    return json_response(answer)


async def detokenize(call: Call[DetokenizeRequest]) -> Response:
    """The text of token ids, control tokens included."""
    body, text = call.body, call.service.text
    check_model_name(body.model, call.service.model_name)
    if body.tokens:
        check_prompt_ids(body.tokens, call.service.facts.num_tokens, "tokens")
    decode = partial(text.tokenizer.decode, body.tokens, skip_special=False)
    return json_response({"prompt": await text.off_loop(decode, len(body.tokens))})
