"""Runs a Jinja template of a checkpoint: sandboxed, and within limits of time and size.

Python cannot stop a running function from outside, so the limit is checked from within: the
compiled template calls ``_Deadline.check`` at every turn of every loop, at every loop filter and
at every call of a function or macro. Between two checks lies straight-line code over values whose
size is bounded: multiplication, powers and formats that could blow a value up are limited too.
What remains unchecked is one operation of Python's on strings no longer than ``_MAX_CHARS``.
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
"""Characters of a rendered prompt, and of any value a template may multiply into being."""

_CHECK = "_check_deadline"


class RenderLimitError(Exception):
    """A template ran longer, or wrote more, than it may."""


class _Deadline:
    """The end of one rendering's time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> bool:
        if time.monotonic() > self._end:
            raise RenderLimitError(f"took longer than {self._seconds:g} s on this conversation")
        return True


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with limits on calls and on the operators that make big values."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_CHECK]()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            _limit_product(left, right)
        elif operator == "**" or isinstance(left, str | bytes):
            raise RenderLimitError(f"uses the operator {operator}, which templates may not")
        return super().call_binop(context, operator, left, right)


class SandboxedTemplate:
    """A compiled template with the filters and globals that transformers offers."""

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        # The stock filters below pad or cut to a length that the template names.
        for unlimited in ("center", "indent", "format"):
            environment.filters.pop(unlimited)
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
    loop.body.insert(0, nodes.ExprStmt(_check_call(loop.lineno), lineno=loop.lineno))
    if loop.test is not None:
        # A turn that the loop's own filter skips never reaches the body.
        loop.test = nodes.And(_check_call(loop.lineno), loop.test, lineno=loop.lineno)


def _check_call(line: int) -> nodes.Call:
    name = nodes.Name(_CHECK, "load", lineno=line)
    return nodes.Call(name, [], [], None, None, lineno=line)


def _limit_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        sized = isinstance(value, str | bytes | list | tuple)
        if sized and isinstance(times, int) and len(value) * times > _MAX_CHARS:
            raise RenderLimitError(f"makes a value of more than {_MAX_CHARS} elements")


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
