"""Bounds on tool definitions, so that no schema can cost more than its size in the prompt."""

from __future__ import annotations

import re
from typing import Any

from ...workers.types import RequestError
from .protocol import ChatCompletionRequest

MAX_TOOLS = 128
MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_ENUM = 1_000
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
# Keywords whose value is data or a map of names, not a schema.
_DATA_KEYWORDS = frozenset({"enum", "const", "default", "examples", "required"})
_MAP_KEYWORDS = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Refuse definitions that are malformed, remote, cyclic or beyond the bounds.

    Raises ``RequestError`` with the place.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{len(tools)} tools; at most {MAX_TOOLS} are taken", param="tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise RequestError(f"{place} is {{'type': 'function', 'function': …}}", param=place)
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"{place}.function.name has 1 to 64 letters, digits, '_', '.' or '-'", param=place
            )
        if name in names:
            raise RequestError(f"{place} repeats the function name {name!r}", param=place)
        names.add(name)
        _check_schema(function.get("parameters", {}), f"{place}.function.parameters")


def tools_in_use(request: ChatCompletionRequest) -> list[dict[str, Any]] | None:
    """The tools the model is shown: none with ``tool_choice: "none"``.

    Raises ``RequestError`` for choices that need a grammar, which is not built yet.
    """
    choice = request.tool_choice
    if request.tools:
        check_tools(request.tools)
    if choice == "required" or isinstance(choice, dict):
        raise RequestError(
            "tool_choice 'required' and named tools are not built yet; 'auto' and 'none' are",
            param="tool_choice",
        )
    if choice not in (None, "auto", "none"):
        raise RequestError("tool_choice is 'auto' or 'none'", param="tool_choice")
    if choice == "auto" and not request.tools:
        raise RequestError("tool_choice 'auto' needs tools", param="tool_choice")
    return None if choice == "none" else request.tools or None


def _check_schema(root: Any, place: str) -> None:
    if not isinstance(root, dict):
        raise RequestError(f"{place} is a JSON schema object", param=place)
    nodes = 0
    stack: list[tuple[Any, int]] = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"{place} is nested deeper than {MAX_DEPTH}", param=place)
        if nodes > MAX_NODES:
            raise RequestError(f"{place} has more than {MAX_NODES} nodes", param=place)
        if isinstance(node, list):
            stack.extend((item, depth + 1) for item in node)
        elif isinstance(node, dict):
            _check_node(node, place)
            stack.extend(_subschemas(node, depth + 1))
    _refuse_cycles(root, place)


def _subschemas(node: dict[str, Any], depth: int) -> list[tuple[Any, int]]:
    children: list[tuple[Any, int]] = []
    for key, value in node.items():
        if key in _DATA_KEYWORDS:
            continue
        if key in _MAP_KEYWORDS and isinstance(value, dict):
            children.extend((child, depth + 1) for child in value.values())
        elif isinstance(value, dict | list):
            children.append((value, depth))
    return children


def _check_node(node: dict[str, Any], place: str) -> None:
    declared = node.get("type")
    kinds = declared if isinstance(declared, list) else [declared]
    for kind in kinds:
        if kind is not None and (not isinstance(kind, str) or kind not in _TYPES):
            known = ", ".join(sorted(_TYPES))
            raise RequestError(f"{place} has type {str(kind)[:64]!r}; known: {known}", param=place)
    values = node.get("enum", [])
    if not isinstance(values, list) or len(values) > MAX_ENUM:
        raise RequestError(f"{place} has an enum that is no list of up to {MAX_ENUM}", param=place)
    reference = node.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise RequestError(
            f"{place} refers to {str(reference)[:64]!r}; only '#/…' is followed", param=place
        )


def _refuse_cycles(root: dict[str, Any], place: str) -> None:
    """Depth-first over references; a target met again on its own path is a cycle."""
    done: set[str] = set()
    path: list[str] = []
    stack: list[tuple[str, bool]] = [(ref, False) for ref in _references(root)]
    while stack:
        reference, leaving = stack.pop()
        if leaving:
            done.add(path.pop())
        elif reference in path:
            raise RequestError(f"{place} has a cyclic $ref {reference[:64]!r}", param=place)
        elif reference not in done:
            path.append(reference)
            stack.append((reference, True))
            target = _resolve(root, reference, place)
            stack.extend((ref, False) for ref in _references(target))


def _resolve(root: dict[str, Any], reference: str, place: str) -> Any:
    node: Any = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or name not in node:
            raise RequestError(f"{place} has a $ref to nowhere: {reference[:64]!r}", param=place)
        node = node[name]
    return node


def _references(root: Any) -> list[str]:
    found: list[str] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                found.append(node["$ref"])
            stack.extend(child for child, _ in _subschemas(node, 0))
        elif isinstance(node, list):
            stack.extend(node)
    return found
