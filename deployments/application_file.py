"""A Serve application file with the command line's wishes put in."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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

    A relative folder and a hub name become the checkpoint's absolute folder, since replicas run
    elsewhere; what was typed stays the public name. Raises ``ValueError`` or ``OSError`` with
    the place and the reason.
    """
    path = file or DEFAULT_FILE
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    arguments = _single_application(document, path).get("args", {})
    merged = put_wishes(arguments, wishes)
    config = load_config(merged)
    if config.engine.model != EMBEDDED:
        name = config.engine.model
        merged.setdefault("engine", {})["model"] = str(resolve_model(name))
        merged["served_model_name"] = config.served_model_name or name
        config = load_config(merged)
    else:
        resolve_model(EMBEDDED)
    return Application(_with_arguments(document, merged, config), config)


def put_wishes(arguments: dict[str, Any], wishes: Wishes) -> dict[str, Any]:
    """The application's arguments with every wish that is not ``None``; the input stays."""
    merged = copy.deepcopy(arguments)
    places = (
        ("engine", "model", wishes.model),
        ("engine", "dtype", wishes.dtype),
        ("http", "host", wishes.host),
        ("http", "port", wishes.port),
    )
    for section, key, value in places:
        if value is not None:
            merged[section] = {**(merged.get(section) or {}), key: value}
    if wishes.served_model_name is not None:
        merged["served_model_name"] = wishes.served_model_name
    return merged


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
