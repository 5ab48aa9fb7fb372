"""Where the files of a model are: embedded, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "embedded" / "checkpoint"

# Weights other than safetensors are never fetched: they would have to be unpickled.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelSourceError(ValueError):
    """A model name that leads to no checkpoint; the message says what would."""


def resolve_model(name: str) -> Path:
    """The folder with the checkpoint that ``name`` stands for.

    ``name`` is ``embedded``, a folder, or a hub name such as ``Qwen/Qwen3-0.6B`` (taken from the
    local hub cache, else downloaded: safetensors and JSON only).
    Raises ``ModelSourceError``.
    """
    if name == EMBEDDED:
        return _require_checkpoint(EMBEDDED_FOLDER, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _require_checkpoint(folder.resolve(), name)
    if folder.exists():
        raise ModelSourceError(f"{name!r} is a file; a model is the folder with its config.json")
    if not _HUB_NAME.fullmatch(name):
        raise ModelSourceError(
            f"there is no folder {name!r}; a model is 'embedded', a checkpoint folder, "
            "or a hub name like 'Qwen/Qwen3-0.6B'"
        )
    return _from_hub(name)


def _require_checkpoint(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"model {name!r}: {folder} holds no config.json")
    return folder


def _from_hub(name: str) -> Path:
    # Imported here: a server on a local folder never needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = list(HUB_FILES)
    try:
        cached: Path | None = Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        cached = None
    if cached is not None and _is_complete(cached):
        return cached
    try:
        return _require_checkpoint(Path(snapshot_download(name, allow_patterns=patterns)), name)
    except RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"the hub has no public model {name!r} (a private one needs HF_TOKEN)"
        ) from error
    except OSError as error:
        raise ModelSourceError(
            f"model {name!r} is not in the local cache and cannot be fetched from the hub "
            f"({type(error).__name__}): copy the checkpoint here and pass its folder, "
            "or use 'embedded'"
        ) from error


def _is_complete(snapshot: Path) -> bool:
    """Whether an earlier download brought every file; a broken one left the folder in part."""
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
    else:
        shards = {"model.safetensors"}
    wanted = {"config.json", "tokenizer.json", *shards}
    return all((snapshot / file).is_file() for file in wanted)
