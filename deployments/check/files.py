"""What a deployment file says: the service's configuration and the nodes, or what is wrong in it.

Three kinds are told apart by their keys: a Serve application (``applications``), a ``ray up``
cluster (``provider``) and a KubeRay service (``kind: RayService``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..application_file import config_errors
from ..config import ServiceConfig
from .keys import unknown_keys
from .nodes import NodeType
from .plan import Problem

SERVE_KEYS = (
    "applications",
    "http_options",
    "grpc_options",
    "logging_config",
    "proxy_location",
    "target_capacity",
)
APPLICATION_KEYS = (
    "name",
    "route_prefix",
    "import_path",
    "runtime_env",
    "host",
    "port",
    "deployments",
    "args",
    "logging_config",
    "external_scaler_enabled",
)
IMPORT_PATH = "inference_pio.deployments.app:build"


@dataclass(frozen=True, slots=True)
class Described:
    """What was read. ``config`` is ``None`` where it is wrong or the file has none.

    ``nodes`` is ``None`` where the file names none: an application runs on this machine then.
    ``pools_key`` is where the pools stand in the file.
    """

    kind: str
    config: ServiceConfig | None
    pools_key: str
    nodes: tuple[NodeType, ...] | None
    problems: tuple[Problem, ...]


def read_file(path: Path) -> Described:
    """Read any of the three kinds. Raises ``OSError``, or ``ValueError`` for any other file."""
    document = read_yaml(path)
    if "applications" in document:
        config, problems = read_application(document, "")
        return Described("Serve application", config, POOLS_KEY, None, problems)
    if "provider" in document:
        from .ray_up import read_ray_up  # imports Ray

        return read_ray_up(document, path)
    if document.get("kind") == "RayService":
        from .kuberay import read_kuberay

        return read_kuberay(document)
    raise ValueError(
        f"{path} is none of: a Serve application ('applications'), a ray up cluster ('provider'), "
        "a KubeRay service ('kind: RayService')"
    )


POOLS_KEY = "applications[0].args.pools"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML object. Raises ``OSError`` or ``ValueError`` with the path."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no YAML object")
    return document


def read_application(
    document: dict[str, Any], prefix: str
) -> tuple[ServiceConfig | None, tuple[Problem, ...]]:
    """The configuration in a Serve document; ``prefix`` is its place in the file."""
    problems = unknown_keys(document, SERVE_KEYS, prefix)
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        return None, (*problems, Problem(f"{prefix}applications", "must be a list of one entry"))
    application = applications[0]
    place = f"{prefix}applications[0]"
    if not isinstance(application, dict):
        return None, (*problems, Problem(place, "must be an object"))
    problems += unknown_keys(application, APPLICATION_KEYS, f"{place}.")
    if application.get("import_path") != IMPORT_PATH:
        problems += (
            Problem(f"{place}.import_path", f"must be {IMPORT_PATH}, so that Serve finds it"),
        )
    args = application.get("args") or {}
    try:
        config = ServiceConfig.model_validate(args)
    except ValidationError as error:
        wrong = (Problem(f"{place}.args.{key}", text) for key, text in config_errors(error))
        return None, (*problems, *wrong)
    return config, problems
