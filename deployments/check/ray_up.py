"""``ray up`` cluster files, checked with Ray's own schema.

The key ``metadata``, which Ray leaves to its users, names the application that the cluster is for
(``application``, a file beside the cluster file) and, where Ray knows no node types because the
hosts are one's own, what each of them has (``host``: CPU, GPU, memory, gpu_memory, resources).
"""

from __future__ import annotations

import copy
import io
import logging
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config

from ..config import ServiceConfig
from .files import POOLS_KEY, Described, read_application, read_yaml
from .keys import nearest, unknown_keys
from .nodes import NodeType, parse_bytes
from .plan import Problem

METADATA_KEYS = ("application", "host")
HOST_KEYS = ("CPU", "GPU", "memory", "gpu_memory", "resources")
SETTING = re.compile(r"RAY_SERVE_\w+=")


def read_ray_up(document: dict[str, Any], path: Path) -> Described:
    """Check a cluster file, and the application that it names."""
    provider = document.get("provider")
    kind = f"ray up cluster ({provider.get('type') if isinstance(provider, dict) else '?'})"
    problems = [*_schema_problems(document), *_command_problems(document)]
    config, key = None, POOLS_KEY
    metadata = document.get("metadata") or {}
    problems += unknown_keys(metadata, METADATA_KEYS, "metadata.")
    if (name := metadata.get("application")) is not None:
        config, key, found = _application(path.parent / str(name))
        problems += found
    nodes: tuple[NodeType, ...] = ()
    if not any(problem.is_error for problem in problems):
        try:
            nodes = _nodes(document, metadata)
        except ValueError as error:
            problems.append(Problem("metadata.host", str(error)))
    return Described(kind, config, key, nodes, tuple(problems))


def _application(path: Path) -> tuple[ServiceConfig | None, str, tuple[Problem, ...]]:
    try:
        document = read_yaml(path)
    except (OSError, ValueError) as error:
        return None, POOLS_KEY, (Problem("metadata.application", str(error)),)
    config, problems = read_application(document, f"{path.name}: ")
    return config, f"{path.name}: {POOLS_KEY}", problems


def _schema_problems(document: dict[str, Any]) -> list[Problem]:
    provider = document.get("provider")
    if not isinstance(provider, dict) or "type" not in provider:
        return [Problem("provider.type", "is missing; local, aws, gcp, …")]
    is_local = provider["type"] == "local"
    if is_local:
        missing = [k for k in ("head_ip", "worker_ips") if k not in provider]
        if missing:
            return [Problem(f"provider.{key}", "is missing") for key in missing]
        if "available_node_types" in document:
            return [Problem("available_node_types", "own hosts have no node types; remove it")]
    checked = copy.deepcopy(document)
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        # Ray prints hints for whoever launches; they are no part of the answer.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            validate_config(prepare_config(checked))
    except jsonschema.ValidationError as error:
        return [_named(error)]
    except (ValueError, RuntimeError, KeyError, ImportError, AssertionError) as error:
        return [Problem("(file)", str(error))]
    return []


def _named(error: Any) -> Problem:
    place = ".".join(str(part) for part in error.absolute_path)
    if error.validator != "additionalProperties":
        return Problem(place or "(file)", error.message)
    known = [*error.schema.get("properties", {}), "min_workers"]
    unknown = [key for key in error.instance if key not in known]
    key = unknown[0] if unknown else "?"
    return Problem(f"{place}.{key}" if place else key, f"unknown key; {nearest(key, known)}")


def _command_problems(document: dict[str, Any]) -> list[Problem]:
    problems = []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = " ".join(str(line) for line in document.get(key) or ())
        if "node_environment" not in words:
            problems.append(
                Problem(
                    key,
                    "does not run inference_pio.deployments.node_environment: Serve would take "
                    "its slow defaults, and HAProxy a wrong setting",
                    is_error=False,
                )
            )
        for name in SETTING.findall(words):
            problems.append(
                Problem(key, f"sets {name[:-1]}, which node_environment sets", is_error=False)
            )
    return problems


def _nodes(document: dict[str, Any], metadata: dict[str, Any]) -> tuple[NodeType, ...]:
    provider = document["provider"]
    if provider["type"] == "local":
        return _hosts(provider, metadata.get("host"))
    head = document["head_node_type"]
    most = int(document.get("max_workers", 0))
    nodes = []
    for name, kind in document["available_node_types"].items():
        offered = dict(kind.get("resources") or {})
        memory = offered.pop("memory", None)
        offered.pop("object_store_memory", None)
        count = 1 if name == head else int(kind.get("max_workers", most))
        if count:
            nodes.append(NodeType(name, count, offered, memory))
    return tuple(nodes)


def _hosts(provider: dict[str, Any], host: Any) -> tuple[NodeType, ...]:
    """Own hosts, all alike; none where the file does not say what they have."""
    if host is None:
        return ()
    if not isinstance(host, dict) or (unknown := unknown_keys(host, HOST_KEYS, "")):
        raise ValueError("; ".join(f"{p.key}: {p.message}" for p in unknown) or "must be an object")
    resources = {key: float(host[key]) for key in ("CPU", "GPU") if key in host}
    resources |= {str(k): float(v) for k, v in (host.get("resources") or {}).items()}
    sizes = {
        key: parse_bytes(host[key]) if key in host else None for key in ("memory", "gpu_memory")
    }
    count = 1 + len(provider["worker_ips"])
    return (NodeType("host", count, resources, sizes["memory"], sizes["gpu_memory"]),)
