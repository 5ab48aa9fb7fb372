"""The examples of docs/service.md run as written, but for the address of the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "service.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_example_runs(code: str, service_url: str) -> None:
    assert "http://127.0.0.1:8000" in code
    exec(code.replace("http://127.0.0.1:8000", service_url), {"__name__": "example"})
