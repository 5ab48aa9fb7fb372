"""Reads and checks the tokenizer files of a checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TextFilesError


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """What the files say: the model part alone, the control tokens, and the settings.

    ``plain_json`` is tokenizer.json without its added tokens. ``control`` maps each added token's
    text to its id; ``special`` holds the ids among them that decoded text leaves out.
    """

    plain_json: str
    vocab: dict[str, int]
    control: dict[str, int]
    special: frozenset[int]
    eos_token: str | None


def read_token_files(folder: Path) -> TokenFiles:
    """Read ``tokenizer.json`` and ``tokenizer_config.json``; raises ``TextFilesError``."""
    document = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise TextFilesError(f"{folder / 'tokenizer.json'}: only BPE tokenizers are supported")
    if not _is_byte_level(document.get("decoder")):
        raise TextFilesError(
            f"{folder / 'tokenizer.json'}: the decoder is not ByteLevel; only byte-level BPE "
            "tokenizers are supported"
        )
    added = list(document.get("added_tokens") or [])
    listed = {entry["content"] for entry in added}
    # Older checkpoints list control tokens only in tokenizer_config.json.
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        if entry["content"] not in listed:
            added.append({**entry, "id": int(number)})
    for entry in added:
        _check_added(entry, folder)
    plain = {**document, "added_tokens": []}
    return TokenFiles(
        plain_json=json.dumps(plain, ensure_ascii=False),
        vocab=model["vocab"],
        control={entry["content"]: entry["id"] for entry in added},
        special=frozenset(entry["id"] for entry in added if entry.get("special")),
        eos_token=token_text(settings.get("eos_token")),
    )


def token_text(entry: Any) -> str | None:
    """A token setting's text: files hold it plain or as an object with ``content``."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raises ``TextFilesError`` with the path and the place."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TextFilesError(f"{path} does not exist; a checkpoint folder must hold it") from None
    except (OSError, ValueError) as error:
        raise TextFilesError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise TextFilesError(f"{path} holds a {type(document).__name__}, not a JSON object")
    return document


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        return any(_is_byte_level(part) for part in decoder.get("decoders", ()))
    return decoder.get("type") == "ByteLevel"


def _check_added(entry: dict[str, Any], folder: Path) -> None:
    # Text is cut at control tokens by exact match; these flags would ask for something else. One
    # character cannot be told from itself as plain text.
    flags = [flag for flag in ("lstrip", "rstrip", "single_word", "normalized") if entry.get(flag)]
    if flags or len(entry["content"]) < 2:
        raise TextFilesError(
            f"{folder}: added token {entry['content']!r} has {', '.join(flags) or 'one character'};"
            " only tokens of two or more characters, matched exactly, are supported"
        )
