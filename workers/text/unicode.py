"""Which text is taken at all."""

from __future__ import annotations

from ..types import RequestError


def refuse_surrogates(text: str, param: str) -> None:
    """Raise ``RequestError`` where ``text`` holds a lone surrogate, which UTF-8 cannot spell.

    JSON's ``\\ud800`` escape can bring one in. NUL and every other character are taken.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; text must be valid Unicode",
            param=param,
        ) from None
