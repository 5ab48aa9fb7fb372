"""A Serve application file with the command line's wishes put in."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..workers.model_source import EMBEDDED, resolve_model
from .config import ServiceConfig, load_config

DEFAULT_FILE = Path(__file__).resolve().parent.parent / "cluster_configs" / "local.yaml"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a command line says; ``None`` keeps the file's value."""

    model: str | None = None
    host: str | None = None
    port: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    attention: str | None = None
    served_model_name: str | None = None


@dataclass(frozen=True, slots=True)
class Application:
    """A checked Serve configuration document, ready to deploy."""

    document: dict[str, Any]
    config: ServiceConfig

    @property
    def host(self) -> str:
        return str(self.document["http_options"]["host"])

    @property
    def port(self) -> int:
        return int(self.document["http_options"]["port"])


def load_application(file: Path | None, wishes: Wishes) -> Application:
    """Read ``file`` (default: the one-machine application), put ``wishes`` in and check it.

    Every pool's folder or hub name becomes the checkpoint's absolute folder, since replicas run
    elsewhere; what was typed stays the public name. Raises ``ValueError`` or ``OSError`` with
    the place and the reason.
    """
    path = file or DEFAULT_FILE
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    arguments = _single_application(document, path).get("args") or {}
    merged = put_wishes(arguments, wishes)
    merged = _with_folders(merged, load_config(merged))
    if wishes.model is not None:
        merged = _within_limits(merged)
    config = load_config(merged)
    return Application(_with_arguments(document, merged, config), config)


def put_wishes(arguments: dict[str, Any], wishes: Wishes) -> dict[str, Any]:
    """The application's arguments with every wish that is not ``None``; the input stays.

    A model goes into every pool. Where the file's pools have different models, each keeps its
    public name, so that requests find the pools as before.
    """
    merged = copy.deepcopy(arguments)
    places = (
        ("engine", "model", wishes.model),
        ("engine", "dtype", wishes.dtype),
        ("engine", "quantization", wishes.quantization),
        ("engine", "attention", wishes.attention),
        ("http", "host", wishes.host),
        ("http", "port", wishes.port),
    )
    for section, key, value in places:
        if value is not None:
            merged[section] = {**(merged.get(section) or {}), key: value}
    if wishes.served_model_name is not None:
        merged["served_model_name"] = wishes.served_model_name
    pools = _pools(merged)
    if wishes.model is not None:
        names = {str(pool["model"]) for pool in pools if pool.get("model") is not None}
        for pool in pools:
            typed = pool.pop("model", None)
            if typed is not None and len(names) > 1:
                pool.setdefault("served_model_name", typed)
    for key in ("model", "dtype", "quantization", "attention"):
        if getattr(wishes, key) is not None:
            for pool in pools:
                (pool.get("engine") or {}).pop(key, None)
    return merged


def config_errors(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Key and reason of everything wrong in a ``ServiceConfig``."""
    for item in error.errors(include_url=False):
        yield ".".join(map(str, item["loc"])) or "(all)", " ".join(str(item["msg"]).split())


def _pools(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The pools as written; what is not even an object is left for the configuration to refuse."""
    pools = arguments.get("pools")
    return [pool for pool in pools if isinstance(pool, dict)] if isinstance(pools, list) else []


def _with_folders(arguments: dict[str, Any], config: ServiceConfig) -> dict[str, Any]:
    """Every model that a pool uses as an absolute folder, with its public name beside it."""
    merged = copy.deepcopy(arguments)
    common = config.engine.model
    if any(config.engine_of(pool).model == common for pool in config.pools):
        folder = _folder(common)
        if folder != common:
            merged.setdefault("engine", {})["model"] = folder
            merged["served_model_name"] = config.served_model_name or common
    for raw, pool in zip(_pools(merged), config.pools, strict=False):
        own = pool.model or pool.engine.get("model")
        if own is None:
            continue
        (raw.get("engine") or {}).pop("model", None)
        raw["model"] = _folder(own)
        if pool.served_model_name is None and raw["model"] != own:
            raw["served_model_name"] = config.model_name_of(pool)
    return merged


def _folder(name: str) -> str:
    """The absolute folder of a model; ``embedded`` stays, for it is in every installation."""
    folder = resolve_model(name)
    return name if name == EMBEDDED else str(folder)


def _within_limits(arguments: dict[str, Any]) -> dict[str, Any]:
    """``max_model_len`` of engine and pools lowered to what a model can do that took another's
    place; the file's value is meant for a larger one."""
    merged = copy.deepcopy(arguments)
    sections = [merged.get("engine") or {}, *(p.get("engine") or {} for p in _pools(merged))]
    config = load_config(merged)
    limit = model_limit(config.engine.model)
    for section in sections:
        if isinstance(section.get("max_model_len"), int):
            section["max_model_len"] = min(section["max_model_len"], limit)
    return merged


def model_limit(name: str) -> int:
    """The longest sequence of a model, in tokens.

    Raises ``ValueError`` for a checkpoint without a proper ``config.json``.
    """
    return int(read_shapes(name)["max_position_embeddings"])


def read_shapes(name: str) -> dict[str, Any]:
    """The ``config.json`` of a model, without loading torch. Raises ``ValueError``."""
    path = resolve_model(name) / "config.json"
    try:
        shapes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(shapes, dict) or not isinstance(shapes.get("max_position_embeddings"), int):
        raise ValueError(f"{path}: max_position_embeddings is missing")
    return shapes


def _single_application(document: Any, path: Path) -> dict[str, Any]:
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1:
        raise ValueError(f"{path} is a Serve configuration with one entry under 'applications'")
    application = applications[0]
    if not isinstance(application, dict) or not isinstance(application.get("import_path"), str):
        raise ValueError(f"{path}: applications[0] needs an import_path")
    return application


def _with_arguments(
    document: dict[str, Any], arguments: dict[str, Any], config: ServiceConfig
) -> dict[str, Any]:
    application = {**document["applications"][0], "args": arguments}
    options = {
        **(document.get("http_options") or {}),
        "host": config.http.host,
        "port": config.http.port,
    }
    return {**document, "applications": [application], "http_options": options}
