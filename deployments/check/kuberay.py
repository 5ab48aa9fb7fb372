"""KubeRay's ``RayService``: the parts that decide whether the service comes up."""

from __future__ import annotations

import json
from typing import Any

import ray
import yaml

from .files import Described, read_application
from .keys import unknown_keys
from .nodes import NodeType, parse_bytes, parse_cpus
from .plan import Problem

API_VERSION = "ray.io/v1"
OWN_COMMAND = "ray.io/overwrite-container-cmd"
GPU = "nvidia.com/gpu"

# Fields of KubeRay's RayService that these files use or are likely to; not the whole API.
SERVICE_KEYS = (
    "serveConfigV2",
    "rayClusterConfig",
    "serveService",
    "upgradeStrategy",
    "serviceUnhealthySecondThreshold",
    "deploymentUnhealthySecondThreshold",
    "rayClusterDeletionDelaySeconds",
    "excludeHeadPodFromServeSvc",
)
CLUSTER_KEYS = (
    "suspend",
    "managedBy",
    "authOptions",
    "autoscalerOptions",
    "headServiceAnnotations",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
)
HEAD_KEYS = (
    "template",
    "headService",
    "enableIngress",
    "resources",
    "labels",
    "rayStartParams",
    "serviceType",
)
WORKER_KEYS = (
    "suspend",
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "idleTimeoutSeconds",
    "resources",
    "labels",
    "rayStartParams",
    "template",
    "scaleStrategy",
    "numOfHosts",
)


def read_kuberay(document: dict[str, Any]) -> Described:
    """Check a RayService with the application in its ``serveConfigV2``."""
    problems: list[Problem] = []
    if document.get("apiVersion") != API_VERSION:
        problems.append(Problem("apiVersion", f"must be {API_VERSION}"))
    if not (document.get("metadata") or {}).get("name"):
        problems.append(Problem("metadata.name", "is missing"))
    annotations = (document.get("metadata") or {}).get("annotations") or {}
    if annotations.get(OWN_COMMAND) != "true":
        message = 'must be "true": else KubeRay starts Ray without the environment it needs'
        problems.append(Problem(f"metadata.annotations.{OWN_COMMAND}", message))
    spec = document.get("spec") or {}
    problems += unknown_keys(spec, SERVICE_KEYS, "spec.")
    cluster = spec.get("rayClusterConfig") or {}
    config, found = _application(spec.get("serveConfigV2"))
    problems += found
    nodes, of_cluster = _cluster(cluster)
    problems += of_cluster
    key = "spec.serveConfigV2: applications[0].args.pools"
    return Described("KubeRay service", config, key, nodes, tuple(problems))


def _application(text: Any) -> tuple[Any, tuple[Problem, ...]]:
    place = "spec.serveConfigV2"
    if not isinstance(text, str):
        return None, (Problem(place, "must be the text of a Serve application: begin it with |"),)
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return None, (Problem(place, f"is not YAML: {' '.join(str(error).split())}"),)
    if not isinstance(document, dict):
        return None, (Problem(place, "holds no YAML object"),)
    return read_application(document, f"{place}: ")


def _cluster(cluster: dict[str, Any]) -> tuple[tuple[NodeType, ...], list[Problem]]:
    place = "spec.rayClusterConfig"
    problems = list(unknown_keys(cluster, CLUSTER_KEYS, f"{place}."))
    if (version := str(cluster.get("rayVersion"))) != ray.__version__:
        problems.append(
            Problem(f"{place}.rayVersion", f"is {version}; the package needs {ray.__version__}")
        )
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        message = "is not token: whoever reaches a pod's ports could run code"
        problems.append(Problem(f"{place}.authOptions.mode", message, is_error=False))
    head = cluster.get("headGroupSpec")
    workers = cluster.get("workerGroupSpecs") or []
    if not isinstance(head, dict):
        return (), [*problems, Problem(f"{place}.headGroupSpec", "is missing")]
    nodes = []
    groups: list[tuple[str, int, dict[str, Any], tuple[str, ...], str]]
    groups = [("head", 1, head, HEAD_KEYS, f"{place}.headGroupSpec")]
    for index, group in enumerate(workers):
        where = f"{place}.workerGroupSpecs[{index}]"
        if not group.get("groupName"):
            problems.append(Problem(f"{where}.groupName", "is missing"))
        most = group.get("replicas", 0)
        if cluster.get("enableInTreeAutoscaling"):
            most = group.get("maxReplicas", most)
        groups.append((str(group.get("groupName")), int(most), group, WORKER_KEYS, where))
    for name, count, group, known, where in groups:
        problems += unknown_keys(group, known, f"{where}.")
        try:
            nodes.append(_node(name, count, group))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            problems.append(Problem(where, f"cannot be read: {type(error).__name__}: {error}"))
            continue
        problems += _start_problems(group, where)
    return tuple(node for node in nodes if node.count), problems


def _node(name: str, count: int, group: dict[str, Any]) -> NodeType:
    container = group["template"]["spec"]["containers"][0]
    limits = (container.get("resources") or {}).get("limits") or {}
    parameters = group.get("rayStartParams") or {}
    resources: dict[str, float] = {}
    if "num-cpus" in parameters or "cpu" in limits:
        resources["CPU"] = parse_cpus(parameters.get("num-cpus", limits.get("cpu")))
    if GPU in limits:
        resources["GPU"] = float(limits[GPU])
    if "resources" in parameters:
        # JSON inside quotes of a shell: '"{\"decode\": 1}"'.
        text = json.loads(parameters["resources"])
        custom = json.loads(text) if isinstance(text, str) else text
        resources |= {str(key): float(amount) for key, amount in custom.items()}
    memory = parse_bytes(limits["memory"]) if "memory" in limits else None
    return NodeType(name, count, resources, memory)


def _start_problems(group: dict[str, Any], where: str) -> list[Problem]:
    container = group["template"]["spec"]["containers"][0]
    words = " ".join(str(word) for word in container.get("args") or ())
    place = f"{where}.template"
    if "node_environment" not in words:
        message = (
            "does not run inference_pio.deployments.node_environment: Serve would take its slow "
            "defaults, and HAProxy a wrong setting"
        )
        return [Problem(f"{place}.spec.containers[0].args", message, is_error=False)]
    if "KUBERAY_GEN_RAY_START_CMD" not in words:
        message = "never runs $KUBERAY_GEN_RAY_START_CMD, which starts Ray"
        return [Problem(f"{place}.spec.containers[0].args", message)]
    return []
