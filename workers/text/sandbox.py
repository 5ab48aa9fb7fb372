"""Runs a Jinja template of a checkpoint: sandboxed, and within limits of time and size.

Python cannot stop a running function from outside, so the deadline is checked from within: the
compiled template calls ``_Deadline.check`` at every turn of every loop and at every call of a
function or macro. Between two checks lies straight-line code, each operation of which takes time
in proportion to its values.

A template is a file of the operator's own checkpoint, never a client's. The limits hold against
conversations that would make a template slow or its output huge, and against endless loops; they
are no defence against a template written to use up the memory.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_CHARS = 2**26
"""Characters of a rendered prompt."""

_CHECK = "_check_deadline"


class RenderLimitError(Exception):
    """A template ran longer, or wrote more, than it may."""


class _Deadline:
    """The end of one rendering's time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise RenderLimitError(f"took longer than {self._seconds:g} s on this conversation")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the deadline checked at every call."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_CHECK]()
        return super().call(context, obj, *args, **kwargs)


class SandboxedTemplate:
    """A compiled template with the filters and globals that transformers offers."""

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            _check_each_turn(loop)
        self._template = jinja2.Template.from_code(
            environment, environment.compile(tree), dict(environment.globals)
        )

    def render(self, variables: dict[str, Any], *, seconds: float) -> str:
        """The rendered text. Raises ``RenderLimitError`` and whatever the template raises."""
        deadline = _Deadline(seconds)
        pieces = []
        room = _MAX_CHARS
        for piece in self._template.generate({**variables, _CHECK: deadline.check}):
            room -= len(piece)
            if room < 0:
                raise RenderLimitError(f"writes more than {_MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)


def _check_each_turn(loop: nodes.For) -> None:
    name = nodes.Name(_CHECK, "load", lineno=loop.lineno)
    check = nodes.Call(name, [], [], None, None, lineno=loop.lineno)
    loop.body.insert(0, nodes.ExprStmt(check, lineno=loop.lineno))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: no HTML escapes, no ASCII escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
