"""The Python examples of README and docs/ run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Examples of these pages talk to a running server: tests/deployments runs them.
WITH_SERVER = {"service.md"}
PAGES = [
    REPOSITORY / "README.md",
    *sorted(page for page in (REPOSITORY / "docs").glob("*.md") if page.name not in WITH_SERVER),
]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[object]:
    found = []
    for page in PAGES:
        for number, match in enumerate(EXAMPLE.finditer(page.read_text()), start=1):
            line = page.read_text()[: match.start()].count("\n") + 2
            found.append(pytest.param(page, line, match[1], id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize(("page", "line", "code"), examples())
def test_example_runs(page: Path, line: int, code: str) -> None:
    # Blank lines in front make the line numbers of a failure those of the page.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "example"})


def test_every_page_is_linked() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme
