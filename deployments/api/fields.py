"""Names a request may carry: known ones, harmless ones, and ones that are refused with a reason."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

# OpenAI fields that label, store or route a request and never change what is generated.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_retention",
        "prediction",
    }
)

_LATER = "structured output is not built yet"
_UNSAFE = "it is never taken from a request"
REFUSED = {
    "structured_outputs": _LATER,
    "guided_json": _LATER,
    "guided_regex": _LATER,
    "guided_choice": _LATER,
    "guided_grammar": _LATER,
    "grammar": _LATER,
    "chat_template": _UNSAFE,
    "kv_transfer_params": _UNSAFE,
    "prompt_embeds": _UNSAFE,
    "custom_logit_processor": _UNSAFE,
    "logits_processors": _UNSAFE,
    "audio": "the model reads and writes text only",
    "web_search_options": "this service makes no requests of its own",
    "functions": "send 'tools' instead",
    "function_call": "send 'tool_choice' instead",
    "use_beam_search": "beam search is not built",
    "suffix": "the model does not fill in the middle",
    "verbosity": "the model has no such setting",
}


class RequestModel(BaseModel):
    """Base of every request: strict types, frozen, no field is ignored in silence.

    A misspelt or unknown field would otherwise change the answer unnoticed, so it is refused with
    the nearest right name; a ``null`` means that the field was not sent.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        sent = {name: value for name, value in data.items() if value is not None}
        for name in sent:
            if name in known or name in HARMLESS:
                continue
            raise ValueError(_complaint(str(name), list(known)))
        return sent


def _complaint(name: str, known: list[str]) -> str:
    if name in REFUSED:
        return f"field {name!r} is refused: {REFUSED[name]}"
    near = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(known))}"
    return f"unknown field {name[:64]!r}; {hint}"
